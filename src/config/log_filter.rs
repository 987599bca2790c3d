//! The setting `log`.

use tracing_subscriber::filter::Targets;

use super::{ConfigError, bad};

/// Parses the log filter. A bare level applies to gossamer; libraries then log only warnings and errors.
///
/// # Errors
/// Fails if the text has neither a level nor filters by module.
pub fn log_filter(text: Option<&str>) -> Result<Targets, ConfigError> {
    let text = text.unwrap_or("info");
    let filter = match text.contains([',', '=']) {
        true => text.to_owned(),
        false => format!("warn,gossamer={text}"),
    };
    filter.parse().map_err(|_| {
        bad(
            "log",
            format!(
                "{text:?} is not a valid filter: use error, warn, info, debug or trace, or filters by \
                 module, as in warn,gossamer=debug"
            ),
        )
    })
}
