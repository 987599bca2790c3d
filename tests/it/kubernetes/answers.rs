//! What an agent makes of the API server's answers, and of their absence.

use std::{fs, time::Instant};

use gossamer::lab::{Agent, Host, Lab};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    api_server::{ApiServer, Mood, closed_port, variables},
    nodes,
};
use crate::{
    cni::{Runtime, address, namespaces},
    common::{
        TIMEOUT, client, gossamer_token, has_problem, isolated, program, status_where, tool,
        wait_until,
    },
};

/// An agent in a pod, with the API server at this port.
fn start(host: &Host, token: &str, port: u16) -> anyhow::Result<Agent> {
    let [address, port] = variables(port);
    let variables = [address, port, ("GOSSAMER_TOKEN", token.to_owned())];
    Ok(Agent::start_with(program(), host, &["--lease-source", "podcidr"], &variables)?)
}

/// Two nodes of one API server that have found each other.
fn pair(lab: &mut Lab) -> anyhow::Result<(ApiServer, Vec<Host>, String, [Agent; 2])> {
    let server = ApiServer::start()?;
    let hosts = nodes(lab, &server, 2)?;
    let token = gossamer_token()?;
    let mut agents =
        [start(&hosts[0], &token, server.port)?, start(&hosts[1], &token, server.port)?];
    for agent in &mut agents {
        agent.wait_converged(2, TIMEOUT)?;
    }
    Ok((server, hosts, token, agents))
}

fn is_waiting_for(status: &Value, why: &str) -> bool {
    let problem = status["problems"][0].as_str().unwrap_or_default();
    status["phase"] == "waiting"
        && problem.starts_with("waiting for Kubernetes: ")
        && problem.contains(why)
}

#[test]
fn agent_without_a_subnet_says_what_it_waits_for_and_ends_at_once_when_asked() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 1)?;
        let (host, token) = (&hosts[0], gossamer_token()?);
        let _space = namespaces(&["a"])?;
        for (mood, why) in [
            (Mood::Fails(403), "403 Forbidden: the test says no"),
            (Mood::Fails(500), "500 Internal Server Error"),
            (Mood::Silent, "no answer within 5s"),
        ] {
            server.answer(mood, Mood::Well);
            let mut agent = start(host, &token, server.port)?;
            status_where(&mut agent, |status| is_waiting_for(status, why));
            assert_eq!(client(&agent, &["status"]).status.code(), Some(3));
            let runtime = Runtime::new(&agent);
            let (code, said) = runtime.refused("STATUS", "a", &json!({}));
            assert!(code == 50 && said.contains("waiting for Kubernetes"), "{code} {said}");
            let (_, said) = runtime.refused("ADD", "a", &json!({}));
            assert!(said.contains(why), "{said}");
            // The end of a pod does not wait: it is noted.
            runtime.del("a");
            assert!(fs::read_dir(host.dir.join("gossamer.sock.pending"))?.next().is_some());
            let asked = Instant::now();
            assert!(agent.end(Signal::SIGTERM)?.success());
            assert!(asked.elapsed().as_secs() < 3, "{:?}", asked.elapsed());
        }
        // Neither a node that is not registered, nor one without a subnet. It goes on by itself.
        server.answer(Mood::Well, Mood::Well);
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
fn only_an_answer_about_the_node_keeps_it_from_its_last_subnet() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 1)?;
        let (host, token) = (&hosts[0], gossamer_token()?);
        let mut agent = start(host, &token, server.port)?;
        agent.wait_converged(1, TIMEOUT)?;
        let well = server.port;
        for (mood, port) in [
            (Mood::Well, closed_port()),
            (Mood::Fails(401), well),
            (Mood::Fails(403), well),
            (Mood::Fails(429), well),
            (Mood::Fails(503), well),
            (Mood::ProxyPage, well),
            (Mood::Mistaken, well),
            (Mood::Cut, well),
            (Mood::Silent, well),
        ] {
            agent.end(Signal::SIGTERM)?;
            server.answer(mood, Mood::Well);
            agent = start(host, &token, port)?;
            let status = status_where(&mut agent, |status| status["phase"] == "member");
            assert_eq!(status["subnet"], "10.42.0.0/24", "{mood:?}");
        }
        server.answer(Mood::Well, Mood::Well);
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
fn nodes_that_could_not_list_the_others_say_so_and_find_them_later() {
    isolated(|lab| {
        let server = ApiServer::start()?;
        let hosts = nodes(lab, &server, 2)?;
        let token = gossamer_token()?;
        for mood in [Mood::Fails(403), Mood::Silent] {
            server.answer(Mood::Well, mood);
            let mut agents =
                [start(&hosts[0], &token, server.port)?, start(&hosts[1], &token, server.port)?];
            let why = if mood == Mood::Silent { "no answer within 5s" } else { "403 Forbidden" };
            for agent in &mut agents {
                // It serves its pods all the same.
                let status = status_where(agent, |status| status["phase"] == "member");
                assert_eq!(status["converged"], false, "{status:#}");
                wait_until("the reason is not told", 2 * TIMEOUT, || {
                    has_problem(agent, "no other node is known") && has_problem(agent, why)
                });
                assert!(agent.log().contains("Kubernetes does not list the other nodes"));
            }
            server.answer(Mood::Well, Mood::Well);
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
fn node_that_is_registered_anew_with_another_subnet_moves_to_it() {
    isolated(|lab| {
        let (server, hosts, token, mut agents) = pair(lab)?;
        let spaces = namespaces(&["old", "new", "far"])?;
        Runtime::new(&agents[0]).add("old");
        let far = Runtime::new(&agents[1]).add("far");
        // The node's object is gone: that is said, and nothing else changes.
        server.delete("n1");
        wait_until("it is said that the node is not registered", 3 * TIMEOUT, || {
            has_problem(&mut agents[0], "this node continues with 10.42.0.0/24")
        });
        tool(&spaces[0], &format!("ping -c 1 -W 5 {}", address(&far)));
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.9.0/24"]);
        wait_until("it has moved", 3 * TIMEOUT, || {
            let routes = tool(&hosts[1].netns, "ip route");
            routes.contains("10.42.9.0/24") && !routes.contains("10.42.0.0/24")
        });
        let status = agents[0].wait_converged(2, TIMEOUT)?;
        assert_eq!(status["subnet"], "10.42.9.0/24");
        assert!(has_problem(&mut agents[0], "1 pods have addresses outside"), "{status:#}");
        let new = Runtime::new(&agents[0]).add("new");
        assert!(address(&new).starts_with("10.42.9."), "{new}");
        tool(&spaces[1], &format!("ping -c 1 -W 5 {}", address(&far)));
        // A cache that lags behind does not move it back.
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.0.0/24"]);
        server.freeze_cache();
        server.register("n1", &hosts[0].ip.to_string(), &["10.42.9.0/24"]);
        agents[0].end(Signal::SIGTERM)?;
        agents[0] = start(&hosts[0], &token, server.port)?;
        agents[0].wait_converged(2, TIMEOUT)?;
        let asked = server.count();
        wait_until("it was asked again", 2 * TIMEOUT, || server.count() > asked + 1);
        assert_eq!(agents[0].wait_converged(2, TIMEOUT)?["subnet"], "10.42.9.0/24");
        Ok(())
    });
}

/// While it runs, when it ends in the middle of a question, and when it starts.
#[test]
fn api_server_silent_at_each_time_cuts_no_pod_off_and_delays_no_end() {
    isolated(|lab| {
        let (server, hosts, token, mut agents) = pair(lab)?;
        let spaces = namespaces(&["here", "far", "new"])?;
        Runtime::new(&agents[0]).add("here");
        let far = address(&Runtime::new(&agents[1]).add("far"));
        let talks = || tool(&spaces[0], &format!("ping -c 1 -W 5 {far}"));
        server.answer(Mood::Silent, Mood::Silent);
        let before = server.count();
        wait_until("it was not asked", 3 * TIMEOUT, || server.count() > before);
        talks();
        Runtime::new(&agents[0]).add("new");
        Runtime::new(&agents[0]).del("new");
        let told = Instant::now();
        assert!(agents[0].end(Signal::SIGTERM)?.success());
        assert!(told.elapsed().as_secs() < 8, "ending took {:?}", told.elapsed());
        talks();
        agents[0] = start(&hosts[0], &token, server.port)?;
        let status = agents[0].wait_converged(2, 2 * TIMEOUT)?;
        assert_eq!(status["subnet"], "10.42.0.0/24", "its last subnet");
        talks();
        Runtime::new(&agents[0]).add("new");
        Ok(())
    });
}
