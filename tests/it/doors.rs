//! Ports and paths that another program has taken before the agent starts.

use std::{fs, net::TcpListener};

use gossamer::lab::Agent;

use crate::common::{TIMEOUT, has_problem, isolated, program, run, status_where, wait_until};

const ADDRESS: &str = "127.0.0.1:9473";

#[test]
fn http_port_that_is_taken_ends_no_start_and_is_served_once_it_is_free() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let squatter = host.netns.run(|| TcpListener::bind(ADDRESS))?;
        let mut agent = Agent::start(program(), &host, &["--init", "--http", ADDRESS])?;
        agent.wait_converged(1, TIMEOUT)?;
        assert!(has_problem(&mut agent, "http: 127.0.0.1:9473: Address already in use"));
        drop(squatter);
        let served = || run(&host.netns, &format!("curl -sf http://{ADDRESS}/healthz"));
        wait_until("it is not served", TIMEOUT, || served().status.success());
        status_where(&mut agent, |status| !status["problems"].to_string().contains("http:"));
        assert!(agent.log().contains("listener opened"), "{}", agent.log());
        Ok(())
    });
}

#[test]
fn docker_socket_that_cannot_be_made_ends_no_start_and_is_made_once_it_can_be() {
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
        wait_until("it is not made", TIMEOUT, || socket.exists());
        status_where(&mut agent, |status| !status["problems"].to_string().contains("docker"));
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        assert!(!socket.exists());
        Ok(())
    });
}

#[test]
fn control_socket_that_was_removed_is_made_again() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let socket = agent.socket().to_owned();
        let option = format!("--socket={}", socket.display());
        fs::remove_file(&socket)?;
        let asked = || run(&host.netns, &format!("{} status {option}", program().display()));
        wait_until("it is not made again", TIMEOUT, || asked().status.success());
        assert!(agent.log().contains("control socket created again"), "{}", agent.log());
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        assert!(!socket.exists());
        Ok(())
    });
}
