//! The runtime's shared library, loaded once per process.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

use crate::network::NetworkError;

/// The variable that ONNX Runtime looks at when it starts.
const DISABLE_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// Keeps ONNX Runtime from telling its makers about machine and models. From 1.29 on the official libraries of all
/// systems do, also without being asked: while the library starts it writes an identifier below the home folder and
/// sends a first report, before there is anything to say no to. This variable alone turns all of it off
/// (microsoft/onnxruntime#27379), and programs set it first of all; for their tests `.cargo/config.toml` does.
///
/// # Safety
/// No other thread may run: it could read variables meanwhile.
#[expect(
    unsafe_code,
    clippy::disallowed_methods,
    reason = "a library takes it from nowhere else"
)]
pub unsafe fn disable_telemetry() {
    // SAFETY: as above.
    unsafe { std::env::set_var(DISABLE_TELEMETRY, "1") };
}

/// ONNX Runtime, loaded on first use. See also [`disable_telemetry`].
///
/// # Errors
/// One line that says where the library was looked for and which command fetches it.
pub fn runtime() -> Result<&'static Environment, NetworkError> {
    static RUNTIME: OnceLock<Result<Environment, String>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            let path = library_path()?;
            let help = "run `make tools`, or set ORT_DYLIB_PATH to an ONNX Runtime 1.31 library";
            let environment = ort::init_from(&path)
                .map_err(|e| format!("{}: {}; {help}", path.display(), first_line(&e.to_string())))?
                .with_name("denoised")
                .with_telemetry(false);
            // Its own way is to write to standard error and to wait for it, with all passes waiting for the one that does.
            #[cfg(feature = "serve")]
            let environment = environment.with_logger(std::sync::Arc::new(log));
            environment
                .build()
                .map_err(|e| format!("{}: {}; {help}", path.display(), first_line(&e.to_string())))
        })
        .as_ref()
        .map_err(|message| NetworkError::Runtime(message.clone()))
}

/// What ONNX Runtime has to say, in the process's log.
#[cfg(feature = "serve")]
fn log(level: ort::logging::LogLevel, _category: &str, _id: &str, location: &str, message: &str) {
    use ort::logging::LogLevel;
    match level {
        LogLevel::Verbose => tracing::trace!(target: "onnxruntime", location, "{message}"),
        LogLevel::Info => tracing::debug!(target: "onnxruntime", location, "{message}"),
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", location, "{message}"),
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "onnxruntime", location, "{message}"),
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// `ORT_DYLIB_PATH`, or the library beside the executable, or the one that `make tools` fetched.
fn library_path() -> Result<PathBuf, String> {
    const LIBRARY: &str = if cfg!(target_os = "macos") {
        "libonnxruntime.dylib"
    } else {
        "libonnxruntime.so"
    };
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()) {
        let path =
            std::path::absolute(&path).map_err(|e| format!("ORT_DYLIB_PATH {}: {e}", path.display()))?;
        return if path.exists() {
            Ok(path)
        } else {
            Err(format!(
                "ORT_DYLIB_PATH is set to {}, which does not exist; run `make tools` and unset it",
                path.display()
            ))
        };
    }
    // Never the working directory: whoever can write there could have their library loaded.
    let executable = std::env::current_exe().map_err(|e| e.to_string())?;
    let folders = executable.ancestors().skip(1);
    let beside = folders.clone().next().map(|folder| folder.join(LIBRARY));
    let fetched = folders.map(|folder| folder.join(".tools/onnxruntime").join(LIBRARY));
    beside.into_iter().chain(fetched).find(|path: &PathBuf| Path::exists(path)).ok_or_else(|| {
        format!("{LIBRARY} is missing: run `make tools`, or set ORT_DYLIB_PATH to an ONNX Runtime 1.31 library")
    })
}
