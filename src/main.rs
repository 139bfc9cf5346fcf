//! The `denoised` binary; see the library's `cli`.

fn main() -> std::process::ExitCode {
    denoised::cli::main()
}
