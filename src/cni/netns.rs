//! Opens the network namespace that a runtime names.

use std::{fs::File, io, path::Path};

use super::error::{CniError, code};
use crate::pods::wiring::{is_same, open_netns};

/// Path of this program's own network namespace.
pub const OWN_NETNS: &str = "/proc/self/ns/net";

/// Opens a network namespace. Never blocks, whatever kind of file is at the path. `what` names the source of
/// the path in error messages.
///
/// # Errors
/// If there is no namespace at the path, or if it is this host's own namespace. The latter happens when a
/// process of the host has the PID that the container's process had before.
pub fn open(what: &str, path: &Path) -> Result<File, CniError> {
    let file = open_netns(path).map_err(|error| namespace_error(what, path, &error))?;
    let is_own = File::open(OWN_NETNS).and_then(|own| is_same(&file, &own));
    match is_own.map_err(|error| namespace_error(what, path, &error))? {
        false => Ok(file),
        true => {
            let why = format!("{what} {}: this host's own network namespace", path.display());
            Err(CniError::new(code::BAD_ENVIRONMENT, why))
        }
    }
}

/// Converts the error of a namespace that cannot be opened or entered.
pub fn namespace_error(what: &str, path: &Path, error: &io::Error) -> CniError {
    let why = match error.kind() {
        io::ErrorKind::InvalidInput => "not a network namespace".to_owned(),
        _ => error.to_string(),
    };
    CniError::new(code::BAD_ENVIRONMENT, format!("{what} {}: {why}", path.display()))
}
