//! The secrets that a node accepts, the one it uses, and those it has done with.
//!
//! A cluster changes its secret in three steps, none of which costs a connection: all accept the new one too,
//! all use it, nobody accepts the old one any more. Nothing here knows how far the others are.

use std::{collections::BTreeSet, fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;

use super::{Secret, SecretId, SecretOrder};

/// Secrets that are accepted at once: each is one more authority to check a certificate against.
const MAX_SECRETS: usize = 4;
/// Secrets that are remembered as dropped.
const MAX_DROPPED: usize = 64;

/// Never empty; the first one is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyring {
    secrets: Vec<Secret>,
    /// Those of them that were in use before: an old token names one of these.
    former: BTreeSet<SecretId>,
    dropped: Vec<SecretId>,
}

impl Keyring {
    pub fn new(secret: Secret) -> Self {
        Self { secrets: vec![secret], former: BTreeSet::new(), dropped: Vec::new() }
    }

    pub fn in_use(&self) -> &Secret {
        &self.secrets[0]
    }

    /// All of them, the one in use first.
    pub fn accepted(&self) -> &[Secret] {
        &self.secrets
    }

    pub fn ids(&self) -> Vec<SecretId> {
        self.secrets.iter().map(Secret::id).collect()
    }

    pub fn knows(&self, id: SecretId) -> bool {
        self.secrets.iter().any(|secret| secret.id() == id)
    }

    pub fn has_dropped(&self, id: SecretId) -> bool {
        self.dropped.contains(&id)
    }

    /// Carries out a step; says whether that changed anything.
    ///
    /// # Errors
    /// One sentence, and nothing has changed.
    pub fn obey(&mut self, order: &SecretOrder) -> Result<bool, String> {
        match order {
            SecretOrder::Add(secret) => self.add(secret),
            SecretOrder::Use(id) => self.use_from_now_on(*id),
            SecretOrder::Drop(id) => self.drop_for_good(*id),
        }
    }

    /// Whether a token of this secret tells something new: it is not in use, and never was.
    pub fn is_news(&self, id: SecretId) -> bool {
        self.in_use().id() != id && !self.former.contains(&id) && !self.has_dropped(id)
    }

    /// An operator has brought a token of this secret: it is the one to use, unless it is an old one.
    pub fn bring(&mut self, secret: &Secret) {
        let id = secret.id();
        if !self.is_news(id) {
            return;
        }
        self.former.insert(self.in_use().id());
        self.secrets.retain(|known| known.id() != id);
        self.secrets.insert(0, secret.clone());
        self.secrets.truncate(MAX_SECRETS);
    }

    fn add(&mut self, secret: &Secret) -> Result<bool, String> {
        let id = secret.id();
        if self.knows(id) {
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

/// As it is kept: a line for each, what becomes of it and the secret in base32, or the name of one dropped.
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
            // The line itself is never repeated: it may hold a secret.
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
            return Err("it holds no secret, or one of them twice".to_owned());
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
    fn a_secret_is_changed_in_three_steps() {
        let (old, new) = (secret(1), secret(2));
        let mut ring = Keyring::new(old.clone());
        assert!(ring.obey(&SecretOrder::Use(new.id())).is_err(), "not known yet");
        assert_eq!(ring.obey(&SecretOrder::Add(new.clone())), Ok(true));
        assert_eq!(ring.obey(&SecretOrder::Add(new.clone())), Ok(false), "as often as one likes");
        assert_eq!(ring.in_use(), &old);
        assert!(ring.obey(&SecretOrder::Drop(old.id())).is_err(), "in use");
        assert_eq!(ring.obey(&SecretOrder::Use(new.id())), Ok(true));
        assert_eq!(ring.obey(&SecretOrder::Use(new.id())), Ok(false));
        assert_eq!(ring.ids(), [new.id(), old.id()]);
        assert_eq!(ring.obey(&SecretOrder::Drop(old.id())), Ok(true));
        assert_eq!(ring.obey(&SecretOrder::Drop(old.id())), Ok(false));
        assert!(ring.obey(&SecretOrder::Add(old.clone())).is_err(), "done with");
        // A configuration that still has the old token changes nothing; a new one is taken.
        ring.bring(&old);
        assert_eq!(ring.ids(), [new.id()]);
        ring.bring(&secret(3));
        assert_eq!(ring.in_use(), &secret(3));
        // One that was away since the first step knows the new one, and has not used it.
        let mut away = Keyring::new(old.clone());
        away.obey(&SecretOrder::Add(new.clone())).expect("added");
        away.bring(&new);
        assert_eq!(away.in_use(), &new);
        away.bring(&old);
        assert_eq!(away.in_use(), &new, "what was in use before is an old token");
        assert_eq!(away.to_string().parse(), Ok(away));
    }

    #[test]
    fn it_is_bounded_and_can_be_kept() {
        let mut ring = Keyring::new(secret(1));
        for seed in 2..=4 {
            assert_eq!(ring.obey(&SecretOrder::Add(secret(seed))), Ok(true));
        }
        assert!(ring.obey(&SecretOrder::Add(secret(5))).is_err());
        ring.obey(&SecretOrder::Drop(secret(2).id())).expect("dropped");
        assert_eq!(ring.to_string().parse(), Ok(ring.clone()));
        let line = "accept ".to_owned() + &BASE32_NOPAD.encode(&[1; 32]);
        for wrong in ["", "use", "use ME", "accept 1", "dropped x", &format!("{line}\n{line}\n")] {
            let error = wrong.parse::<Keyring>().expect_err(wrong);
            assert!(!error.contains("ME"), "{error}");
        }
        assert!(!format!("{ring:?}").contains(&BASE32_NOPAD.encode(secret(1).as_bytes())));
    }
}
