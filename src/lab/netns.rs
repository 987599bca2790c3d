//! Network namespaces with a name under `/run/netns`, where `ip netns` finds them too.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process::{Child, Command},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::netlink::{Netlink, in_thread, inside};

/// A network namespace; it lives as long as its name is mounted.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: File,
}

impl NetNs {
    /// Makes one, with its loopback interface up.
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

    /// Makes one that lives as long as this value: `name` is no file's. Needs no mounts.
    pub fn unnamed(name: &str) -> io::Result<Self> {
        let file = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            set_loopback_up()?;
            File::open("/proc/thread-self/ns/net")
        })?;
        Ok(Self { name: name.to_owned(), file })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs a function in a thread that is inside. Sockets it opens stay inside for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        inside(&self.file, work)
    }

    /// Starts a process inside.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }

    pub fn netlink(&self) -> io::Result<Netlink> {
        self.run(Netlink::open)
    }

    /// Sets `net/...` below /proc/sys.
    pub fn sysctl(&self, key: &str, value: &str) -> io::Result<()> {
        self.run(|| fs::write(PathBuf::from("/proc/sys").join(key), value))
    }
}

fn set_loopback_up() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    let index = netlink.index_of("lo")?;
    netlink.set_link(rtnetlink::LinkUnspec::new_with_index(index).up())
}
