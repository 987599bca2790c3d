//! CPU time and memory of a process, as the kernel counts them.

use std::fs;

/// Returns the CPU seconds that the running threads of a process have used. `schedstat` is finer than the
/// ticks of `/proc/PID/stat` (Documentation/scheduler/sched-stats.rst).
pub fn cpu_seconds(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanos = threads.filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanos.sum::<f64>() / 1e9
}

/// Returns a field of `/proc/PID/status`, such as "`VmRSS`:", in MiB; NaN if it is missing.
pub fn memory_mib(pid: u32, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.map_or(f64::NAN, |kib: f64| kib / 1024.0)
}
