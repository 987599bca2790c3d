//! Reads and writes sysctls. [`interface`] protects the host from what pods send at an interface.

pub mod interface;

use std::{fs, io, path::Path};

use crate::model::{Problem, ProblemCode, forwarding_sysctl};

/// Below `/proc/sys`.
const ROOT: &str = "/proc/sys";

/// Writes a sysctl; `name` is its path below `/proc/sys`.
///
/// # Errors
/// When the file cannot be written.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(ROOT).join(name), value)
}

/// Returns why sysctls cannot be read, with the consequence and a remedy; `None` if they can.
pub fn unreadable() -> Option<Problem> {
    unreadable_below(Path::new(ROOT))
}

/// Reads a sysctl that every kernel with IPv4 has.
fn unreadable_below(root: &Path) -> Option<Problem> {
    let path = root.join(forwarding_sysctl(true));
    let error = fs::read_to_string(&path).err()?;
    let path = path.display();
    let notice = Problem::new(
        ProblemCode::SysctlsUnreadable,
        Problem::HOST,
        format!(
            "sysctls cannot be read ({path}: {error}), so settings that drop packets are not reported"
        ),
        "let the agent see all of /proc (in its systemd unit: ProcSubset=all)",
    );
    Some(notice.notice())
}

/// Whether an interface has a strict reverse path filter (RFC 3704): the larger of the values for all
/// interfaces and for this one applies.
pub fn has_strict_rp_filter(interface: &str) -> bool {
    const STRICT: u8 = 1;
    let value = |name: &str| number(&format!("net/ipv4/conf/{name}/rp_filter"));
    value("all").max(value(interface)) == Some(STRICT)
}

/// Returns whether the host is known to forward no packets of a family.
pub fn is_forwarding_off(ipv4: bool) -> bool {
    is_off(forwarding_sysctl(ipv4))
}

/// Returns the value of a numeric sysctl; `None` if it does not exist or cannot be read.
pub fn number(name: &str) -> Option<u8> {
    read(name)?.parse().ok()
}

/// Returns whether a sysctl is known to be 0. One that cannot be read is not.
pub fn is_off(name: &str) -> bool {
    number(name) == Some(0)
}

/// Reads a sysctl; `None` if it does not exist or cannot be read.
pub fn read(name: &str) -> Option<String> {
    Some(fs::read_to_string(Path::new(ROOT).join(name)).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_sysctl_is_unknown_and_reported() {
        assert!(!is_off("net/ipv4/no_such_setting"), "unknown is not off");
        assert_eq!(number("net/ipv4/no_such_setting"), None);
        let missing = unreadable_below(Path::new("/nonexistent")).expect("it does not exist");
        assert!(missing.contains("ProcSubset=all"), "{missing}");
        assert_eq!(unreadable(), None);
    }
}
