//! What the agent reads of its host besides its own entries: tables that are full, buffers that overflow,
//! limits, and other programs that undo repairs. Each module turns one of them into problems.

pub(super) mod conntrack;
pub(super) mod fragments;
pub(super) mod neighbor_tables;
pub(super) mod receive_buffer;
mod recent_loss;
pub(super) mod repair_conflicts;
