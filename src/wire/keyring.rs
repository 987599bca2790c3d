//! The secrets that a node accepts, the one that it uses, and those that it has dropped.
//!
//! A cluster changes its secret in three steps, none of which closes a connection between members: all nodes
//! accept the new secret, all use it, all drop the old one. This module knows nothing about the progress of
//! other nodes.

use std::{collections::BTreeSet, fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;

use super::{Secret, SecretId, SecretOrder};

/// Greatest number of accepted secrets. Each of them is one more authority for the check of a certificate.
const MAX_SECRETS: usize = 4;
/// Number of dropped secrets that a node remembers.
const MAX_DROPPED: usize = 64;

/// A node's secrets: at least one, which is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    /// Accepted secrets; the first is in use.
    secrets: Vec<Secret>,
    /// Accepted secrets that were in use before. A token with one of them is outdated.
    former: BTreeSet<SecretId>,
    /// Dropped secrets, the latest first.
    dropped: Vec<SecretId>,
}

impl Keyring {
    /// Returns a keyring with one secret, which is in use.
    pub fn new(secret: Secret) -> Self {
        Self { secrets: vec![secret], former: BTreeSet::new(), dropped: Vec::new() }
    }

    /// Returns the secret in use.
    pub fn in_use(&self) -> &Secret {
        &self.secrets[0]
    }

    /// Returns the accepted secrets, the one in use first.
    pub fn accepted(&self) -> &[Secret] {
        &self.secrets
    }

    /// Returns the ids of the accepted secrets, the one in use first.
    pub fn ids(&self) -> Vec<SecretId> {
        self.secrets.iter().map(Secret::id).collect()
    }

    /// Whether the secret is accepted.
    pub fn accepts(&self, id: SecretId) -> bool {
        self.secrets.iter().any(|secret| secret.id() == id)
    }

    /// Whether the secret was dropped.
    pub fn has_dropped(&self, id: SecretId) -> bool {
        self.dropped.contains(&id)
    }

    /// Applies a step of a rotation. Returns whether it changed anything.
    ///
    /// # Errors
    /// If the step is not allowed, with the reason; nothing has changed then.
    pub fn apply(&mut self, order: &SecretOrder) -> Result<bool, String> {
        match order {
            SecretOrder::Add(secret) => self.add(secret),
            SecretOrder::Use(id) => self.use_from_now_on(*id),
            SecretOrder::Drop(id) => self.drop_for_good(*id),
        }
    }

    /// Whether an operator's token with this secret requires a change: the secret is not in use, was not in
    /// use before and was not dropped.
    pub fn is_new_secret(&self, id: SecretId) -> bool {
        self.in_use().id() != id && !self.former.contains(&id) && !self.has_dropped(id)
    }

    /// Returns the saved secrets together with that of an operator's token.
    pub fn with_token(saved: Option<Self>, secret: &Secret) -> Self {
        let mut keyring = saved.unwrap_or_else(|| Self::new(secret.clone()));
        keyring.adopt(secret);
        keyring
    }

    /// Makes the secret of an operator's token the one in use, unless the token is outdated.
    pub fn adopt(&mut self, secret: &Secret) {
        let id = secret.id();
        if !self.is_new_secret(id) {
            return;
        }
        self.former.insert(self.in_use().id());
        self.secrets.retain(|known| known.id() != id);
        self.secrets.insert(0, secret.clone());
        self.secrets.truncate(MAX_SECRETS);
    }

    /// Accepts a secret in addition.
    fn add(&mut self, secret: &Secret) -> Result<bool, String> {
        let id = secret.id();
        if self.accepts(id) {
            return Ok(false);
        }
        if self.has_dropped(id) {
            return Err(format!("secret {id} was dropped: make another one"));
        }
        if self.secrets.len() >= MAX_SECRETS {
            return Err(format!("{MAX_SECRETS} secrets are accepted already: drop one first"));
        }
        self.secrets.push(secret.clone());
        Ok(true)
    }

    /// Puts an accepted secret in use.
    fn use_from_now_on(&mut self, id: SecretId) -> Result<bool, String> {
        let place = self.secrets.iter().position(|secret| secret.id() == id);
        let place = place.ok_or_else(|| format!("secret {id} is not known here: add it first"))?;
        if place > 0 {
            self.former.insert(self.in_use().id());
            self.former.remove(&id);
            self.secrets[..=place].rotate_right(1);
        }
        Ok(place > 0)
    }

    /// Drops a secret permanently.
    fn drop_for_good(&mut self, id: SecretId) -> Result<bool, String> {
        if self.in_use().id() == id {
            return Err(format!("secret {id} is in use here: use another one first"));
        }
        let before = self.secrets.len();
        self.secrets.retain(|secret| secret.id() != id);
        self.former.remove(&id);
        if !self.has_dropped(id) {
            self.dropped.insert(0, id);
            self.dropped.truncate(MAX_DROPPED);
        }
        Ok(self.secrets.len() < before)
    }
}

/// The file format: one line per secret with its state and value in base32, and one line per dropped secret
/// with its id.
impl fmt::Display for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, secret) in self.secrets.iter().enumerate() {
            let word = match place {
                0 => "use",
                _ if self.former.contains(&secret.id()) => "former",
                _ => "accept",
            };
            writeln!(f, "{word} {}", BASE32_NOPAD.encode(secret.as_bytes()))?;
        }
        self.dropped.iter().try_for_each(|id| writeln!(f, "dropped {id}"))
    }
}

impl FromStr for Keyring {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut secrets, mut former, mut dropped) = (Vec::new(), BTreeSet::new(), Vec::new());
        for (number, line) in text.lines().enumerate() {
            // Errors do not contain the line, which may hold a secret.
            let wrong = || format!("line {} cannot be read", number + 1);
            let (word, value) = line.split_once(' ').ok_or_else(wrong)?;
            match word {
                "use" | "accept" | "former" if secrets.len() < MAX_SECRETS => {
                    let bytes = BASE32_NOPAD.decode(value.as_bytes()).map_err(|_| wrong())?;
                    let secret = Secret::new(bytes).map_err(|_| wrong())?;
                    former.extend((word == "former").then(|| secret.id()));
                    secrets.push(secret);
                }
                "dropped" => dropped.push(value.parse().map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        let ids: BTreeSet<SecretId> = secrets.iter().map(Secret::id).collect();
        if secrets.is_empty() || ids.len() < secrets.len() {
            return Err("no secret, or the same secret twice".to_owned());
        }
        Ok(Self { secrets, former, dropped })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(seed: u8) -> Secret {
        Secret::new(vec![seed; 32]).expect("long enough")
    }

    #[test]
    fn secret_is_rotated_in_three_repeatable_steps() {
        let (old, new) = (secret(1), secret(2));
        let mut ring = Keyring::new(old.clone());
        assert!(ring.apply(&SecretOrder::Use(new.id())).is_err(), "not accepted yet");
        assert_eq!(ring.apply(&SecretOrder::Add(new.clone())), Ok(true));
        assert_eq!(ring.apply(&SecretOrder::Add(new.clone())), Ok(false), "repeated");
        assert_eq!(ring.in_use(), &old);
        assert!(ring.apply(&SecretOrder::Drop(old.id())).is_err(), "in use");
        assert_eq!(ring.apply(&SecretOrder::Use(new.id())), Ok(true));
        assert_eq!(ring.apply(&SecretOrder::Use(new.id())), Ok(false));
        assert_eq!(ring.ids(), [new.id(), old.id()]);
        assert_eq!(ring.apply(&SecretOrder::Drop(old.id())), Ok(true));
        assert_eq!(ring.apply(&SecretOrder::Drop(old.id())), Ok(false));
        assert!(ring.apply(&SecretOrder::Add(old.clone())).is_err(), "dropped");
        // A configured token with the old secret changes nothing; one with a new secret does.
        ring.adopt(&old);
        assert_eq!(ring.ids(), [new.id()]);
        ring.adopt(&secret(3));
        assert_eq!(ring.in_use(), &secret(3));
        // A node that missed the second step accepts the new secret and does not use it.
        let mut behind = Keyring::new(old.clone());
        behind.apply(&SecretOrder::Add(new.clone())).expect("added");
        behind.adopt(&new);
        assert_eq!(behind.in_use(), &new);
        behind.adopt(&old);
        assert_eq!(behind.in_use(), &new, "a token with a former secret is outdated");
        assert_eq!(behind.to_string().parse(), Ok(behind));
    }

    #[test]
    fn keyring_is_bounded_and_its_file_round_trips() {
        let mut ring = Keyring::new(secret(1));
        for seed in 2..=4 {
            assert_eq!(ring.apply(&SecretOrder::Add(secret(seed))), Ok(true));
        }
        assert!(ring.apply(&SecretOrder::Add(secret(5))).is_err());
        ring.apply(&SecretOrder::Drop(secret(2).id())).expect("dropped");
        assert_eq!(ring.to_string().parse(), Ok(ring.clone()));
        let line = "accept ".to_owned() + &BASE32_NOPAD.encode(&[1; 32]);
        for wrong in ["", "use", "use ME", "accept 1", "dropped x", &format!("{line}\n{line}\n")] {
            let error = wrong.parse::<Keyring>().expect_err(wrong);
            assert!(!error.contains("ME"), "{error}");
        }
        assert!(!format!("{ring:?}").contains(&BASE32_NOPAD.encode(secret(1).as_bytes())));
    }
}
