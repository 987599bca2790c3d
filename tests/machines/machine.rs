//! Virtual machines: started, controlled over a serial line, killed.

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use data_encoding::BASE64;
use gossamer::lab::cpu_seconds;
use tempfile::TempDir;

use crate::common::{package, program};

/// A boot may take a minute when other processes use the CPU as well.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Time limit for short operations.
pub const SOON: Duration = Duration::from_secs(120);
/// All disks have this size in bytes, so that a snapshot fits any program on the disk.
const PARCEL_BYTES: u64 = 512 << 20;
const SNAPSHOT: &str = "booted";
/// Increase this when the devices of machines change, because a snapshot fits only one set of them.
const DEVICE_SET: u32 = 2;

/// Shared by all machines of a test: images, a network, and a temporary directory.
pub struct World {
    cache: PathBuf,
    dir: TempDir,
    parcel: Mutex<Option<u64>>,
    booting: Mutex<()>,
}

/// How a machine is started.
#[derive(Clone, Copy)]
pub struct Options<'a> {
    pub name: &'a str,
    /// The last octet of its address, 10.77.0.index.
    pub index: u8,
    pub kernel: &'a str,
    /// Without systemd.
    pub mini: bool,
    pub memory: u16,
    pub processors: u8,
}

impl<'a> Options<'a> {
    pub const fn mini(name: &'a str, index: u8) -> Self {
        Self { name, index, kernel: "6.1", mini: true, memory: 512, processors: 1 }
    }

    pub const fn systemd(name: &'a str, index: u8) -> Self {
        Self { name, index, kernel: "6.1", mini: false, memory: 512, processors: 1 }
    }
}

/// The output of a command, and its exit code.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub text: String,
}

/// A running machine. It is killed when dropped; its disk exists as long as the world.
pub struct Machine {
    name: String,
    dir: PathBuf,
    arguments: Vec<OsString>,
    child: Child,
    started: Instant,
    control: UnixStream,
    buffer: Vec<u8>,
    number: u32,
    parcel: u64,
}

impl World {
    pub fn new(cache: &Path) -> anyhow::Result<Self> {
        // Removes leftovers of a killed run; only one run exists at a time.
        for entry in fs::read_dir(cache)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with("run-") {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let dir = tempfile::Builder::new().prefix("run-").tempdir_in(cache)?;
        host("ip link add br0 type bridge && ip link set br0 up")?;
        Ok(Self { cache: cache.to_owned(), dir, parcel: Mutex::new(None), booting: Mutex::new(()) })
    }

    /// The last lines of each console.
    pub fn consoles(&self) -> String {
        let mut text = String::new();
        let Ok(entries) = fs::read_dir(self.dir.path()) else { return text };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|end| end == "serial" || end == "qemu") {
                let _ = write!(text, "--- {}\n{}\n", path.display(), tail(&path, 40));
            }
        }
        text
    }

    /// A disk with the program and the package, as a tar archive; how many bytes count.
    fn parcel(&self) -> anyhow::Result<(PathBuf, u64)> {
        let path = self.dir.path().join("parcel");
        let mut known = self.parcel.lock().expect("no panic while packing");
        if let Some(size) = *known {
            return Ok((path, size));
        }
        let files = self.dir.path().join("files");
        fs::create_dir_all(&files)?;
        fs::copy(program(), files.join("gossamer")).context("the program")?;
        // Without `strip` the file is only larger.
        let _ = Command::new("strip").arg(files.join("gossamer")).status();
        if let Some(package) = package().filter(|path| path.exists()) {
            fs::copy(package, files.join("gossamer.deb")).context("the package")?;
        }
        host(&format!("tar -cf {} -C {} .", path.display(), files.display()))?;
        fs::remove_dir_all(&files)?;
        let file = File::options().write(true).open(&path)?;
        let size = file.metadata()?.len();
        ensure!(size < PARCEL_BYTES, "the program is too large");
        file.set_len(PARCEL_BYTES)?;
        *known = Some(size);
        Ok((path, size))
    }

    /// Boots a machine with its own disk.
    pub fn start(&self, options: Options) -> anyhow::Result<Machine> {
        let disk = self.disk(options.name);
        let base = self.cache.join("base.img");
        let (base, disk) = (base.display(), disk.display());
        host(&format!("qemu-img create -q -f qcow2 -b {base} -F raw {disk}"))?;
        let mut machine = self.launch(options, &[])?;
        machine.wait_ready()?;
        Ok(machine)
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.qcow2"))
    }

    fn launch(&self, options: Options, more: &[&str]) -> anyhow::Result<Machine> {
        let Options { name, index, kernel, mini, memory, processors } = options;
        let dir = self.dir.path();
        let file = |end: &str| dir.join(format!("{name}.{end}")).display().to_string();
        let boot = self.cache.join("boot");
        let tap = format!("tap{index}");
        // The interface remains when the machine is killed.
        host(&format!(
            "ip link show {tap} >/dev/null 2>&1 || {{ ip tuntap add {tap} mode tap && \
             ip link set {tap} master br0 up; }}"
        ))?;
        let (parcel, size) = self.parcel()?;
        let init = if mini { "vmmini" } else { "systemd.getty_auto=no" };
        let line = format!(
            "console=ttyS0 root=/dev/vda rw quiet mitigations=off audit=0 apparmor=0 nokaslr tsc=reliable \
             random.trust_cpu=on net.ifnames=1 vmname={name} vmaddr=10.77.0.{index} {init}"
        );
        let arguments = [
            "-M",
            "q35",
            "-cpu",
            "max",
            "-accel",
            "tcg,thread=multi",
            "-smp",
            &processors.to_string(),
            "-m",
            &memory.to_string(),
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-name",
            name,
            "-kernel",
            &boot.join(format!("vmlinuz-{kernel}")).display().to_string(),
            "-initrd",
            &boot.join(format!("initrd-{kernel}")).display().to_string(),
            "-append",
            &line,
            "-drive",
            &format!("file={},if=none,id=d0,cache=none", file("qcow2")),
            "-device",
            "virtio-blk-pci,drive=d0",
            "-drive",
            &format!("file={},if=none,id=d1,format=raw,readonly=on", parcel.display()),
            "-device",
            "virtio-blk-pci,drive=d1",
            "-device",
            "virtio-serial-pci",
            "-chardev",
            &format!("socket,id=c0,path={},server=on,wait=off", file("ctl")),
            "-device",
            "virtserialport,chardev=c0,name=ctl",
            "-device",
            "virtio-rng-pci",
            "-netdev",
            &format!("tap,id=n0,ifname={tap},script=no,downscript=no"),
            "-device",
            &format!("virtio-net-pci,netdev=n0,mac=52:54:00:77:00:{index:02x},romfile="),
            "-chardev",
            &format!("file,id=c1,path={},append=on", file("serial")),
            "-serial",
            "chardev:c1",
            "-monitor",
            &format!("unix:{},server=on,wait=off", file("monitor")),
        ]
        .iter()
        .map(OsString::from)
        .collect::<Vec<_>>();
        Machine::launch(name, dir, arguments, more, size)
    }

    /// Starts a copy of a booted machine in a tenth of a boot's time. The first call creates the snapshot.
    pub fn copy_booted(&self, name: &str, index: u8) -> anyhow::Result<Machine> {
        let snapshot = self.snapshot()?;
        let disk = self.disk(name);
        host(&format!("cp --sparse=always {} {}", snapshot.display(), disk.display()))?;
        let options = Options::systemd(name, index);
        let mut machine = self.launch(options, &["-loadvm", SNAPSHOT])?;
        machine.connect()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
        // Gives the copy its own identity: clock, name, machine id, addresses.
        machine.ok(&format!(
            "set -e; date -s @{now:.3} >/dev/null
             D=$(ls /sys/class/net | grep -E '^(en|eth)')
             echo {name} > /etc/hostname; hostname {name}
             printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /etc/hosts
             rm -f /etc/machine-id; systemd-machine-id-setup >/dev/null 2>&1
             sed -i 's/^Address=.*/Address=10.77.0.{index}\\/24/' /etc/systemd/network/10-lan.network
             ip link set $D down; ip link set $D address 52:54:00:77:00:{index:02x}; ip addr flush dev $D
             networkctl reload; ip link set $D up; networkctl reconfigure $D
             /usr/lib/systemd/systemd-networkd-wait-online --timeout=60
             ip -4 addr show $D | grep -q 10.77.0.{index}/24"
        ))?;
        Ok(machine)
    }

    /// Returns the disk of a booted machine, with its memory.
    fn snapshot(&self) -> anyhow::Result<PathBuf> {
        let recipe = fs::read_to_string(self.cache.join("recipe"))?;
        let version = Command::new("qemu-system-x86_64").arg("--version").output()?.stdout;
        let version = String::from_utf8_lossy(&version);
        let version = version.split_whitespace().nth(3).unwrap_or("0").replace('/', "-");
        let path =
            self.cache.join(format!("snapshot-{}-{version}-{DEVICE_SET}.qcow2", recipe.trim()));
        let _one = self.booting.lock().expect("no panic while booting");
        if path.exists() {
            return Ok(path);
        }
        let mut machine = self.start(Options::systemd("snapshot", 250))?;
        machine.ok_within(
            "systemctl is-system-running --wait; sync; echo 3 > /proc/sys/vm/drop_caches",
            BOOT_TIMEOUT,
        )?;
        let said = machine.monitor(&format!("savevm {SNAPSHOT}"))?;
        ensure!(!said.contains("Error"), "{said}");
        crate::common::say(&format!("booted once for all with systemd: {}", machine.figures()));
        machine.kill()?;
        fs::rename(self.disk("snapshot"), &path)?;
        Ok(path)
    }
}

impl Machine {
    fn launch(
        name: &str,
        dir: &Path,
        arguments: Vec<OsString>,
        more: &[&str],
        parcel: u64,
    ) -> anyhow::Result<Self> {
        let _ = fs::remove_file(dir.join(format!("{name}.ctl")));
        let log =
            File::options().create(true).append(true).open(dir.join(format!("{name}.qemu")))?;
        let mut child = Command::new("nice")
            .args(["-n", "10", "qemu-system-x86_64"])
            .args(&arguments)
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let started = Instant::now();
        let control = loop {
            match UnixStream::connect(dir.join(format!("{name}.ctl"))) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < SOON && child.try_wait()?.is_none() => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => {
                    let _ = child.kill();
                    let said = tail(&dir.join(format!("{name}.qemu")), 20);
                    bail!("{name} does not start: {error}\n{said}");
                }
            }
        };
        Ok(Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            arguments,
            child,
            started,
            control,
            buffer: Vec::new(),
            number: 0,
            parcel,
        })
    }

    /// Waits until a machine that resumes from a snapshot answers.
    fn connect(&mut self) -> anyhow::Result<()> {
        self.ok("true").map(drop)
    }

    /// Waits until a booting machine accepts commands.
    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        self.read_until("\x1eREADY", BOOT_TIMEOUT).map(drop)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the time since the start, and the CPU time.
    pub fn figures(&self) -> String {
        let wall = self.started.elapsed().as_secs_f64();
        format!("{wall:.1} s ({:.1} CPU s)", cpu_seconds(self.child.id()))
    }

    /// Reads up to a line that starts with a mark. Returns the text before it, and the line.
    fn read_until(&mut self, mark: &str, patience: Duration) -> anyhow::Result<(String, String)> {
        let end = Instant::now() + patience;
        let find = |text: &[u8], word: &[u8]| text.windows(word.len()).position(|at| at == word);
        loop {
            if let Some(at) = find(&self.buffer, mark.as_bytes())
                && let Some(length) = find(&self.buffer[at..], b"\n")
            {
                let rest = self.buffer.split_off(at + length + 1);
                let text = std::mem::replace(&mut self.buffer, rest);
                let (before, line) = text.split_at(at);
                let utf8 = |bytes| String::from_utf8_lossy(bytes).into_owned();
                return Ok((utf8(before), utf8(line)));
            }
            let left = end.saturating_duration_since(Instant::now());
            let so_far = || {
                let text = String::from_utf8_lossy(&self.buffer);
                text.chars()
                    .rev()
                    .take(3000)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .collect::<String>()
            };
            if left.is_zero() {
                bail!("{} timed out after {patience:?}; so far:\n{}", self.name, so_far());
            }
            self.control.set_read_timeout(Some(left))?;
            let mut chunk = [0; 65536];
            match self.control.read(&mut chunk) {
                Ok(0) => bail!("{} has ended; so far:\n{}", self.name, so_far()),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Runs a shell script in the machine.
    pub fn run(&mut self, script: &str, patience: Duration) -> anyhow::Result<Answer> {
        self.number += 1;
        let line = format!("{} {}\n", self.number, BASE64.encode(script.as_bytes()));
        self.control.write_all(line.as_bytes())?;
        // Ignores late answers to earlier commands.
        let mark = format!("\x1eRC {} ", self.number);
        let (text, line) = self.read_until(&mark, patience).with_context(|| script.to_owned())?;
        let code = line.trim_start_matches(&mark).trim().parse()?;
        Ok(Answer { code, text })
    }

    /// As `run`, for a script that must succeed.
    pub fn ok_within(&mut self, script: &str, patience: Duration) -> anyhow::Result<String> {
        let answer = self.run(script, patience)?;
        let name = &self.name;
        ensure!(answer.code == 0, "{name}: {script}: exit code {}\n{}", answer.code, answer.text);
        Ok(answer.text)
    }

    pub fn ok(&mut self, script: &str) -> anyhow::Result<String> {
        self.ok_within(script, SOON)
    }

    /// Unpacks the program to /usr/local/bin, and the package beside it.
    pub fn take_parcel(&mut self) -> anyhow::Result<()> {
        let blocks = self.parcel.div_ceil(1 << 16);
        self.ok(&format!(
            "mkdir -p /parcel && \
             dd if=/dev/vdb bs=64K count={blocks} iflag=direct status=none | tar -x -C /parcel && \
             ln -sf /parcel/gossamer /usr/local/bin/gossamer"
        ))
        .map(drop)
    }

    /// Runs a command of qemu's monitor.
    pub fn monitor(&self, command: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(self.dir.join(format!("{}.monitor", self.name)))?;
        stream.set_read_timeout(Some(SOON))?;
        let until_prompt = |stream: &mut UnixStream| -> anyhow::Result<String> {
            let mut text = Vec::new();
            while !text.ends_with(b"(qemu) ") {
                let mut chunk = [0; 4096];
                match stream.read(&mut chunk)? {
                    0 => break,
                    count => text.extend_from_slice(&chunk[..count]),
                }
            }
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        until_prompt(&mut stream)?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        until_prompt(&mut stream)
    }

    /// Cuts the power.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Restores the power: the machine boots from its disk as it is.
    pub fn power_on(&mut self) -> anyhow::Result<()> {
        let _ = self.child.kill();
        self.child.wait()?;
        *self = Self::launch(
            &self.name.clone(),
            &self.dir.clone(),
            self.arguments.clone(),
            &[],
            self.parcel,
        )?;
        self.wait_ready()
    }

    /// Reboots the machine as an operator does, and waits until it accepts commands again. qemu ends
    /// instead of a reset, because a machine from a snapshot takes minutes to reboot by itself.
    pub fn reboot(&mut self) -> anyhow::Result<()> {
        // The answer may be lost during the shutdown.
        let line = format!("0 {}\n", BASE64.encode(b"systemctl --no-block reboot"));
        self.control.write_all(line.as_bytes())?;
        let start = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(start.elapsed() < BOOT_TIMEOUT, "{} does not go down", self.name);
            std::thread::sleep(Duration::from_millis(50));
        }
        self.power_on()
    }

    /// Returns the console output so far.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.join(format!("{}.serial", self.name))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a script on the machine that runs the tests, in the namespaces of this test.
fn host(script: &str) -> anyhow::Result<()> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {error}");
    Ok(())
}

fn tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
