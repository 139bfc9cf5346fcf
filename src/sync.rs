//! Locks and threads of engine and models.
//!
//! With the feature `shuttle`, which is for tests alone, they are those of a scheduler that runs one thread at a time
//! and tries one interleaving after another.

#[cfg(not(feature = "shuttle"))]
mod real {
    use std::io;
    use std::thread::{Builder, JoinHandle};

    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::thread::sleep;

    /// Starts a thread.
    pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        Builder::new().name(name).spawn(run)
    }
}
#[cfg(not(feature = "shuttle"))]
pub(crate) use real::*;

#[cfg(feature = "shuttle")]
mod simulated {
    use std::fmt;
    use std::io;
    use std::ops::{Deref, DerefMut};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, PoisonError};
    use std::time::Instant;

    use shuttle::sync as simulated;
    use shuttle::thread;
    pub(crate) use shuttle::thread::sleep;

    /// `parking_lot::Mutex`.
    pub(crate) struct Mutex<T>(simulated::Mutex<T>);

    /// `parking_lot::MutexGuard`.
    pub(crate) struct MutexGuard<'a, T> {
        mutex: &'a Mutex<T>,
        /// Gone while it is unlocked for a while.
        guard: Option<simulated::MutexGuard<'a, T>>,
    }

    impl<T> Mutex<T> {
        /// Guards `value`.
        pub(crate) fn new(value: T) -> Self {
            Self(simulated::Mutex::new(value))
        }

        /// Waits for the others.
        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard {
                mutex: self,
                guard: Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)),
            }
        }
    }

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T> fmt::Debug for Mutex<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Mutex")
        }
    }

    impl<'a, T> MutexGuard<'a, T> {
        /// Runs `run` while others may have the lock.
        pub(crate) fn unlocked<R>(this: &mut Self, run: impl FnOnce() -> R) -> R {
            this.guard = None;
            let done = run();
            *this = this.mutex.lock();
            done
        }
    }

    impl<T> fmt::Debug for MutexGuard<'_, T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("MutexGuard")
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard
                .as_deref()
                .unwrap_or_else(|| unreachable!("it is locked again"))
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard
                .as_deref_mut()
                .unwrap_or_else(|| unreachable!("it is locked again"))
        }
    }

    /// `parking_lot::Condvar`.
    pub(crate) struct Condvar(simulated::Condvar);

    impl Condvar {
        /// Nobody waits.
        #[expect(clippy::new_without_default, reason = "as parking_lot has it for us")]
        pub(crate) fn new() -> Self {
            Self(simulated::Condvar::new())
        }

        /// Waits for a signal.
        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            if let Some(held) = guard.guard.take() {
                guard.guard = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
            }
        }

        /// Lets others run: here any time may be over.
        pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _: Instant) {
            MutexGuard::unlocked(guard, thread::yield_now);
        }

        /// Wakes one of those that wait.
        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        /// Wakes all of them.
        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    impl fmt::Debug for Condvar {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Condvar")
        }
    }

    /// `std::thread::JoinHandle`.
    pub(crate) struct JoinHandle {
        thread: thread::JoinHandle<()>,
        finished: Arc<AtomicBool>,
    }

    impl JoinHandle {
        /// Whether the thread has ended.
        pub(crate) fn is_finished(&self) -> bool {
            self.finished.load(Ordering::Acquire)
        }

        /// Waits for its end.
        pub(crate) fn join(self) -> std::thread::Result<()> {
            self.thread.join()
        }

        /// The thread, for its name.
        pub(crate) fn thread(&self) -> &thread::Thread {
            self.thread.thread()
        }
    }

    impl fmt::Debug for JoinHandle {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("JoinHandle")
        }
    }

    struct Finish(Arc<AtomicBool>);

    impl Drop for Finish {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }

    /// Starts a thread.
    pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle> {
        let finished = Arc::new(AtomicBool::new(false));
        let finish = Finish(Arc::clone(&finished));
        let thread = thread::Builder::new().name(name).spawn(move || {
            let _finish = finish;
            run();
        })?;
        Ok(JoinHandle { thread, finished })
    }
}
#[cfg(feature = "shuttle")]
pub(crate) use simulated::*;

#[cfg(not(feature = "shuttle"))]
/// A thread of [`spawn`].
pub(crate) type Thread = std::thread::JoinHandle<()>;
#[cfg(feature = "shuttle")]
/// A thread of [`spawn`].
pub(crate) type Thread = JoinHandle;
