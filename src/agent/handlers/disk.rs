//! Reports of the thread that writes the database.

use crate::{
    agent::Agent,
    core::{Command, Input},
    store::WriteEvent,
};

impl Agent {
    /// Releases what waited for the disk, and records whether the disk can be written.
    pub(in crate::agent) fn on_write_event(&mut self, event: WriteEvent) {
        match event {
            WriteEvent::Durable(seq) => {
                // Not earlier: a token that names a cluster implies that the database contains it.
                self.save_token();
                for output in self.storage.gate.open(seq) {
                    self.execute(output);
                }
            }
            WriteEvent::Failing(why) => {
                tracing::error!(%why, "state directory not writable, nothing new is granted");
                self.storage.failure = Some(why);
            }
            WriteEvent::Recovered => {
                tracing::info!("state directory writable again");
                self.storage.failure = None;
            }
            WriteEvent::Emptied => {
                self.input(Input::Command(Command::SaveAll));
                self.save_pods();
            }
            WriteEvent::Saved(number) => self.on_saved(number),
        }
    }
}
