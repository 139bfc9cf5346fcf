//! Compiles the schema of ONNX files, without a `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/export/onnx.proto");
    let schema = protox::compile(["onnx.proto"], ["src/export"])?;
    // Indented comments of the schema would turn into documentation tests.
    prost_build::Config::new()
        .disable_comments(["."])
        .compile_fds(schema)?;
    Ok(())
}
