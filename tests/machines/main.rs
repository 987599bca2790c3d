//! Real machines: Debian's kernels and its systemd, in software emulation. docs/TESTING.md describes how
//! to run these tests.

#![allow(clippy::too_many_lines, reason = "a test is one scenario")]
// A test that cannot continue should fail at once.
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
mod setup;
