//! The command line: one file per subcommand.
//!
//! Most subcommands are thin clients of the agent's control socket.
//!
//! Exit codes: 0, success; 1, failure, with the cause and a remedy on stderr; 2, wrong usage; 3, the
//! agent runs but has not converged.

mod agent;
mod cleanup;
mod cni;
mod completions;
mod confirm;
mod demo;
mod docker_opts;
mod doctor;
mod events;
mod forget;
mod generate;
mod help;
mod history;
mod lab;
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
mod running;
mod secret;
mod setup;
mod status;
mod token;
mod top;
mod version;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{
    Args, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};
use serde::de::DeserializeOwned;

pub use self::help::parse;
use self::output::{Format, query_and_print};
use crate::{
    api::{self, ClientError},
    config::{Instance, check_environment, example},
    runtime::block_on,
};

/// A VXLAN overlay for containers without etcd: hosts agree on subnets by gossip
#[derive(Debug, Parser)]
#[command(name = "gossamer", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set up this host as the first of a new cluster
    Init(Box<setup::InitArgs>),
    /// Set up this host as another member of a cluster
    Join(Box<setup::JoinArgs>),
    /// Leave the cluster, and remove everything except the program from this host
    Uninstall(setup::UninstallArgs),
    /// Run the agent on this host
    Agent(Box<agent::AgentArgs>),
    /// Show this node, its subnet and its peers
    Status(status::StatusArgs),
    /// List the members of the cluster
    Members(members::MembersArgs),
    /// List the subnets and their owners
    Leases(leases::LeasesArgs),
    /// Show everything known about one member
    Peers(members::PeersArgs),
    /// Compare the kernel entries that this node wants with those that exist
    Routes(routes::RoutesArgs),
    /// Diagnose this host, with or without a running agent
    Doctor(Box<doctor::DoctorArgs>),
    /// Show a live view of this node in the terminal
    Top(Control),
    /// Show recent events of this node, and follow new ones
    Events(events::EventsArgs),
    /// Ping a member over the underlay, through the overlay, and at its pods' gateway
    Ping(ping::PingArgs),
    /// List the pods of this node and their addresses
    Pods(pods::PodsArgs),
    /// Install or remove the CNI plugin for container runtimes
    Cni(cni::CniArgs),
    /// Install or remove the Podman network plugin
    Podman(podman::PodmanArgs),
    /// Print the dockerd options with which Docker's own bridge uses this node's subnet
    DockerOpts(docker_opts::DockerOptsArgs),
    /// Print the token with which other hosts join
    Token(token::TokenArgs),
    /// Replace the cluster's secret in three steps, without interrupting the cluster
    Secret(secret::SecretArgs),
    /// Leave the cluster for good, and remove gossamer's objects and state from this host
    Leave(leave::LeaveArgs),
    /// Remove a member that is gone for good, and reclaim its subnets
    Forget(forget::ForgetArgs),
    /// Make this host a new node of its cluster, for example after it was cloned
    ResetIdentity(reset::ResetArgs),
    /// Remove devices, routes, tables and state that a stopped agent left on this host
    Cleanup(cleanup::CleanupArgs),
    /// Run a demo cluster in private namespaces on this machine, without root
    Demo(demo::DemoArgs),
    /// Print the version of this program and of the running agent
    Version(Client),
    /// Generate a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Generate a manual page for each command
    Man(generate::ManArgs),
    /// Run a command in fresh user, mount, process and network namespaces
    #[command(hide = true)]
    Lab(lab::LabArgs),
}

/// Arguments of every command that queries the control socket.
#[derive(Debug, Args)]
struct Client {
    #[command(flatten)]
    control: Control,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

/// Where the control socket is.
#[derive(Debug, Args)]
struct Control {
    /// Name of the overlay, if this host has several
    #[arg(long, env = "GOSSAMER_INSTANCE", default_value_t, hide_default_value = true)]
    #[arg(value_name = "NAME")]
    instance: Instance,
    /// The agent's control socket [default: /run/gossamer/gossamer.sock]
    #[arg(long, env = "GOSSAMER_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
}

impl Client {
    fn socket(&self) -> PathBuf {
        self.control.socket()
    }
}

impl Control {
    fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.instance.socket())
    }
}

/// Time between two attempts to reach a socket that does not exist yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Queries an agent; waits for its socket, because the agent may have been started just now.
async fn get_once_started<T: DeserializeOwned>(
    socket: &Path,
    target: &str,
) -> Result<T, ClientError> {
    loop {
        match api::get_as(socket, target).await {
            // `NoAnswer`: the agent restarts its work, as after reset-identity.
            Err(ClientError::NoAgent { .. } | ClientError::NoAnswer(_)) => {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            answer => return answer,
        }
    }
}

/// Executes the parsed command and returns the exit code of the process.
pub fn run(cli: Cli) -> ExitCode {
    let changes_files = matches!(
        cli.command,
        Command::Init(_)
            | Command::Join(_)
            | Command::Uninstall(_)
            | Command::Agent(_)
            | Command::Cni(_)
            | Command::Podman(_)
            | Command::Cleanup(_)
    );
    if changes_files && let Err(why) = demo::refuse_changes_of_files() {
        return fail(why);
    }
    // The others report it themselves, or read no variable.
    let reads_variables = !matches!(
        cli.command,
        Command::Init(_)
            | Command::Join(_)
            | Command::Agent(_)
            | Command::Doctor(_)
            | Command::Completions(_)
            | Command::Man(_)
            | Command::Demo(_)
            | Command::Lab(_)
    );
    if reads_variables && let Err(error) = check_environment() {
        return fail(error);
    }
    match cli.command {
        Command::Init(args) => setup::init(*args),
        Command::Join(args) => setup::join(*args),
        Command::Uninstall(args) => setup::uninstall(&args),
        Command::Agent(args) => agent::run(*args),
        Command::Status(args) => status::status(&args),
        Command::Members(args) => members::members(&args),
        Command::Leases(args) => leases::run(&args),
        Command::Peers(args) => members::peers(&args),
        Command::Routes(args) => routes::run(&args),
        Command::Doctor(args) => doctor::run(*args),
        Command::Top(control) => top::run(&control),
        Command::Events(args) => events::run(&args),
        Command::Ping(args) => ping::run(&args),
        Command::Pods(args) => pods::run(&args),
        Command::Cni(args) => cni::run(&args),
        Command::Podman(args) => podman::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => generate::man(&args),
        Command::DockerOpts(args) => docker_opts::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Secret(args) => secret::run(&args),
        Command::Leave(args) => leave::run(&args),
        Command::Forget(args) => forget::run(&args),
        Command::ResetIdentity(args) => reset::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Version(client) => version::run(&client),
        Command::Lab(args) => lab::run(&args),
    }
}

/// Prints an error of the command line, with an example if the value of a setting is invalid.
pub fn usage_error(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.kind() == ErrorKind::ValueValidation
        && let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg)
    {
        // The argument is shown as "--network <CIDR>".
        let flag = argument.split_whitespace().next().unwrap_or_default();
        let example = example(&flag.trim_start_matches('-').replace('-', "_"));
        if let Some((_, value)) = example.and_then(|line| line.split_once(" = ")) {
            eprintln!("Example: {flag} {}", value.trim_matches(['[', ']']).replace('"', ""));
        }
    }
    ExitCode::from(error.exit_code().try_into().unwrap_or(2))
}

/// Prints an error with all its causes to stderr and returns exit code 1.
fn fail(error: impl Display) -> ExitCode {
    eprintln!("gossamer: {error:#}");
    ExitCode::FAILURE
}

/// Percent-encodes every byte of a query parameter.
fn percent_encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
