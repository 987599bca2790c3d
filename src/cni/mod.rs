//! The CNI plugin, which a container runtime calls to connect a container (CNI SPEC.md 1.1.0).
//!
//! The plugin is this program, called with `CNI_COMMAND` in its environment. It reads the request, sends it
//! to the agent over the control socket, and prints the answer in the format of the runtime's version. The
//! agent does the work. If no agent answers, the plugin stores a request that ends a pod in the [`Spool`].
//! Called as `loopback`, the program sets up a pod's `lo` without the agent.

mod config;
mod error;
mod loopback;
mod netns;
mod plugin;
mod request;
mod result;
mod routes;
mod spool;

pub use netns::open as open_netns;
pub use plugin::{COMMAND, await_answer, connect, detach_first, disconnect, print_answer, run};
pub use request::LOOPBACK;
pub use spool::{Note, Spool};

/// Returns example configurations of a runtime, as seeds for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let config = serde_json::json!({
        "cniVersion": "1.1.0",
        "name": "pods",
        "type": "gossamer",
        "args": { "cni": { "ips": ["10.42.0.7"] } },
        "runtimeConfig": { "mac": "02:11:22:33:44:55", "ips": ["10.42.0.7/24"] },
        "dns": { "nameservers": ["10.43.0.10"], "search": ["cluster.local"] },
        "cni.dev/valid-attachments": [{ "containerID": "a", "ifname": "eth0" }],
        "prevResult": { "cniVersion": "1.1.0", "ips": [{ "address": "10.42.0.7/24" }] },
    });
    vec![
        config.to_string().into_bytes(),
        br#"{"cniVersion":"0.3.1","name":"pods","type":"x"}"#.to_vec(),
    ]
}

/// Parses the input as a configuration with each verb, for the fuzzer. Returns whether any verb accepts it.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(input: &[u8]) -> bool {
    let read = |verb: &str| {
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "a"),
            ("CNI_NETNS", "/run/netns/a"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.into()));
        request::CniRequest::parse("gossamer", &variables.into(), input).is_ok()
    };
    ["ADD", "DEL", "CHECK", "GC", "STATUS"].map(read).contains(&true)
}
