//! Integration tests: the real program on real kernels, in namespaces of their own.

// A test that cannot go on should say so at once.
#![allow(clippy::expect_used, clippy::panic)]

mod agreement;
mod browser;
mod cli;
mod cluster;
mod cni;
mod cni_chain;
mod cni_gone;
mod cni_pods;
mod cni_spec;
mod common;
mod compose;
mod dashboard;
mod demand;
mod docker;
mod dockerd;
mod docs;
mod doctor;
mod families;
mod firewall;
mod forwarding;
mod harm;
mod instances;
mod kubernetes;
mod limits;
mod metrics;
mod mishaps;
mod modes;
mod netavark;
mod offload;
mod overlap;
mod package;
mod paths;
mod podman;
mod pods;
mod prometheus;
mod refusals;
mod repair;
mod routing;
mod runtimes;
mod secret;
mod service;
mod tidy;
mod underlay;
