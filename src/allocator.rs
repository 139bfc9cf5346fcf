//! The C library's allocator, which networks live in.

/// Has glibc give large blocks back to the system when they are freed, however large the ones before were.
///
/// Its threshold for that follows the largest block that was ever freed, up to 32 MB: once a model has been unloaded,
/// blocks of its size stay with the process for good, and unloading models frees nothing. Other C libraries have
/// no such rule.
pub fn give_large_blocks_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const THRESHOLD: libc::c_int = 1 << 20;
        // SAFETY: `mallopt` takes two numbers, locks the allocator itself and touches no memory of ours.
        #[expect(unsafe_code, reason = "there is no safe way to say so within the process")]
        let taken = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD) };
        if taken == 0 {
            tracing::warn!("the allocator keeps its own threshold: unloaded models may stay in memory");
        }
    }
}
