//! Real machines: Debian's kernels and its systemd, in software emulation. docs/TESTING.md says how to run
//! these tests.

// A test that cannot go on should say so at once.
#![allow(clippy::expect_used, clippy::panic)]

mod common;
mod demo;
mod hostile;
mod hosts;
mod machine;
mod netem;
mod package;
mod pair;
mod power;
