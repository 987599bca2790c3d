//! Dumps of tables.

use std::io;

use nix::libc::ENOENT;
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST};

use super::{Kind, Nftables, Object, SUBSYSTEM, nfgenmsg};
use crate::netlink::{MAX_DUMP_ATTEMPTS, attributes::Attributes, send_all};

/// Maximum size of a dump that is kept, in bytes.
const MAX_DUMP_BYTES: usize = 8 << 20;

impl Nftables {
    /// Returns all objects that match, from one consistent dump. Empty if the table does not exist. A host
    /// may have any number of foreign rules, so a dump of more than 8 MiB is truncated.
    ///
    /// # Errors
    /// If the kernel refuses or does not answer; `Interrupted` if the tables change too fast.
    pub fn dump(&mut self, kind: Kind, family: u8, filter: &Attributes) -> io::Result<Vec<Object>> {
        for _ in 0..MAX_DUMP_ATTEMPTS {
            if let Some(found) = self.dump_once(kind, family, filter)? {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the tables of nftables change too fast"))
    }

    /// Runs one dump. `None` if something changed during it.
    fn dump_once(
        &mut self,
        kind: Kind,
        family: u8,
        filter: &Attributes,
    ) -> io::Result<Option<Vec<Object>>> {
        let mut bytes = Vec::new();
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let kind = SUBSYSTEM << 8 | kind as u16;
        self.append(kind, flags, nfgenmsg(family, 0), filter, &mut bytes);
        let sequence = self.sequence;
        send_all(&self.socket, &bytes)?;
        let mut found = Vec::new();
        let mut interrupted = false;
        let mut size = 0;
        loop {
            for message in self.receive()?.into_iter().filter(|m| m.sequence == sequence) {
                interrupted |= message.interrupted;
                match (message.error, message.done) {
                    (Some(ENOENT), _) | (_, true) => return Ok((!interrupted).then_some(found)),
                    (Some(errno), _) => return Err(io::Error::from_raw_os_error(errno)),
                    (None, false) => {
                        size += message.attributes.len() + size_of::<Object>();
                        // The rest of the dump has to be received, because the kernel accepts no other
                        // request before.
                        if size <= MAX_DUMP_BYTES {
                            let (family, attributes) = (message.own[0], message.attributes);
                            found.push(Object { family, attributes });
                        }
                    }
                }
            }
        }
    }
}
