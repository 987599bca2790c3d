//! The agent's own pod for tests of forwarding.

use gossamer::lab::Agent;
use nix::sys::signal::Signal;

use crate::{
    cni::{Runtime, namespaces},
    common::{
        Cluster, TIMEOUT, has_problem, isolated, program, run, sh, status_where, tool,
        wait_until,
    },
    forwarding::{ADD_FORWARD_CHAIN, state, with_pods},
};

#[test]
fn agents_test_pod_keeps_its_address_in_a_full_subnet_and_is_removed_at_the_end() {
    isolated(|lab| {
        let first = lab.host(1, "n1")?;
        let small = ["--init", "--network", "10.42.0.0/24", "--subnet-len", "29"];
        let mut agent = Agent::start(program(), &first, &small)?;
        agent.wait_converged(1, TIMEOUT)?;
        let token = crate::common::token_of(&mut agent)?;
        let mut cluster = Cluster { hosts: vec![first], agents: vec![agent], token };
        cluster.join(lab, 2)?;
        cluster.converge()?;
        let mut spaces = Vec::new();
        with_pods(&mut cluster, &mut spaces)?;
        let own = |cluster: &Cluster| {
            tool(&cluster.hosts[1].netns, "ip -o link show type veth").contains("gsp.1")
        };
        assert!(own(&cluster));
        assert_eq!(crate::cni::pods(&mut cluster.agents[1]), 1, "the agent's pod is listed");
        // A /29 has four addresses for pods, one for the gateway and one for the agent's pod.
        let _more = namespaces(&["c", "d", "e", "f"])?;
        {
            let runtime = Runtime::new(&cluster.agents[1]);
            ["c", "d", "e"].iter().for_each(|name| _ = runtime.add(name));
            let (code, why) = runtime.refused("ADD", "f", &serde_json::json!({}));
            assert!(code == 100 && why.contains("all 4 addresses"), "{code} {why}");
        }
        sh(
            &cluster.hosts[1].netns,
            &format!("{ADD_FORWARD_CHAIN} && nft add rule inet wall f reject"),
        );
        wait_until("not reported", TIMEOUT, || {
            has_problem(&mut cluster.agents[1], "does not forward packets of pods")
        });
        sh(&cluster.hosts[1].netns, "nft delete table inet wall");
        status_where(&mut cluster.agents[1], |status| state(status) == "ok");
        // The agent's pod vanishes with a killed agent, and with one that leaves the cluster.
        cluster.agents[1].end(Signal::SIGKILL)?;
        wait_until("it is left behind", TIMEOUT, || !own(&cluster));
        cluster.agents[1] = cluster.start_agent(&cluster.hosts[1], &[])?;
        cluster.agents[1].wait_converged(2, TIMEOUT)?;
        wait_until("it is not restored", TIMEOUT, || own(&cluster));
        cluster.agents[1].leave()?;
        assert!(
            !own(&cluster) && !run(&cluster.hosts[1].netns, "ip link show gsm0").status.success()
        );
        Ok(())
    });
}
