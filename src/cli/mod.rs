//! The command line: one file per subcommand, thin clients of the library and of the control socket.
//!
//! Exit codes: 0 done, 1 failed (one sentence on stderr says why and what to do), 2 wrong usage,
//! 3 the agent runs but has not converged.

mod agent;
mod cleanup;
mod cni;
mod demo;
mod docker_opts;
mod doctor;
mod events;
mod forget;
mod generate;
mod lab;
mod lease;
mod leases;
mod leave;
mod members;
mod output;
mod ping;
mod placed;
mod podman;
mod pods;
mod reset;
mod routes;
mod secret;
mod status;
mod token;
mod top;
mod version;

use std::{fmt::Display, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

use self::output::{Format, ask_and_print};
use crate::{api::block_on, config::Instance};

/// A VXLAN overlay for containers without etcd: hosts agree on subnets by gossip.
#[derive(Debug, Parser)]
#[command(name = "gossamer", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent on this host
    Agent(Box<agent::AgentArgs>),
    /// Show this node, its subnet and its peers
    Status(status::StatusArgs),
    /// List the members of the cluster
    Members(Client),
    /// List the subnets and who owns them
    Leases(leases::LeasesArgs),
    /// Show all that is known of one member
    Peers(members::PeersArgs),
    /// Show what this node wants in the kernel, beside what is there
    Routes(routes::RoutesArgs),
    /// Find out what is wrong with this host, with or without a running agent
    Doctor(Box<doctor::DoctorArgs>),
    /// Watch this node live, on a terminal
    Top(Client),
    /// Show what has happened at this node, and what happens
    Events(events::EventsArgs),
    /// Ask a member over the underlay, through the overlay and at its pods' gateway
    Ping(ping::PingArgs),
    /// List this node's pods and their addresses
    Pods(pods::PodsArgs),
    /// Install the CNI plugin for container runtimes, or remove it
    Cni(cni::CniArgs),
    /// Install the plugin by which Podman makes networks in the overlay, or remove it
    Podman(podman::PodmanArgs),
    /// Print how dockerd gives its own bridge this node's subnet
    DockerOpts(docker_opts::DockerOptsArgs),
    /// Look at the history of subnets
    Lease(lease::LeaseArgs),
    /// Print the token by which other hosts join
    Token(token::TokenArgs),
    /// Change the cluster's secret in three steps, while everybody goes on talking
    Secret(secret::SecretArgs),
    /// Leave the cluster for good: hand over the subnet and remove everything from this host
    Leave(Client),
    /// Remove a member that is gone for good, and reclaim its subnets
    Forget(forget::ForgetArgs),
    /// Make this host a new node of its cluster: the cure for a copied state directory
    ResetIdentity(reset::ResetArgs),
    /// Remove everything that gossamer has made on this host, whose agent does not run any more
    Cleanup(cleanup::CleanupArgs),
    /// See it work: a cluster on this machine in namespaces of its own, no set-up and no root needed
    Demo(demo::DemoArgs),
    /// Print the version of the program, and that of the agent that runs
    Version(Client),
    /// Print what a shell needs to complete these commands
    Completions(generate::CompletionsArgs),
    /// Write a manual page for each command
    Man(generate::ManArgs),
    /// Run a command in fresh user, mount, process and network namespaces
    #[command(hide = true)]
    Lab(lab::LabArgs),
}

/// What every client of the control socket takes.
#[derive(Debug, Args)]
struct Client {
    /// Name of the overlay, where this host has several
    #[arg(long, env = "GOSSAMER_INSTANCE", default_value_t, value_name = "NAME")]
    instance: Instance,
    /// The agent's control socket [default: /run/gossamer/gossamer.sock]
    #[arg(long, env = "GOSSAMER_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

impl Client {
    fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.instance.socket())
    }
}

/// Runs what was asked for.
pub fn run(cli: Cli) -> ExitCode {
    match cli.command {
        Command::Agent(args) => agent::run(*args),
        Command::Status(args) => status::status(&args),
        Command::Members(client) => members::members(&client),
        Command::Leases(args) => leases::run(&args),
        Command::Peers(args) => members::peers(&args),
        Command::Routes(args) => routes::run(&args),
        Command::Doctor(args) => doctor::run(*args),
        Command::Top(client) => top::run(&client),
        Command::Events(args) => events::run(&args),
        Command::Ping(args) => ping::run(&args),
        Command::Pods(args) => pods::run(&args),
        Command::Cni(args) => cni::run(&args),
        Command::Podman(args) => podman::run(&args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
        Command::DockerOpts(args) => docker_opts::run(&args),
        Command::Lease(args) => lease::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Secret(args) => secret::run(&args),
        Command::Leave(client) => leave::run(&client),
        Command::Forget(args) => forget::run(&args),
        Command::ResetIdentity(args) => reset::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Version(client) => version::run(&client),
        Command::Lab(args) => lab::run(&args),
    }
}

/// Says why a command failed, with all causes.
fn fail(error: impl Display) -> ExitCode {
    eprintln!("gossamer: {error:#}");
    ExitCode::FAILURE
}

/// A text as part of a query: every byte escaped, whatever it is.
fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
