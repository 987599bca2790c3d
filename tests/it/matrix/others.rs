//! A busy kernel, a silent peer or Docker, and a pipe in place of a namespace.

use std::{
    fs,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::PathBuf,
    thread,
    time::Instant,
};

use gossamer::lab::Agent;
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::json;

use super::{STOP_TIMEOUT, Scene, Tracer};
use crate::{
    cni::Runtime,
    common::{
        TIMEOUT, eventually, has_problem, isolated, program, resume, skipped, suspend, tool,
        wait_until,
    },
};

/// Makes each request of the kernel thread fail with this error.
fn fail_kernel_requests(agent: &Agent, error: &str) -> anyhow::Result<Tracer> {
    let thread = thread_of(agent, "kernel");
    Tracer::start(&["-p", &thread.to_string()], "sendto", error)
}

/// Ends the tracer with which an agent was started.
fn detach_tracer(agent: &Agent) -> anyhow::Result<()> {
    let status = format!("/proc/{}/status", agent.pid());
    let tracer = || {
        let status = fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        line.and_then(|pid| pid.trim().parse::<i32>().ok()).filter(|pid| *pid > 0)
    };
    if let Some(pid) = tracer() {
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    }
    wait_until("it is still traced", TIMEOUT, || tracer().is_none());
    Ok(())
}

fn thread_of(agent: &Agent, name: &str) -> u32 {
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.pid())).expect("it runs");
    let is_it = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    let task = tasks.flatten().find(is_it).expect("a thread of this name");
    task.file_name().to_string_lossy().parse().expect("a number")
}

#[test]
fn busy_kernel_in_each_phase_delays_only_repairs() {
    if !Tracer::is_there() {
        let name = "matrix::others::busy_kernel_in_each_phase_delays_only_repairs";
        return skipped(name, "no strace");
    }
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        for error in ["EBUSY", "ENOBUFS"] {
            // While it runs: a stray route of gossamer's is to be removed.
            let tracer = fail_kernel_requests(&scene.cluster.agents[0], error)?;
            let netns = &scene.cluster.hosts[0].netns;
            tool(netns, "ip route add unreachable 10.42.77.0/24 proto 73 metric 5");
            scene.wait_reported("netlink");
            scene.assert_pods_connected("while the agent runs")?;
            drop(tracer);
            let netns = &scene.cluster.hosts[0].netns;
            eventually(netns, "ip route show 10.42.77.0/24", str::is_empty);
            scene.recovers()?;
            // While it stops.
            let tracer = fail_kernel_requests(&scene.cluster.agents[0], error)?;
            scene.ends()?;
            drop(tracer);
            // When it starts.
            let inject = format!("inject=sendto:error={error}:when=1..3");
            let traced = scene.cluster.hosts[0].dir.join("traced");
            fs::write(
                &traced,
                format!(
                    "#!/bin/sh\nexec strace -D -I 2 -f -qq -o /dev/null -e trace=sendto \
                     -e {inject} {} \"$@\"\n",
                    program().display()
                ),
            )?;
            fs::set_permissions(&traced, fs::Permissions::from_mode(0o755))?;
            let agent = Agent::start(&traced, &scene.cluster.hosts[0], &["--init"])?;
            scene.cluster.agents[0] = agent;
            scene.assert_pods_connected("while the agent starts")?;
            // Its first answers fail as well.
            wait_until("no answer", TIMEOUT, || {
                scene.cluster.agents[0].ask("/v1/status", TIMEOUT).is_ok()
            });
            scene.recovers()?;
            // Otherwise the signal handler's write would fail as well.
            detach_tracer(&scene.cluster.agents[0])?;
            scene.ends()?;
            scene.starts()?;
            scene.recovers()?;
        }
        Ok(())
    });
}

#[test]
fn silent_peer_in_each_phase_delays_only_requests_to_it() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        let host = lab.host(3, "n3")?;
        suspend(&scene.cluster.agents[1])?;
        // A joiner that knows only the silent peer.
        let seed = scene.cluster.hosts[1].ip.to_string();
        let token = scene.cluster.token.clone();
        let start = || Agent::start(program(), &host, &["--join", &seed, "--token", &token]);
        let mut joiner = start()?;
        wait_until("not reported", TIMEOUT, || has_problem(&mut joiner, &seed));
        let signaled = Instant::now();
        joiner.end(Signal::SIGTERM)?;
        assert!(signaled.elapsed() < STOP_TIMEOUT, "ending took {:?}", signaled.elapsed());
        let mut joiner = start()?;
        wait_until("not reported", TIMEOUT, || has_problem(&mut joiner, &seed));
        // Packets pass: an agent may be silent while its host is not.
        scene.assert_pods_connected("while the agent runs")?;
        scene.ends()?;
        scene.starts()?;
        scene.cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        scene.assert_pods_connected("while the agent starts")?;
        resume(&scene.cluster.agents[1])?;
        joiner.wait_converged(3, TIMEOUT)?;
        scene.cluster.converge_with(&mut joiner, 3)?;
        scene.assert_pods_connected("after the fault")
    });
}

/// Calls ADD with a pipe in place of a namespace. The thread returns whether it succeeded.
fn add_pipe(socket: PathBuf, pipe: String) -> thread::JoinHandle<bool> {
    thread::spawn(move || {
        let variables = [("CNI_NETNS", pipe.as_str())];
        Runtime::at(&socket).call_with("ADD", "pipe", &variables, &json!({})).0
    })
}

#[test]
fn pipe_in_place_of_a_namespace_in_each_phase_is_rejected_at_once() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        let pipe = scene.cluster.hosts[0].dir.join("pipe");
        mkfifo(&pipe, Mode::S_IRWXU)?;
        let pipe = pipe.display().to_string();
        let add =
            |scene: &Scene| add_pipe(scene.cluster.agents[0].socket().to_owned(), pipe.clone());
        assert!(!add(&scene).join().expect("no panic"), "a pipe is no namespace");
        scene.assert_pods_connected("while the agent runs")?;
        let adding = add(&scene);
        scene.ends()?;
        assert!(!adding.join().expect("no panic"));
        scene.starts()?;
        let adding = add(&scene);
        scene.recovers()?;
        assert!(!adding.join().expect("no panic"));
        scene.ends()
    });
}

/// Connects clients to the plugin's socket that send at most half a request, and read nothing.
fn connect_hanging_clients(plugin: &PathBuf) -> Vec<UnixStream> {
    let connect = |number: usize| {
        let mut stream = UnixStream::connect(plugin).ok()?;
        if number.is_multiple_of(2) {
            let head =
                "POST /IpamDriver.RequestPool HTTP/1.1\r\nHost: d\r\nContent-Length: 99\r\n\r\n{";
            stream.write_all(head.as_bytes()).ok()?;
        }
        Some(stream)
    };
    (0..200).filter_map(connect).collect()
}

#[test]
fn hanging_docker_in_each_phase_delays_nothing() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        let plugins = scene.cluster.hosts[0].dir.join("plugins");
        let arguments = ["--init", "--docker-plugin", plugins.to_str().expect("UTF-8")];
        let plugin = plugins.join("gossamer.sock");
        for _ in 0..2 {
            scene.ends()?;
            let host = &scene.cluster.hosts[0];
            scene.cluster.agents[0] = Agent::start(program(), host, &arguments)?;
            // From the first moment on.
            wait_until("no plugin", TIMEOUT, || UnixStream::connect(&plugin).is_ok());
            let clients = connect_hanging_clients(&plugin);
            assert!(clients.len() > 100, "{}", clients.len());
            scene.recovers()?;
            scene.ends()?;
            drop(clients);
            scene.starts()?;
        }
        scene.recovers()
    });
}
