//! The state directory and the two small files in it.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;

use super::StoreError;
use crate::wire::Token;

/// A directory that only its owner can enter.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Makes the directory, or closes an existing one to others.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |error| StoreError::Directory { path: path.to_owned(), error };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fail)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(fail)?;
        Ok(Self { path: path.to_owned() })
    }

    pub fn database(&self) -> PathBuf {
        self.path.join("db")
    }

    /// The seed of the node's key, if it has one.
    pub fn node_key(&self) -> Result<Option<[u8; 32]>, StoreError> {
        let path = self.path.join("node.key");
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        let seed = HEXLOWER.decode(text.trim().as_bytes()).ok().and_then(|b| b.try_into().ok());
        seed.map(Some).ok_or(StoreError::Key { path })
    }

    pub fn save_node_key(&self, seed: &[u8; 32]) -> Result<(), StoreError> {
        self.save("node.key", &format!("{}\n", HEXLOWER.encode(seed)))
    }

    /// The token that this node entered its cluster with.
    pub fn token(&self) -> Result<Option<Token>, StoreError> {
        let path = self.path.join("token");
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        text.parse().map(Some).map_err(|error| StoreError::Token { path, error })
    }

    pub fn save_token(&self, token: &Token) -> Result<(), StoreError> {
        self.save("token", &format!("{token}\n"))
    }

    /// Forgets everything: the next start is that of a new node.
    pub fn wipe(&self) -> Result<(), StoreError> {
        for name in ["node.key", "token"] {
            let path = self.path.join(name);
            gone_is_fine(fs::remove_file(&path))
                .map_err(|error| StoreError::Directory { path, error })?;
        }
        let path = self.database();
        gone_is_fine(fs::remove_dir_all(&path))
            .map_err(|error| StoreError::Directory { path, error })
    }

    /// Replaces a file so that a crash leaves either the old or the new one.
    fn save(&self, name: &str, text: &str) -> Result<(), StoreError> {
        let path = self.path.join(name);
        let written = || {
            let temporary = self.path.join(format!("{name}.new"));
            gone_is_fine(fs::remove_file(&temporary))?;
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            fs::File::open(&self.path)?.sync_all()
        };
        written().map_err(|error| StoreError::Directory { path: path.clone(), error })
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, StoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::Directory { path: path.to_owned(), error }),
    }
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
