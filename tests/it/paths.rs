//! Whether packets get through is watched, and down is not dead.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::common::{
    Cluster, PATIENCE, client, eventually, has_problem, isolated, run, tool, wait_until,
};
use gossamer::lab::{Agent, Pinger};
use nix::sys::signal::Signal;

/// Time for a lost request to become a verdict: they are sent every 15 seconds while all is well.
const VERDICT: Duration = Duration::from_secs(30);

fn path(agent: &mut Agent, name: &str) -> String {
    let status = agent.ask("/v1/status", PATIENCE).expect("a status");
    let paths = status["paths"].as_array().expect("paths").clone();
    let path = paths.iter().find(|path| path["name"] == name);
    path.map(|path| path["state"].to_string()).unwrap_or_default()
}

#[test]
fn a_member_whose_agent_is_dead_loses_no_packet_for_as_long_as_its_kernel_lives() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(3, PATIENCE)?)?;
        let pod = cluster.hosts[1].pod(subnet, 1450)?;
        cluster.agents[1].end(Signal::SIGKILL)?;
        // Gossip calls it down meanwhile, and the patience is over.
        let mut pinger = Pinger::new(&cluster.hosts[0].netns)?;
        let answered = pinger.stream(pod.ip, 2_500, Duration::from_millis(10))?;
        assert_eq!(answered, 2_500, "packets were lost");
        let members = client(&cluster.agents[0], &["members"]);
        let members = String::from_utf8(members.stdout)?;
        let line = members.lines().find(|line| line.starts_with("n2 ")).expect("n2");
        assert!(line.contains("down") && line.contains(" ms"), "{members}");
        Ok(())
    });
}

#[test]
fn a_host_without_power_is_withdrawn_and_restored_when_it_is_back() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        let subnet = Agent::subnet(&cluster.agents[1].wait_converged(3, PATIENCE)?)?;
        let pod = cluster.hosts[1].pod(subnet, 1450)?;
        let host = &cluster.hosts[0].netns;
        let show = format!("ip route show proto 73 {subnet}");
        lab.set_cable(2, false)?;
        let begun = Instant::now();
        eventually(host, &show, |route| route.starts_with("unreachable"));
        println!("withdrawn after {:?}", begun.elapsed());
        assert!(path(&mut cluster.agents[0], "n2").contains("withdrawn"));
        let refused = run(host, &format!("ping -c 1 -W 5 {}", pod.ip));
        let said = String::from_utf8_lossy(&[refused.stdout, refused.stderr].concat()).into_owned();
        assert!(said.contains("No route to host") || said.contains("Unreachable"), "{said}");
        lab.set_cable(2, true)?;
        eventually(host, &show, |route| route.contains("via"));
        // Its own kernel may wait a second for another answer of the underlay's ARP.
        for netns in [host, &cluster.hosts[1].netns] {
            eventually(netns, "ip route show proto 73", |routes| {
                routes.matches(" via ").count() == 2 && routes.lines().count() == 2
            });
        }
        assert!(tool(host, &format!("ping -c 1 -W 2 {}", pod.ip)).contains(" 1 received"));
        Ok(())
    });
}

#[test]
fn a_blocked_tunnel_is_named_with_the_rule_that_is_missing() {
    isolated(|lab| {
        if Command::new("nft").arg("--version").output().is_err() {
            eprintln!("SKIPPED: blocking a port needs `nft` (Debian: nftables)");
            return Ok(());
        }
        let mut cluster = Cluster::start(lab, 2)?;
        let [here, there] = [0, 1].map(|n: usize| cluster.hosts[n].ip);
        wait_until("the path is not known", PATIENCE, || {
            path(&mut cluster.agents[0], "n2").contains("ok")
                && path(&mut cluster.agents[1], "n1").contains("ok")
        });
        let host = &cluster.hosts[1].netns;
        tool(host, "nft add table inet block");
        tool(host, "nft add chain inet block input { type filter hook input priority 0 ; }");
        tool(host, "nft add rule inet block input udp dport 8472 drop");
        let sentence = format!("allow UDP 8472 from {here} to {there}");
        wait_until("it is not named", VERDICT, || has_problem(&mut cluster.agents[0], &sentence));
        // The other one cannot hear the answers to its own requests.
        let sentence = format!("allow UDP 8472 from {there} to {here}");
        wait_until("it is not named", VERDICT, || has_problem(&mut cluster.agents[1], &sentence));
        tool(host, "nft delete table inet block");
        wait_until("it is still named", PATIENCE, || {
            !has_problem(&mut cluster.agents[0], "8472")
                && !has_problem(&mut cluster.agents[1], "8472")
        });
        Ok(())
    });
}

#[test]
fn a_path_that_is_narrower_than_the_underlay_is_named() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        // A bridge drops in silence what its port does not take.
        let host = lab.host(2, "n2")?;
        let narrow = Command::new("ip").args(["link", "set", "port2", "mtu", "1400"]).status()?;
        assert!(narrow.success());
        let _agent = cluster.start_agent(&host, &[])?;
        wait_until("it is not named", VERDICT, || {
            has_problem(&mut cluster.agents[0], "set a smaller mtu on all nodes")
        });
        assert!(path(&mut cluster.agents[0], "n2").contains("mtu-too-large"));
        Ok(())
    });
}

#[test]
fn answers_that_come_by_another_way_are_named() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let subnet = Agent::subnet(&cluster.agents[0].ask("/v1/status", PATIENCE)?)?;
        let (here, there) = (cluster.hosts[0].ip, &cluster.hosts[1].netns);
        tool(there, &format!("ip route add {}/32 via {here} dev eth0", subnet.network()));
        let said = "its answers come without";
        wait_until("it is not named", VERDICT, || has_problem(&mut cluster.agents[0], said));
        assert!(path(&mut cluster.agents[0], "n2").contains("asymmetric"));
        tool(there, &format!("ip route del {}/32", subnet.network()));
        wait_until("it is still named", VERDICT, || !has_problem(&mut cluster.agents[0], said));
        Ok(())
    });
}

#[test]
fn ping_shows_underlay_overlay_and_pod_path_side_by_side() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.pods()?;
        let ping = |agent: &Agent, node: &str| {
            let output = client(agent, &["ping", node, "-c", "2", "-i", "10ms"]);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            (output.status.code(), text + &String::from_utf8_lossy(&output.stderr))
        };
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!((code, said.matches(" ms").count()), (Some(0), 6), "{said}");
        assert!(said.contains("10.99.0.11:8473") && said.contains("2 of 2"), "{said}");

        let host = &cluster.hosts[0].netns;
        tool(host, "nft add table inet block");
        tool(host, "nft add chain inet block out { type filter hook output priority 0 ; }");
        tool(host, "nft add rule inet block out udp dport 8472 drop");
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!((code, said.matches("no answer").count()), (Some(1), 4), "{said}");
        assert!(said.contains("nothing comes through the tunnel"), "{said}");

        cluster.agents[1].end(Signal::SIGKILL)?;
        tool(host, "nft delete table inet block");
        let (code, said) = ping(&cluster.agents[0], "n2");
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("its kernel forwards all the same"), "{said}");
        let (code, said) = ping(&cluster.agents[0], "n9");
        assert_eq!(code, Some(1));
        assert!(said.contains("no member is called n9"), "{said}");
        Ok(())
    });
}
