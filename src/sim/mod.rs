//! Many nodes in one thread under virtual time: the production core, unchanged, in a modelled world.
//!
//! Our hard bugs lie where gossip, ownership, disks and kernels meet, and only a world that models all
//! four under one clock and one seed reaches them in large numbers. QUIC is modelled, not run; nothing in
//! here reads a clock or draws luck that does not come from the seed.
//!
//! - [`world`]: the queue of events; `effects`: what nodes ask for, done; [`host`]: a machine; [`network`],
//!   [`disk`]: what surrounds a node (its kernel is [`crate::dataplane::fake`])
//! - [`oracle`]: the judge of safety at every event
//! - [`faults`]: what goes wrong in a run, drawn from the seed; `operator`: what people do; `liar`: what a
//!   member says that errs or lies
//! - [`rest`]: what must hold once all is calm
//! - [`run`]: one seed from start to verdict; [`campaign`]: many of them; [`figures`]: how fast

pub mod campaign;
pub mod disk;
mod effects;
pub mod faults;
pub mod figures;
pub mod host;
mod liar;
pub mod network;
mod operator;
pub mod oracle;
pub mod rest;
pub mod run;
#[cfg(test)]
mod tests;
pub mod world;
