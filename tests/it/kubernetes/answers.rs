//! The agent's reaction to answers of the API server, and to their absence.

use std::{fs, time::Instant};

use gossamer::lab::{Agent, Host, Lab};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    api_server::{ApiServer, Behavior, closed_port, variables},
    nodes,
};
use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        TIMEOUT, assert_logged, client, has_problem, isolated, new_token, program, status_where,
        tool, wait_until,
    },
};

/// Starts an agent as in a pod, with the API server at this port.
fn start(host: &Host, token: &str, port: u16) -> anyhow::Result<Agent> {
    let [address, port] = variables(port);
    let variables = [address, port, ("GOSSAMER_TOKEN", token.to_owned())];
    Ok(Agent::start_with(program(), host, &["--lease-source", "podcidr"], &variables)?)
}

/// Starts two nodes of one API server that have found each other.
fn pair(lab: &mut Lab) -> anyhow::Result<(ApiServer, Vec<Host>, String, [Agent; 2])> {
    let server = ApiServer::start()?;
    let hosts = nodes(lab, &server, 2)?;
    let token = new_token()?;
    let mut agents =
        [start(&hosts[0], &token, server.port)?, start(&hosts[1], &token, server.port)?];
    for agent in &mut agents {
        agent.wait_converged(2, TIMEOUT)?;
    }
    Ok((server, hosts, token, agents))
}

fn is_waiting_for(status: &Value, why: &str) -> bool {
    let problem = status["problems"][0]["what"].as_str().unwrap_or_default();
    status["phase"] == "waiting"
        && problem.starts_with("waiting for Kubernetes: ")
        && problem.contains(why)
}

#[test]
fn agent_without_a_subnet_reports_the_reason_and_ends_at_once_on_sigterm() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 1)?;
        let (host, token) = (&hosts[0], new_token()?);
        let _space = namespaces(&["a"])?;
        for (behavior, why) in [
            (Behavior::Fails(403), "403 Forbidden: the test says no"),
            (Behavior::Fails(500), "500 Internal Server Error"),
            (Behavior::Silent, "no answer within 5s"),
        ] {
            server.answer(behavior, Behavior::Well);
            let mut agent = start(host, &token, server.port)?;
            status_where(&mut agent, |status| is_waiting_for(status, why));
            assert_eq!(client(&agent, &["status"]).status.code(), Some(3));
            let runtime = Runtime::new(&agent);
            let (code, said) = runtime.refused("STATUS", "a", &json!({}));
            assert!(code == 50 && said.contains("waiting for Kubernetes"), "{code} {said}");
            let (_, said) = runtime.refused("ADD", "a", &json!({}));
            assert!(said.contains(why), "{said}");
            // The end of a pod does not wait for the agent: it is noted.
            runtime.del("a");
            assert!(fs::read_dir(host.dir.join("gossamer.sock.pending"))?.next().is_some());
            let asked = Instant::now();
            assert!(agent.end(Signal::SIGTERM)?.success());
            assert!(asked.elapsed().as_secs() < 3, "{:?}", asked.elapsed());
        }
        // Neither a node that is not registered, nor one without a subnet. The agent continues by itself.
        server.answer(Behavior::Well, Behavior::Well);
        server.delete("n1");
        let mut agent = start(host, &token, server.port)?;
        status_where(&mut agent, |status| is_waiting_for(status, "\"n1\" not found"));
        server.register("n1", &host.ip.to_string(), &[]);
        status_where(&mut agent, |status| is_waiting_for(status, "n1 has no spec.podCIDR yet"));
        server.register("n1", &host.ip.to_string(), &["10.43.0.0/24"]);
        status_where(&mut agent, |status| is_waiting_for(status, "set network to the cluster's"));
        server.register("n1", &host.ip.to_string(), &["10.42.7.0/24"]);
        let status = agent.wait_converged(1, TIMEOUT)?;
        assert_eq!(status["subnet"], "10.42.7.0/24");
        Ok(())
    });
}

#[test]
fn node_uses_its_last_subnet_unless_the_api_server_answers_about_it() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 1)?;
        let (host, token) = (&hosts[0], new_token()?);
        let mut agent = start(host, &token, server.port)?;
        agent.wait_converged(1, TIMEOUT)?;
        let well = server.port;
        for (behavior, port) in [
            (Behavior::Well, closed_port()),
            (Behavior::Fails(401), well),
            (Behavior::Fails(403), well),
            (Behavior::Fails(429), well),
            (Behavior::Fails(503), well),
            (Behavior::ProxyPage, well),
            (Behavior::Mistaken, well),
            (Behavior::Cut, well),
            (Behavior::Silent, well),
        ] {
            agent.end(Signal::SIGTERM)?;
            server.answer(behavior, Behavior::Well);
            agent = start(host, &token, port)?;
            let status = status_where(&mut agent, |status| status["phase"] == "member");
            assert_eq!(status["subnet"], "10.42.0.0/24", "{behavior:?}");
        }
        server.answer(Behavior::Well, Behavior::Well);
        for cidrs in [None, Some(&[][..])] {
            agent.end(Signal::SIGTERM)?;
            server.delete("n1");
            if let Some(cidrs) = cidrs {
                server.register("n1", &host.ip.to_string(), cidrs);
            }
            agent = start(host, &token, server.port)?;
            status_where(&mut agent, |status| is_waiting_for(status, "n1"));
        }
        Ok(())
    });
}

#[test]
fn nodes_that_cannot_list_other_nodes_report_it_and_find_them_later() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 2)?;
        let token = new_token()?;
        for behavior in [Behavior::Fails(403), Behavior::Silent] {
            server.answer(Behavior::Well, behavior);
            let mut agents =
                [start(&hosts[0], &token, server.port)?, start(&hosts[1], &token, server.port)?];
            let why =
                if behavior == Behavior::Silent { "no answer within 5s" } else { "403 Forbidden" };
            for agent in &mut agents {
                // It serves its pods in any case.
                let status = status_where(agent, |status| status["phase"] == "member");
                assert_eq!(status["converged"], false, "{status:#}");
                wait_until("the reason is not reported", 2 * TIMEOUT, || {
                    has_problem(agent, "no other node is known") && has_problem(agent, why)
                });
                assert_logged(agent, "Kubernetes does not list the other nodes");
            }
            server.answer(Behavior::Well, Behavior::Well);
            for agent in &mut agents {
                agent.wait_converged(2, 2 * TIMEOUT)?;
                assert!(!has_problem(agent, "no other node is known"));
            }
            for agent in &mut agents {
                agent.end(Signal::SIGTERM)?;
            }
            for host in &hosts {
                fs::remove_dir_all(host.dir.join("state"))?;
                tool(&host.netns, "ip link del gossamer.1");
            }
        }
        Ok(())
    });
}

#[test]
fn reregistered_node_moves_to_its_new_subnet() {
    isolated(|lab| {
        let (server, hosts, token, mut agents) = pair(lab)?;
        let spaces = namespaces(&["old", "new", "far"])?;
        Runtime::new(&agents[0]).add("old");
        let far = Runtime::new(&agents[1]).add("far");
        // The node's object is gone: this is reported, and nothing else changes.
        server.delete("n1");
        wait_until("it is not reported that the node is unregistered", 3 * TIMEOUT, || {
            has_problem(&mut agents[0], "this node continues with 10.42.0.0/24")
        });
        tool(&spaces[0], &format!("ping -c 1 -W 5 {}", address(&far)));
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.9.0/24"]);
        wait_until("it has not moved", 3 * TIMEOUT, || {
            let routes = tool(&hosts[1].netns, "ip route");
            routes.contains("10.42.9.0/24") && !routes.contains("10.42.0.0/24")
        });
        let status = agents[0].wait_converged(2, TIMEOUT)?;
        assert_eq!(status["subnet"], "10.42.9.0/24");
        assert!(has_problem(&mut agents[0], "1 pods have addresses outside"), "{status:#}");
        let new = Runtime::new(&agents[0]).add("new");
        assert!(address(&new).starts_with("10.42.9."), "{new}");
        tool(&spaces[1], &format!("ping -c 1 -W 5 {}", address(&far)));
        // A stale cache does not move it back.
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.0.0/24"]);
        server.freeze_cache();
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.9.0/24"]);
        agents[0].end(Signal::SIGTERM)?;
        agents[0] = start(&hosts[0], &token, server.port)?;
        agents[0].wait_converged(2, TIMEOUT)?;
        let asked = server.count();
        wait_until("it was not queried again", 2 * TIMEOUT, || server.count() > asked + 1);
        assert_eq!(agents[0].wait_converged(2, TIMEOUT)?["subnet"], "10.42.9.0/24");
        Ok(())
    });
}

/// While the agent runs, when it ends during a request, and when it starts.
#[test]
fn silent_api_server_disconnects_no_pod_and_delays_no_stop() {
    isolated(|lab| {
        let (server, hosts, token, mut agents) = pair(lab)?;
        let spaces = namespaces(&["here", "far", "new"])?;
        Runtime::new(&agents[0]).add("here");
        let far = address(&Runtime::new(&agents[1]).add("far"));
        let talks = || tool(&spaces[0], &format!("ping -c 1 -W 5 {far}"));
        server.answer(Behavior::Silent, Behavior::Silent);
        let before = server.count();
        wait_until("it was not asked", 3 * TIMEOUT, || server.count() > before);
        talks();
        Runtime::new(&agents[0]).add("new");
        Runtime::new(&agents[0]).del("new");
        let signaled = Instant::now();
        assert!(agents[0].end(Signal::SIGTERM)?.success());
        assert!(signaled.elapsed().as_secs() < 8, "ending took {:?}", signaled.elapsed());
        talks();
        agents[0] = start(&hosts[0], &token, server.port)?;
        let status = agents[0].wait_converged(2, 2 * TIMEOUT)?;
        assert_eq!(status["subnet"], "10.42.0.0/24", "its last subnet");
        talks();
        Runtime::new(&agents[0]).add("new");
        Ok(())
    });
}
