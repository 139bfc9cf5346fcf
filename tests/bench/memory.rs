//! Memory of this process, in megabytes, as the kernel counts it; 0 where there is no `/proc`.

pub(crate) fn resident() -> f64 {
    field("VmRSS:")
}

/// The most since [`forget_peak`].
pub(crate) fn peak() -> f64 {
    field("VmHWM:")
}

pub(crate) fn forget_peak() {
    drop(std::fs::write("/proc/self/clear_refs", "5"));
}

fn field(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) / 1024.0
}
