//! A kernel that is busy, a peer or Docker that is silent, and a pipe in the place of a namespace.

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

use super::{END, Scene, Tracer};
use crate::{
    cni::Runtime,
    common::{
        TIMEOUT, eventually, freeze, has_problem, isolated, program, skipped, thaw, tool,
        wait_until,
    },
};

/// The thread that programs the kernel hears this error for each request.
fn busy(agent: &Agent, error: &str) -> anyhow::Result<Tracer> {
    let thread = thread_of(agent, "kernel");
    Tracer::start(&["-p", &thread.to_string()], "sendto", error)
}

/// Ends the tracer that an agent was started with.
fn let_go(agent: &Agent) -> anyhow::Result<()> {
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
fn busy_kernel_at_each_time_delays_repairs_alone() {
    if !Tracer::is_there() {
        let name = "matrix::others::busy_kernel_at_each_time_delays_repairs_alone";
        return skipped(name, "no strace");
    }
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        for error in ["EBUSY", "ENOBUFS"] {
            // While it runs: a stray route of ours is to be removed.
            let tracer = busy(&scene.cluster.agents[0], error)?;
            let netns = &scene.cluster.hosts[0].netns;
            tool(netns, "ip route add unreachable 10.42.77.0/24 proto 73 metric 5");
            scene.is_named("netlink");
            scene.pods_talk("while the agent runs")?;
            drop(tracer);
            let netns = &scene.cluster.hosts[0].netns;
            eventually(netns, "ip route show 10.42.77.0/24", str::is_empty);
            scene.recovers()?;
            // While it stops.
            let tracer = busy(&scene.cluster.agents[0], error)?;
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
            scene.pods_talk("while the agent starts")?;
            // Its first answers fail as well.
            wait_until("no answer", TIMEOUT, || {
                scene.cluster.agents[0].ask("/v1/status", TIMEOUT).is_ok()
            });
            scene.recovers()?;
            // The write by which a handler tells of its signal would fail as well.
            let_go(&scene.cluster.agents[0])?;
            scene.ends()?;
            scene.starts()?;
            scene.recovers()?;
        }
        Ok(())
    });
}

#[test]
fn silent_peer_at_each_time_delays_what_is_asked_of_it_alone() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        let host = lab.host(3, "n3")?;
        freeze(&scene.cluster.agents[1])?;
        // A joiner that knows the silent one alone.
        let seed = scene.cluster.hosts[1].ip.to_string();
        let token = scene.cluster.token.clone();
        let start = || Agent::start(program(), &host, &["--join", &seed, "--token", &token]);
        let mut joiner = start()?;
        wait_until("not named", TIMEOUT, || has_problem(&mut joiner, &seed));
        let told = Instant::now();
        joiner.end(Signal::SIGTERM)?;
        assert!(told.elapsed() < END, "ending took {:?}", told.elapsed());
        let mut joiner = start()?;
        wait_until("not named", TIMEOUT, || has_problem(&mut joiner, &seed));
        // Its packets pass: the silence of an agent is no silence of its host.
        scene.pods_talk("while the agent runs")?;
        scene.ends()?;
        scene.starts()?;
        scene.cluster.agents[0].ask("/v1/status", TIMEOUT)?;
        scene.pods_talk("while the agent starts")?;
        thaw(&scene.cluster.agents[1])?;
        joiner.wait_converged(3, TIMEOUT)?;
        scene.cluster.converge_with(&mut joiner, 3)?;
        scene.pods_talk("after the fault")
    });
}

/// Calls ADD with a pipe in the place of a namespace; gives what came of it.
fn add_pipe(socket: PathBuf, pipe: String) -> thread::JoinHandle<bool> {
    thread::spawn(move || {
        let variables = [("CNI_NETNS", pipe.as_str())];
        Runtime::at(&socket).call_with("ADD", "pipe", &variables, &json!({})).0
    })
}

#[test]
fn pipe_in_the_place_of_a_namespace_at_each_time_is_refused_at_once() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        let pipe = scene.cluster.hosts[0].dir.join("pipe");
        mkfifo(&pipe, Mode::S_IRWXU)?;
        let pipe = pipe.display().to_string();
        let add =
            |scene: &Scene| add_pipe(scene.cluster.agents[0].socket().to_owned(), pipe.clone());
        assert!(!add(&scene).join().expect("no panic"), "a pipe is no namespace");
        scene.pods_talk("while the agent runs")?;
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

/// Clients of the plugin's socket that have sent half a request, or none, and read nothing.
fn hang_on(plugin: &PathBuf) -> Vec<UnixStream> {
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
fn docker_that_hangs_at_each_time_delays_nothing() {
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
            let clients = hang_on(&plugin);
            assert!(clients.len() > 100, "{}", clients.len());
            scene.recovers()?;
            scene.ends()?;
            drop(clients);
            scene.starts()?;
        }
        scene.recovers()
    });
}
