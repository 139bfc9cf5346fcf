//! Work that threads share without its result depending on them.

use std::panic::resume_unwind;
use std::thread;

/// What `each` makes of every index below `count`, in their order. Threads take turns, each with a state
/// of its own; the first error of the first thread that has one ends it.
pub(crate) fn map<S, T: Send, E: Send>(
    count: usize,
    threads: usize,
    state: &(impl Fn() -> Result<S, E> + Sync),
    each: &(impl Fn(&mut S, usize) -> Result<T, E> + Sync),
) -> Result<Vec<T>, E> {
    let of_thread = |part: usize| -> Result<Vec<(usize, T)>, E> {
        let mut state = state()?;
        (part..count)
            .step_by(threads)
            .map(|index| Ok((index, each(&mut state, index)?)))
            .collect()
    };
    let parts: Result<Vec<_>, E> = thread::scope(|scope| {
        let of_thread = &of_thread;
        let handles: Vec<_> = (0..threads.min(count))
            .map(|part| scope.spawn(move || of_thread(part)))
            .collect();
        handles
            .into_iter()
            // A part that is missing would pass for less work.
            .map(|handle| handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    let mut results: Vec<(usize, T)> = parts?.into_iter().flatten().collect();
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}
