//! Ports and paths that are occupied when the agent starts.

use std::{fs, net::TcpListener};

use gossamer::lab::Agent;

use crate::common::{
    TIMEOUT, assert_logged, has_problem, isolated, program, run, status_where, texts, wait_until,
};

const ADDRESS: &str = "127.0.0.1:9473";

#[test]
fn occupied_http_port_is_reported_and_served_once_free() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let squatter = host.netns.run(|| TcpListener::bind(ADDRESS))?;
        let mut agent = Agent::start(program(), &host, &["--init", "--http", ADDRESS])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert!(has_problem(&mut agent, "http: 127.0.0.1:9473: Address already in use"));
        drop(squatter);
        let served = || run(&host.netns, &format!("curl -sf http://{ADDRESS}/healthz"));
        wait_until("it is not served", TIMEOUT, || served().status.success());
        status_where(&mut agent, |status| !texts(&status["problems"]).contains("http:"));
        assert_logged(&agent, "listener opened");
        Ok(())
    });
}

#[test]
fn blocked_docker_socket_is_reported_and_created_once_possible() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let place = tempfile::tempdir()?;
        let obstacle = place.path().join("plugins");
        fs::write(&obstacle, "")?;
        let socket = obstacle.join("gossamer.sock");
        let plugin = format!("--docker-plugin={}", obstacle.display());
        let mut agent = Agent::start(program(), &host, &["--init", &plugin])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert!(has_problem(&mut agent, "Docker cannot reach this agent"));
        fs::remove_file(&obstacle)?;
        wait_until("it is not created", TIMEOUT, || socket.exists());
        status_where(&mut agent, |status| !texts(&status["problems"]).contains("docker"));
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        assert!(!socket.exists());
        Ok(())
    });
}

#[test]
fn removed_control_socket_is_created_again() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let socket = agent.socket().to_owned();
        let option = format!("--socket={}", socket.display());
        fs::remove_file(&socket)?;
        let asked = || run(&host.netns, &format!("{} status {option}", program().display()));
        wait_until("it is not created again", TIMEOUT, || asked().status.success());
        assert_logged(&agent, "control socket created again");
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        assert!(!socket.exists());
        Ok(())
    });
}
