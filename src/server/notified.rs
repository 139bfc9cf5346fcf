//! Changes of a folder, told by the system where it can: to look at a repository then, and not only from time to time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// Between the first news and the look: files come one after the other, and who writes on and on is not looked at for
/// each of them.
const SETTLING: Duration = Duration::from_millis(300);

/// What is told of a folder, and of all below it, as long as this is kept.
#[derive(Debug)]
pub(super) struct Notified {
    news: Arc<Notify>,
    _watcher: RecommendedWatcher,
}

impl Notified {
    /// None where the system does not tell: on network file systems, say, or where it watches too much already.
    pub(super) fn of(folder: &Path) -> Option<Self> {
        let news = Arc::new(Notify::new());
        let told = Arc::clone(&news);
        // Looks are made of reading, which is no news.
        let is_news = |event: &Event| !matches!(event.kind, EventKind::Access(_));
        let watching = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.as_ref().map_or(true, is_news) {
                told.notify_one();
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match watching {
            Ok(watcher) => Some(Self {
                news,
                _watcher: watcher,
            }),
            Err(error) => {
                tracing::info!(%error, "changes of the repository are not told: it is looked at from time to time alone");
                None
            }
        }
    }
}

/// Completes when something has changed since the last time; never where nothing is told. [`settle`] before the look.
pub(super) async fn changed(notified: Option<&Notified>) {
    match notified {
        Some(notified) => notified.news.notified().await,
        None => std::future::pending().await,
    }
}

/// Lets whoever writes come to an end. Not a part of [`changed`], which may be dropped for something else that happens
/// first: the news would be gone with it.
pub(super) async fn settle() {
    tokio::time::sleep(SETTLING).await;
}
