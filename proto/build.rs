//! Compiles the proto files without protoc: `protox` parses them, `tonic-prost-build` writes the Rust.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    #[cfg(feature = "client")]
    if let Err(error) = compile() {
        println!("cargo::error=proto: {error}");
    }
}

#[cfg(feature = "client")]
fn compile() -> Result<(), Box<dyn std::error::Error>> {
    let own = [
        "denoised/v1/diffusion_service.proto",
        "denoised/v1/model_service.proto",
        "denoised/v1/server_service.proto",
    ];
    compile_files(&own, "descriptors.bin")?;
    // Apart, so that reflection tells of it only where it is served.
    compile_files(&["inference/grpc_service.proto"], "open_inference.bin")
}

#[cfg(feature = "client")]
fn compile_files(files: &[&str], descriptors: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_source_info(true)
        .include_imports(true)
        .open_files(files)?;
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join(descriptors), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::ProtoCodec")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
