//! Finds the process that holds the lock of a file.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use nix::libc::SIGKILL;

/// `PF_EXITING` (linux/sched.h).
const EXITING: u64 = 0x4;

/// Returns the process that holds a file's `flock`. `None` if the kernel does not report it, for example for
/// a process in another PID namespace.
pub fn of(file: &Path) -> Option<u32> {
    let inode = fs::metadata(file).ok()?.ino();
    find_in_locks(&fs::read_to_string("/proc/locks").ok()?, inode)
}

/// Returns whether a process has ended or is about to. Such a process may still hold files and sockets while
/// one of its threads waits for a disk that hangs.
pub fn is_ending(pid: u32) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    is_ending_by(&read("stat"), &read("status"))
}

/// Finds a lock in /proc/locks. Columns (proc(5)): number, class, kind, access, process, and device with
/// inode.
fn find_in_locks(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = words[..] else { return None };
        let is_same_inode = place.rsplit(':').next()?.parse() == Ok(inode);
        pid.parse().ok().filter(|_| is_same_inode)
    })
}

/// Decides from /proc/PID/stat and /proc/PID/status.
fn is_ending_by(stat: &str, status: &str) -> bool {
    // The name in parentheses may contain spaces and parentheses.
    let mut words = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let state = words.next().unwrap_or_default();
    let flags = words.nth(5).and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
    let is_killed = status.lines().any(|line| {
        let pending = line.strip_prefix("ShdPnd:").or_else(|| line.strip_prefix("SigPnd:"));
        let signals = pending.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        signals.is_some_and(|signals| signals & 1 << (SIGKILL - 1) != 0)
    });
    matches!(state, "Z" | "X") || flags & EXITING != 0 || is_killed
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{Flock, FlockArg};

    use super::*;

    #[test]
    fn holder_of_a_lock_is_found_and_a_free_file_has_none() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert_eq!(of(file.path()), None);
        let opened = file.reopen().expect("opened");
        let lock = Flock::lock(opened, FlockArg::LockExclusiveNonblock).expect("free");
        assert_eq!(of(file.path()), Some(std::process::id()));
        drop(lock);
        let locks = "1: POSIX  ADVISORY  WRITE 7 fd:00:99 0 EOF\n2: -> FLOCK  x\n\
                     3: FLOCK  ADVISORY  WRITE 8 fd:00:199 0 EOF\n";
        assert_eq!((find_in_locks(locks, 99), find_in_locks(locks, 199)), (None, Some(8)));
    }

    #[test]
    fn killed_process_and_zombie_are_ending() {
        assert!(!is_ending(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().expect("a child");
        let begun = std::time::Instant::now();
        while !is_ending(child.id()) {
            assert!(begun.elapsed().as_secs() < 60, "it has ended");
        }
        child.wait().expect("reaped");
        let stat = |state: char, flags: u64| format!("7 (a) Z b) {state} 1 7 7 0 -1 {flags} 1 2");
        assert!(!is_ending_by(&stat('D', 0x40_0040), "SigPnd:\t0000000000000000\n"));
        assert!(is_ending_by(&stat('D', 0x40_0044), ""));
        assert!(is_ending_by(&stat('D', 0), "ShdPnd:\t0000000000000100\n"));
    }
}
