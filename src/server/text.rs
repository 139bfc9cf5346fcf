//! Work on text, off the threads that answer: tokenizers take as long as they like.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// How long a request waits for a thread, and then for its text.
const PATIENCE: Duration = Duration::from_secs(10);

/// Threads for text; as many as there are cores, whoever asks.
#[derive(Clone, Debug)]
pub(super) struct TextThreads {
    free: Arc<Semaphore>,
    patience: Duration,
}

impl TextThreads {
    pub(super) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::with(cores, PATIENCE)
    }

    fn with(threads: usize, patience: Duration) -> Self {
        Self {
            free: Arc::new(Semaphore::new(threads)),
            patience,
        }
    }

    /// Runs `work` on one of them.
    ///
    /// # Errors
    /// What `work` says; RESOURCE_EXHAUSTED when no thread is free in time, DEADLINE_EXCEEDED when it does not end
    /// in time (it keeps its thread until it does), INTERNAL when it panics.
    pub(super) async fn run<T, F>(&self, work: F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T, Status> + Send + 'static,
    {
        let free = tokio::time::timeout(self.patience, Arc::clone(&self.free).acquire_owned()).await;
        let Ok(Ok(permit)) = free else {
            let details = ErrorDetails::with_retry_info(Some(self.patience));
            let message = "the server is busy reading text";
            return Err(Status::with_error_details(
                Code::ResourceExhausted,
                message,
                details,
            ));
        };
        let running = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        match tokio::time::timeout(self.patience, running).await {
            Ok(Ok(done)) => done,
            Ok(Err(panic)) => {
                tracing::error!(%panic, "work on text panicked");
                Err(Status::internal(
                    "the text could not be read; the server's log has the details",
                ))
            }
            Err(_) => Err(Status::deadline_exceeded(format!(
                "the text took more than {} s to read",
                self.patience.as_secs()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_the_answer_and_the_thread_is_free_again() {
        let threads = TextThreads::with(1, PATIENCE);
        for _ in 0..2 {
            let answer: Result<(), Status> = threads
                .run(|| std::panic::resume_unwind(Box::new("injected")))
                .await;
            assert_eq!(answer.map_err(|status| status.code()), Err(Code::Internal));
        }
        assert_eq!(threads.run(|| Ok(7)).await.ok(), Some(7));
    }

    #[tokio::test]
    async fn text_that_never_ends_is_not_waited_for() {
        let threads = TextThreads::with(1, Duration::from_millis(20));
        let (end, ended) = std::sync::mpsc::sync_channel::<()>(0);
        let endless = threads.run(move || {
            let _ended = ended.recv().is_err();
            Ok(())
        });
        assert_eq!(
            endless.await.map_err(|status| status.code()),
            Err(Code::DeadlineExceeded)
        );
        let next = threads.run(|| Ok(())).await;
        assert_eq!(next.map_err(|status| status.code()), Err(Code::ResourceExhausted));
        drop(end);
    }
}
