//! What the kernel shows of its tables.

use std::io;

use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST};

use super::{Kind, Nftables, Object, SUBSYSTEM, nfgenmsg};
use crate::netlink::{DUMP_TRIES, attributes::Attributes, send_all};

const ENOENT: i32 = 2;
/// As much is kept of what the kernel shows at once.
const MAX_DUMP: usize = 8 << 20;

impl Nftables {
    /// All objects that match, from one undisturbed pass; of a table that is not there, none. A host may have
    /// any number of rules of others: of more than 8 MiB the first are given.
    pub fn dump(&mut self, kind: Kind, family: u8, filter: &Attributes) -> io::Result<Vec<Object>> {
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(kind, family, filter)? {
                return Ok(found);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the tables of nftables change too fast"))
    }

    /// None if something changed meanwhile.
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
                        // The rest is read all the same: the kernel takes no other question before.
                        if size <= MAX_DUMP {
                            let (family, attributes) = (message.own[0], message.attributes);
                            found.push(Object { family, attributes });
                        }
                    }
                }
            }
        }
    }
}
