//! Builds and runs the mutated copy of the simulator.

use std::{
    env, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, anyhow, bail};
use gossamer::sim::mutations::mutate;

/// Name of the program of the copy. With another name, it does not replace this program.
const PROGRAM: &str = "gossamer-mutations";

/// Copies the sources that this program was built from, mutates the copy, builds it, and runs its search.
///
/// # Errors
/// Fails if the sources are not there any more, a mutation does not apply to them, or they do not build.
pub fn run(limit: u64) -> anyhow::Result<ExitCode> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = target_directory()?;
    let copy = target.join("mutations");
    copy_project(sources, &copy).with_context(|| {
        format!("copying {} to {}: mutations need the sources", sources.display(), copy.display())
    })?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--locked", "--release", "--no-default-features"])
        .args(["--features", "sim", "--bin", PROGRAM])
        .current_dir(&copy)
        .env("CARGO_TARGET_DIR", &target)
        .env("GOSSAMER_MUTATED", "1")
        .status()
        .context("cargo")?;
    if !built.success() {
        bail!("the mutated sources in {} do not build: {built}", copy.display());
    }
    let program = target.join("release").join(PROGRAM);
    let run = Command::new(&program).args(["mutations", "--limit", &limit.to_string()]).status();
    let ended = run.with_context(|| program.display().to_string())?;
    Ok(if ended.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns cargo's target directory, two levels above this program.
fn target_directory() -> anyhow::Result<PathBuf> {
    let program = env::current_exe()?;
    let target = program.ancestors().nth(2);
    target.map(Path::to_owned).ok_or_else(|| anyhow!("{}: no parent", program.display()))
}

/// Copies the manifest and the sources with all mutations, and links to everything else.
fn copy_project(project: &Path, copy: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(copy)?;
    for entry in fs::read_dir(project)? {
        let entry = entry?;
        let name = entry.file_name();
        if ["Cargo.toml", "src", "target", ".git"].iter().any(|other| name == *other) {
            continue;
        }
        let link = copy.join(name);
        if fs::read_link(&link).ok() == Some(entry.path()) {
            continue;
        }
        // An earlier copy may have been one of other sources.
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => symlink(entry.path(), link)?,
        }
    }
    let manifest = fs::read_to_string(project.join("Cargo.toml"))?;
    let manifest = manifest.replace("\"gossamer-sim\"", &format!("{PROGRAM:?}"));
    update(&copy.join("Cargo.toml"), &manifest)?;
    copy_sources(&project.join("src"), Path::new(""), &copy.join("src"))
}

/// Copies the sources in one directory and below, mutated.
fn copy_sources(sources: &Path, below: &Path, copy: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(sources.join(below))? {
        let entry = entry?;
        let file = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_sources(sources, &file, copy)?;
            continue;
        }
        let to = copy.join(file.to_string_lossy().replace("gossamer-sim", PROGRAM));
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        let mut text = mutate(&file.to_string_lossy(), text).map_err(|why| anyhow!(why))?;
        if file == Path::new("lib.rs") {
            text.insert_str(0, "#![allow(warnings)]\n");
        }
        update(&to, &text)?;
    }
    Ok(())
}

/// Writes a file unless it has this text already, so that cargo builds only what has changed.
fn update(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, text)
}
