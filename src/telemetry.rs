//! Logging to standard error, and spans for a collector.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::panic;
use std::thread;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt, registry};

use crate::config::{LogConfig, LogFormat};

pub mod traces;

/// Lines that may wait for standard error to take them; those beyond are dropped.
const WAITING_LINES: usize = 4096;

/// The process's log: what waits to be written is written when this is dropped, within a second.
#[must_use = "dropping it ends the log"]
#[derive(Debug)]
pub struct Log {
    dropped: ErrorCounter,
    writer: Option<WorkerGuard>,
}

impl Log {
    /// Lines that nobody took in time.
    pub fn dropped_lines(&self) -> usize {
        self.dropped.dropped_lines()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let writer = self.writer.take();
        // On a thread of its own: the guard prints where it cannot write, and may panic at that.
        let _ended = thread::spawn(move || drop(writer)).join();
    }
}

/// Sets up the process's log; later calls change nothing. Lines are written by a thread that nothing waits
/// for: a standard error that is full, closed or read by nobody costs lines, never a request.
///
/// # Errors
/// When the filter cannot be read.
pub fn init(config: &LogConfig) -> Result<Log, ParseError> {
    let filter = EnvFilter::builder().parse(&config.filter)?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .lossy(true)
        .thread_name("log")
        .finish(std::io::stderr());
    let log = Log {
        dropped: writer.error_counter(),
        writer: Some(guard),
    };
    let lines = fmt::layer()
        .with_ansi(
            std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        )
        .log_internal_errors(false)
        .with_writer(writer);
    let lines = match config.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let subscriber = registry().with(lines.with_filter(filter));
    // Of its own filter: what tasks and locks do is too much for a log.
    #[cfg(feature = "tokio-console")]
    let subscriber = subscriber.with(console_subscriber::spawn());
    // A second subscriber is refused: the first one stays.
    if subscriber.try_init().is_ok() {
        panic::set_hook(Box::new(log_panic));
    }
    Ok(log)
}

/// The standard hook writes to standard error itself, and waits for it.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    let thread = thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    tracing::error!(
        thread = thread.name(),
        location = panic.location().map(ToString::to_string),
        backtrace,
        "panicked: {}",
        panic.payload_as_str().unwrap_or("no message")
    );
}
