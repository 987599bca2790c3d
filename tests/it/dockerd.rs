//! A real dockerd on a host of the lab, with its own files.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use gossamer::lab::Host;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::common::{TIMEOUT, wait_until};

/// Debian's `busybox-static`.
pub const BUSYBOX: &str = "/usr/bin/busybox";
pub const DOCKERD: &str = "/usr/sbin/dockerd";

/// Creates a root directory that contains only busybox.
pub fn unpack_busybox(root: &Path) {
    let bin = root.join("bin");
    for directory in ["bin", "proc", "sys", "dev", "etc", "run", "tmp"] {
        fs::create_dir_all(root.join(directory)).expect("a directory");
    }
    let busybox = bin.join("busybox");
    fs::copy(BUSYBOX, &busybox).expect("busybox");
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)).expect("set");
    for applet in ["sh", "sleep", "ping", "httpd", "wget", "ip"] {
        symlink("busybox", bin.join(applet)).expect("a link");
    }
}

/// Imports an image that contains only busybox.
pub fn import(socket: &str, host: &Host, name: &str) {
    unpack_busybox(&host.dir.join("image"));
    let packed =
        Command::new("tar").arg("-C").arg(host.dir.join("image")).args(["-c", "."]).output();
    let mut docker = Command::new("docker");
    docker.args(["--host", socket, "import", "--change", "CMD [\"sleep\", \"600\"]", "-", name]);
    let mut child = docker.stdin(Stdio::piped()).spawn().expect("docker runs");
    let mut input = child.stdin.take().expect("a pipe");
    input.write_all(&packed.expect("tar runs").stdout).expect("written");
    drop(input);
    assert!(child.wait().expect("docker ends").success());
}

/// A dockerd on a host, with its own files. It is terminated when dropped.
pub struct Dockerd {
    child: Child,
    pub socket: String,
}

impl Dockerd {
    pub fn start(host: &Host, options: &str) -> Self {
        let dir = host.dir.join("docker");
        fs::create_dir_all(&dir).expect("a directory");
        let (dir, plugins) = (dir.display(), host.dir.join("plugins"));
        let socket = format!("unix://{dir}/docker.sock");
        // Docker looks for plugins at one fixed path, which has to differ between hosts.
        let script = format!(
            "mkdir -p /run/docker && mount -t tmpfs none /run/docker && mkdir /run/docker/plugins && \
             mount --bind {plugins} /run/docker/plugins && exec dockerd --host {socket} \
             --data-root {dir}/data --exec-root {dir}/exec --pidfile {dir}/pid \
             --storage-driver vfs {options}",
            plugins = plugins.display()
        );
        let file = host.dir.join("dockerd.log");
        let log = fs::File::options().append(true).create(true).open(file).expect("a log");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        command.stdout(log.try_clone().expect("a log")).stderr(log);
        let child = host.netns.spawn(&mut command).expect("dockerd starts");
        let this = Self { child, socket };
        wait_until("dockerd answers", TIMEOUT, || this.run("version").status.success());
        this
    }

    pub fn run(&self, arguments: &str) -> Output {
        let mut docker = Command::new("docker");
        docker.args(["--host", &self.socket]).args(arguments.split_whitespace());
        docker.output().expect("docker runs")
    }

    pub fn done(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(output.status.success(), "docker {arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Imports the image `box`, which contains only busybox.
    pub fn import(&self, host: &Host) {
        import(&self.socket, host, "box");
    }

    pub fn address(&self, container: &str) -> String {
        let format = "{{range.NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        self.done(&format!("inspect --format {format} {container}"))
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
