//! The help: commands grouped by purpose, examples, and what manual pages say beyond that.

use std::fmt::Write as _;

use clap::{
    Arg, Command, CommandFactory as _, FromArgMatches as _,
    builder::{OsStr, Resettable},
};

use super::Cli;

/// Examples of a command: what each does, and the line to type.
type Examples = [(&'static str, &'static str); 2];

/// The visible commands by purpose, with examples.
const GROUPS: [(&str, &[(&str, Examples)]); 5] = [
    (
        "Set up",
        &[
            (
                "init",
                [
                    ("Create a cluster with the default network", "gossamer init"),
                    (
                        "Choose the network, and serve the dashboard",
                        "gossamer init --network 10.50.0.0/16 --http 127.0.0.1:9473",
                    ),
                ],
            ),
            (
                "join",
                [
                    ("Join with the token that a member printed", "gossamer join gsm1..."),
                    (
                        "Join with a token file, through two other members",
                        "gossamer join --token-file token 10.0.0.2 10.0.0.3",
                    ),
                ],
            ),
            (
                "agent",
                [
                    ("Run the agent with the settings that init wrote", "gossamer agent"),
                    (
                        "Create a cluster without a settings file",
                        "gossamer agent --init --set-sysctls --network 10.50.0.0/16",
                    ),
                ],
            ),
            (
                "uninstall",
                [
                    ("List what would be removed", "gossamer uninstall --dry-run"),
                    ("Remove everything without a question", "gossamer uninstall --yes"),
                ],
            ),
        ],
    ),
    (
        "See and diagnose",
        &[
            (
                "status",
                [
                    ("Show this host, problems first", "gossamer status"),
                    ("Wait until three members are alive", "gossamer status --wait --members 3"),
                ],
            ),
            (
                "doctor",
                [
                    ("Find what keeps pods from being reached", "gossamer doctor"),
                    ("Collect an archive for a report", "gossamer doctor --bundle report.tar.gz"),
                ],
            ),
            (
                "members",
                [
                    ("List the members", "gossamer members"),
                    ("Also those that have left, with ids", "gossamer members --all -o wide"),
                ],
            ),
            (
                "peers",
                [
                    ("List the other members", "gossamer peers"),
                    ("Show one member in detail", "gossamer peers host2"),
                ],
            ),
            (
                "ping",
                [
                    ("Probe a member's agent, kernel and pods", "gossamer ping host2"),
                    (
                        "Ten rounds, five a second, by address",
                        "gossamer ping 10.0.0.2 -c 10 -i 200ms",
                    ),
                ],
            ),
            (
                "leases",
                [
                    ("List the subnets and their owners", "gossamer leases"),
                    ("List how ownership has changed", "gossamer leases --history"),
                ],
            ),
            (
                "pods",
                [
                    ("List the pods of this host", "gossamer pods"),
                    ("Release addresses of containers that are gone", "gossamer pods --release"),
                ],
            ),
            (
                "routes",
                [
                    ("Compare the kernel with the desired state", "gossamer routes"),
                    ("Show only what differs", "gossamer routes --differences"),
                ],
            ),
            (
                "events",
                [
                    ("Show past events", "gossamer events"),
                    ("Follow new events as JSON", "gossamer events --follow -o json"),
                ],
            ),
            (
                "top",
                [
                    ("Watch this host; q ends it", "gossamer top"),
                    ("Watch another overlay of this host", "gossamer top --instance blue"),
                ],
            ),
            (
                "version",
                [
                    ("Show the versions of program and agent", "gossamer version"),
                    ("The same for a script", "gossamer version -o json"),
                ],
            ),
        ],
    ),
    (
        "Connect containers",
        &[
            (
                "cni",
                [
                    ("Install the CNI plugin for containerd and others", "gossamer cni install"),
                    (
                        "Copy it out of a container to the host",
                        "gossamer cni install --copy --bin-dir /host/bin",
                    ),
                ],
            ),
            (
                "podman",
                [
                    ("Install the network driver for Podman 5", "gossamer podman install"),
                    ("Remove it", "gossamer podman uninstall"),
                ],
            ),
            (
                "docker-opts",
                [
                    ("Print options for dockerd", "gossamer docker-opts"),
                    (
                        "Print them for /etc/docker/daemon.json of Docker 28",
                        "gossamer docker-opts --json --direct-routing",
                    ),
                ],
            ),
        ],
    ),
    (
        "Change the cluster",
        &[
            (
                "token",
                [
                    ("Print the command with which a host joins", "gossamer token"),
                    ("Write the token to a private file", "gossamer token --out token"),
                ],
            ),
            (
                "secret",
                [
                    ("List the secrets in use", "gossamer secret list"),
                    ("Begin to replace the secret", "gossamer secret add"),
                ],
            ),
            (
                "leave",
                [
                    ("Leave the cluster, after a question", "gossamer leave"),
                    ("Leave it in a script", "gossamer leave --yes"),
                ],
            ),
            (
                "forget",
                [
                    ("Remove a host that is gone for good", "gossamer forget host4"),
                    (
                        "Remove earlier identities of living hosts",
                        "gossamer forget --former-selves",
                    ),
                ],
            ),
            (
                "reset-identity",
                [
                    ("Make a copied host a new node", "gossamer reset-identity"),
                    (
                        "Before the agent's first start on the copy",
                        "gossamer reset-identity --state-dir /var/lib/gossamer --yes",
                    ),
                ],
            ),
            (
                "cleanup",
                [
                    ("List what a stopped agent has left", "gossamer cleanup --dry-run"),
                    ("Remove it without a question", "gossamer cleanup --yes"),
                ],
            ),
        ],
    ),
    (
        "Try out and generate",
        &[
            (
                "demo",
                [
                    ("A cluster of three hosts, checked step by step", "gossamer demo"),
                    ("Inject faults, and keep the cluster", "gossamer demo --chaos --keep"),
                ],
            ),
            (
                "completions",
                [
                    ("Completion for bash", "gossamer completions bash > gossamer.bash"),
                    ("Completion for zsh", "gossamer completions zsh > _gossamer"),
                ],
            ),
            (
                "man",
                [
                    ("Write all manual pages", "gossamer man man1"),
                    ("Install them", "gossamer man /usr/local/share/man/man1"),
                ],
            ),
        ],
    ),
];

/// Exit codes that commands have beside 0, 1 and 2.
const EXIT_CODES: [(&str, &str); 6] = [
    ("init", "3: the agent runs, but the host has no subnet yet."),
    ("join", "3: the agent runs, but no member has admitted this host yet."),
    (
        "status",
        "0: healthy. 1 also if degraded: there are problems. 3: not ready, or too few members are alive.",
    ),
    ("doctor", "0: healthy. 1 also if degraded: there are problems. 3: not ready, or not set up."),
    ("routes", "1 also if an entry differs."),
    ("ping", "1 also if no probe through the overlay was answered."),
];

/// Files of the program.
const FILES: [(&str, &str); 6] = [
    ("/etc/gossamer/gossamer.toml", "Settings of the agent."),
    ("/etc/gossamer/token", "The token with which this host joins."),
    ("/var/lib/gossamer", "Key and database of this node."),
    ("/run/gossamer/gossamer.sock", "The control socket of the agent."),
    ("/run/gossamer/subnet.env", "This host's subnet and MTU, in flannel's format."),
    (
        "/etc/cni/net.d/10-gossamer.conflist",
        "Network of CNI runtimes, written by gossamer cni install.",
    ),
];

/// Bold and underlined, as clap prints headings; stripped where the output is not a terminal.
const HEADING: &str = "\x1b[1m\x1b[4m";
const PLAIN: &str = "\x1b[0m";
const BOLD: &str = "\x1b[1m";

/// Parses the arguments of this process.
///
/// # Errors
/// The error, or the help if that was asked for.
pub fn parse() -> Result<Cli, clap::Error> {
    let matches = without_empty_variables(command()).try_get_matches()?;
    Cli::from_arg_matches(&matches)
}

/// Makes empty variables count as unset: a file of a set-up with containers can only empty them.
fn without_empty_variables(command: Command) -> Command {
    let is_empty = |argument: &Arg| {
        let value = argument.get_env().and_then(std::env::var_os);
        value.is_some_and(|value| value.is_empty())
    };
    let unset = move |argument: Arg| match is_empty(&argument) {
        true => argument.env(Resettable::<OsStr>::Reset),
        false => argument,
    };
    command.mut_args(unset).mut_subcommands(without_empty_variables)
}

/// Returns the command line with its help.
pub fn command() -> Command {
    let mut command = Cli::command();
    for (name, examples) in GROUPS.iter().flat_map(|(_, commands)| *commands) {
        let mut text = format!("{HEADING}Examples:{PLAIN}\n");
        for (what, line) in examples {
            let _ = writeln!(text, "  # {what}\n  {line}");
        }
        command =
            command.mut_subcommand(name, |command| command.after_help(text.trim_end().to_owned()));
    }
    let command = hide_settings_of_arguments(command);
    let list = commands_by_purpose(&command);
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{list}{HEADING}Options:{PLAIN}\n{{options}}\n\
         \n\
         `gossamer help COMMAND` explains a command, with examples."
    ))
}

/// Hides the options in the help of commands that set them by their name or arguments.
pub fn hide_settings_of_arguments(command: Command) -> Command {
    let hide = |command: Command| {
        let ids = ["init", "join", "token"];
        ids.iter().fold(command, |command, id| command.mut_arg(id, |option| option.hide(true)))
    };
    command.mut_subcommand("init", hide).mut_subcommand("join", hide)
}

fn commands_by_purpose(command: &Command) -> String {
    let names = GROUPS.iter().flat_map(|(_, commands)| commands.iter().map(|(name, _)| name.len()));
    let width = names.max().unwrap_or(0);
    let mut list = String::new();
    for (purpose, commands) in GROUPS {
        let _ = writeln!(list, "{HEADING}{purpose}:{PLAIN}");
        for (name, _) in commands {
            let about = command.find_subcommand(name).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(list, "  {BOLD}{name:<width$}{PLAIN}  {about}");
        }
        list.push('\n');
    }
    list
}

/// Returns the sections that a manual page has beyond the help, in roff. `name` is the command as its
/// page is called, such as `gossamer-cni-install`.
pub fn manual_sections(name: &str) -> String {
    let top = name.split('-').nth(1).unwrap_or_default();
    let commands = GROUPS.iter().flat_map(|(_, commands)| *commands);
    let is_named = |command: &str| name == format!("gossamer-{command}");
    let mut page = String::new();
    if let Some((_, examples)) = commands.clone().find(|(command, _)| is_named(command)) {
        page.push_str(".SH EXAMPLES\n");
        for (what, line) in examples {
            let _ = writeln!(page, "{}:\n.PP\n.RS 4\n\\fB{}\\fR\n.RE\n.PP", roff(what), roff(line));
        }
    }
    page.push_str(
        ".SH \"EXIT STATUS\"\n0: success. 1: failure; standard error has the reason and a remedy. 2: \
         wrong usage.\n",
    );
    if let Some((_, codes)) = EXIT_CODES.iter().find(|(command, _)| is_named(command)) {
        let _ = writeln!(page, "{}", roff(codes));
    }
    page.push_str(".SH FILES\n");
    for (file, what) in FILES {
        let _ = writeln!(page, ".TP\n{}\n{}", roff(file), roff(what));
    }
    page.push_str(".SH \"SEE ALSO\"\n");
    let pages = match top {
        "" => commands.map(|(command, _)| format!("gossamer-{command}")).collect(),
        _ => vec!["gossamer".to_owned(), "gossamer-doctor".to_owned()],
    };
    let pages: Vec<String> = pages
        .iter()
        .filter(|page| *page != name)
        .map(|page| format!("\\fB{}\\fR(1)", roff(page)))
        .collect();
    let _ = writeln!(page, "{}", pages.join(", "));
    page
}

/// Escapes a line for roff.
fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn each_visible_command_is_in_one_group() {
        let mut grouped: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, commands)| commands.iter().map(|(name, _)| *name))
            .collect();
        grouped.sort_unstable();
        let command = Cli::command();
        let visible = command.get_subcommands().filter(|command| !command.is_hide_set());
        let mut visible: Vec<&str> = visible.map(Command::get_name).collect();
        visible.sort_unstable();
        assert_eq!(grouped, visible);
    }

    #[test]
    fn each_example_is_accepted() {
        for (name, examples) in GROUPS.iter().flat_map(|(_, commands)| *commands) {
            for (_, line) in examples {
                let words = line.split(" > ").next().unwrap_or_default().split(' ');
                assert!(Cli::try_parse_from(words).is_ok(), "{line}");
                assert!(line.starts_with(&format!("gossamer {name}")), "{line}");
            }
        }
    }

    #[test]
    fn help_of_init_and_join_lists_only_what_they_take() {
        for name in ["init", "join"] {
            let mut command = command();
            let command = command.find_subcommand_mut(name).expect("a command");
            let help = command.render_long_help().to_string();
            for option in ["--init", "--join", "--token "] {
                assert!(!help.contains(option), "{option}: {help}");
            }
            assert!(help.contains("--token-file") && help.contains("--network"), "{help}");
        }
    }

    #[test]
    fn help_lists_all_commands_by_purpose_within_100_columns() {
        let help = command().render_help().to_string();
        for (purpose, commands) in GROUPS {
            assert!(help.contains(&format!("{purpose}:")), "{help}");
            for (name, _) in commands {
                assert!(
                    help.contains(&format!("  {name}  ")) || help.contains(&format!("  {name} "))
                );
            }
        }
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    }

    #[test]
    fn manual_sections_have_examples_exit_codes_and_files() {
        let page = manual_sections("gossamer-status");
        for part in
            [".SH EXAMPLES", "\\-\\-wait", ".SH \"EXIT STATUS\"", "3: not ready", ".SH FILES"]
        {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!manual_sections("gossamer-cni-install").contains("EXAMPLES"));
    }
}
