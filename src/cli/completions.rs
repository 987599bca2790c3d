//! `gossamer completions`: completion scripts, generated from the definition of the command line.
//!
//! The scripts complete the names of members by calling `gossamer members --names`.

use std::{io, process::ExitCode};

use clap::{Args, Command};
use clap_complete::Shell;

use super::help;

/// Argument of the commands that take a member.
const MEMBER: &str = "node";
/// Prints the names of the other members.
const NAMES: &str = "gossamer members --names 2>/dev/null";

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell to complete commands for
    shell: Shell,
}

/// Prints a completion script: `gossamer completions bash > /etc/bash_completion.d/gossamer`.
pub fn run(args: &CompletionsArgs) -> ExitCode {
    // A reader that closes the pipe has read all that it wants.
    let _ = io::Write::write_all(&mut io::stdout(), script(args.shell).as_bytes());
    ExitCode::SUCCESS
}

fn script(shell: Shell) -> String {
    let mut command = help::command();
    let mut generated = Vec::new();
    clap_complete::generate(shell, &mut command, "gossamer", &mut generated);
    let generated = String::from_utf8_lossy(&generated).into_owned();
    match shell {
        Shell::Bash => with_members_in_bash(&generated, &command),
        Shell::Zsh => with_members_in_zsh(&generated),
        Shell::Fish => generated + &members_in_fish(&command),
        _ => generated,
    }
}

/// Returns the commands that take a member.
fn commands_with_member(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|command| {
        command.get_arguments().any(|arg| arg.get_id() == MEMBER && arg.is_positional())
    })
}

/// Calls the generated function, and then replaces its result where a member is expected.
fn with_members_in_bash(generated: &str, command: &Command) -> String {
    let names: Vec<&str> = commands_with_member(command).map(Command::get_name).collect();
    let flags = commands_with_member(command).flat_map(Command::get_arguments);
    let flags = flags.filter(|arg| !arg.get_action().takes_values()).flat_map(|arg| {
        let long = arg.get_long().map(|long| format!("--{long}"));
        long.into_iter().chain(arg.get_short().map(|short| format!("-{short}")))
    });
    let flags: Vec<String> = flags.collect();
    let (names, flags) = (names.join("|"), flags.join(" "));
    let function = format!(
        r#"
_gossamer_with_members() {{
    _gossamer "$@"
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} names
    case ${{COMP_WORDS[1]}} in
        {names}) [[ $COMP_CWORD -gt 1 && $cur != -* ]] || return 0 ;;
        *) return 0 ;;
    esac
    # The previous word may be an option that has a value.
    [[ $prev != -* || " {flags} " == *" $prev "* ]] || return 0
    names=$(compgen -W "$({NAMES})" -- "$cur")
    [[ -z $names ]] || mapfile -t COMPREPLY <<<"$names"
}}

if [["#
    );
    let called = generated.replace("complete -F _gossamer ", "complete -F _gossamer_with_members ");
    called.replace("\nif [[", &function)
}

/// Replaces the default completion of the argument.
fn with_members_in_zsh(generated: &str) -> String {
    let is_member =
        |line: &str| line.trim_start_matches(['\'', ':']).starts_with(&format!("{MEMBER} -- "));
    let line = |line: &str| match is_member(line) {
        true => line.replace(":_default'", ":_gossamer_member_names'"),
        false => line.to_owned(),
    };
    let lines: Vec<String> = generated.lines().map(line).collect();
    let function = format!(
        r#"
_gossamer_member_names() {{
    local -a names; names=(${{(f)"$({NAMES})"}})
    compadd -a names
}}

if ["#
    );
    lines.join("\n").replace("\nif [", &function) + "\n"
}

fn members_in_fish(command: &Command) -> String {
    let line = |command: &Command| {
        let condition = format!("__fish_gossamer_using_subcommand {}", command.get_name());
        format!("complete -c gossamer -n \"{condition}\" -f -a \"({NAMES})\"\n")
    };
    commands_with_member(command).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_complete_members_of_each_command_that_takes_one() {
        let command = help::command();
        let names: Vec<&str> = commands_with_member(&command).map(Command::get_name).collect();
        assert_eq!(names, ["peers", "ping", "forget"]);
        let bash = script(Shell::Bash);
        assert!(bash.contains("        peers|ping|forget) "), "{bash}");
        assert_eq!(bash.matches("_gossamer_with_members()").count(), 1);
        assert_eq!(bash.matches("complete -F _gossamer_with_members ").count(), 2);
        let zsh = script(Shell::Zsh);
        assert_eq!(zsh.matches(":_gossamer_member_names'").count(), names.len());
        assert_eq!(zsh.matches("_gossamer_member_names()").count(), 1);
        assert_eq!(script(Shell::Fish).matches(NAMES).count(), names.len());
    }
}
