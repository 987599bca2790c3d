//! Network namespaces. Named ones are mounted below `/run/netns`, where `ip netns` finds them.

use std::{
    fs::File,
    io,
    path::PathBuf,
    process::{Child, Command},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{
    netlink::{Netlink, in_thread, inside},
    sysctl,
};

/// A network namespace. A named one exists until its name is unmounted.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: File,
}

impl NetNs {
    /// Creates a named namespace with its loopback interface up.
    ///
    /// # Errors
    /// Fails if the kernel refuses, or if the name cannot be mounted.
    pub fn new(name: &str) -> io::Result<Self> {
        let path = PathBuf::from("/run/netns").join(name);
        File::create(&path)?;
        let mounted = path.clone();
        in_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let none: Option<&str> = None;
            mount(Some("/proc/thread-self/ns/net"), &mounted, none, MsFlags::MS_BIND, none)?;
            set_loopback_up()
        })?;
        Ok(Self { name: name.to_owned(), file: File::open(path)? })
    }

    /// Creates a namespace that exists as long as this value. `name` is only a label; nothing is mounted.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn unnamed(name: &str) -> io::Result<Self> {
        let file = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            set_loopback_up()?;
            File::open("/proc/thread-self/ns/net")
        })?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the open namespace file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs a function in a thread inside the namespace. Sockets that it opens stay in the namespace.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or with the function's error.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&self.file, work)
    }

    /// Starts a process inside the namespace.
    ///
    /// # Errors
    /// Fails if the process cannot be started.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }

    /// Opens a netlink socket inside the namespace.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn netlink(&self) -> io::Result<Netlink> {
        self.run(Netlink::open)
    }

    /// Sets a sysctl; `key` is a path below /proc/sys that begins with `net/`.
    ///
    /// # Errors
    /// Fails if there is no such key, or if it does not accept the value.
    pub fn sysctl(&self, key: &str, value: &str) -> io::Result<()> {
        self.run(|| sysctl::write(key, value))
    }
}

fn set_loopback_up() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let index = netlink.index_of("lo")?;
    netlink.set_link(rtnetlink::LinkUnspec::new_with_index(index).up())
}
