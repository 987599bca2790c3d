//! What a bridge of pods must not learn from pods, and foreign interfaces with names like gossamer's.

use gossamer::lab::{Agent, NetNs};

use super::{advertise, wait_for_link_local};
use crate::{
    cni::Runtime,
    common::{Cluster, TIMEOUT, eventually, isolated, program, tool, wait_until},
};

/// Otherwise a pod could change where the bridge sends packets of other pods, by a frame to a link-local
/// group or a query of multicast listeners.
#[test]
fn changed_learning_snooping_or_spanning_tree_of_the_bridge_is_repaired() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _pod = NetNs::new("a")?;
        Runtime::new(&cluster.agents[0]).add("a");
        cluster.converge()?;
        let host = &cluster.hosts[0].netns;
        let is_closed = |shown: &str| {
            ["no_linklocal_learn 1", "mcast_snooping 0", "stp_state 0"]
                .iter()
                .all(|setting| shown.contains(setting))
        };
        let show = "ip -d link show gsm0";
        eventually(host, show, is_closed);
        for opened in ["no_linklocal_learn 0", "mcast_snooping 1", "stp_state 1"] {
            tool(host, &format!("ip link set gsm0 type bridge {opened}"));
            eventually(host, show, is_closed);
        }
        Ok(())
    });
}

/// Some modems have interfaces called `gsm0` and so on.
#[test]
fn foreign_interface_with_a_similar_name_accepts_router_advertisements() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let mut agent = Agent::start(program(), &host, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let rules = tool(&host.netns, "nft list chain inet gossamer.1 routers");
        assert!(rules.contains("nd-router-advert"), "{rules}");
        let router = NetNs::new("router")?;
        let netns = &host.netns;
        for command in
            ["ip link add gsm8 type veth peer name eth0 netns router", "ip link set gsm8 up"]
        {
            tool(netns, command);
        }
        netns.sysctl("net/ipv6/conf/gsm8/accept_ra", "2")?;
        tool(&router, "ip link set eth0 up");
        wait_for_link_local(&router, "eth0");
        let learned = || tool(netns, "ip -6 route show default").contains("dev gsm8");
        wait_until("the router is not accepted", TIMEOUT, || {
            advertise(&router).is_ok() && learned()
        });
        Ok(())
    });
}
