//! Bytes of the operating system's random number generator.

/// Returns random bytes for keys, identities and nonces.
///
/// # Errors
/// Fails if the operating system's generator fails.
pub fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
