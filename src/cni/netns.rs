//! The network namespace that a runtime names.

use std::{fs::File, io, path::Path};

use super::error::{CniError, code};
use crate::pods::wiring::{is_same, open_netns};

/// That of this program.
pub const OWN: &str = "/proc/self/ns/net";

/// Opens it. Nothing is waited for, whatever is at that path; `what` is what an error calls it.
///
/// # Errors
/// For what is not there, and for this host's own namespace: a process that had the PID of a container's
/// before leads there.
pub fn open(what: &str, path: &Path) -> Result<File, CniError> {
    let file = open_netns(path).map_err(|error| unusable(what, path, &error))?;
    let is_own = File::open(OWN).and_then(|own| is_same(&file, &own));
    match is_own.map_err(|error| unusable(what, path, &error))? {
        false => Ok(file),
        true => {
            let why = format!("{what} {}: that is this host's own namespace", path.display());
            Err(CniError::new(code::BAD_ENVIRONMENT, why))
        }
    }
}

/// Why a namespace cannot be entered.
pub fn unusable(what: &str, path: &Path, error: &io::Error) -> CniError {
    let why = match error.kind() {
        io::ErrorKind::InvalidInput => "that is none".to_owned(),
        _ => error.to_string(),
    };
    CniError::new(code::BAD_ENVIRONMENT, format!("{what} {}: {why}", path.display()))
}
