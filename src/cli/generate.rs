//! `gossamer man`: manual pages, generated from the definitions of the command line.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, CommandFactory as _};

use super::{Cli, fail, help::manual_sections};

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory for the pages
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes the manual pages.
pub fn man(args: &ManArgs) -> ExitCode {
    let directory = &args.directory;
    let command = super::help::hide_settings_of_arguments(Cli::command());
    let mut command = command.disable_help_subcommand(true);
    // Names the pages of subcommands.
    command.build();
    let mut written = 0;
    let made =
        fs::create_dir_all(directory).and_then(|()| write_pages(command, directory, &mut written));
    match made {
        Ok(()) => {
            eprintln!("{written} pages in {}", directory.display());
            ExitCode::SUCCESS
        }
        Err(error) => fail(format_args!("man: {}: {error}", directory.display())),
    }
}

/// Writes the page of a command and those of its subcommands.
fn write_pages(command: clap::Command, directory: &Path, written: &mut usize) -> io::Result<()> {
    for subcommand in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        write_pages(subcommand.clone(), directory, written)?;
    }
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let page = clap_mangen::Man::new(command);
    let mut text = Vec::new();
    page.render(&mut text)?;
    text.extend_from_slice(manual_sections(&name).as_bytes());
    fs::write(directory.join(page.get_filename()), text)?;
    *written += 1;
    Ok(())
}
