//! A host whose sysctls the agent cannot set, as in a pod of Kubernetes.

use super::*;

#[test]
fn guard_with_read_only_sysctls_drops_router_advertisements_without_a_problem() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        disable_forwarding(&host);
        tool(&host.netns, "sysctl -qw net.ipv6.conf.default.forwarding=0");
        tool(&host.netns, "sysctl -qw net.ipv6.conf.default.accept_ra=1");
        let read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys";
        let wrapped = with_mounts(&host, read_only)?;
        // With anti-spoofing, pods could not send an advertisement at all.
        let loose = ["--init", "--anti-spoofing", "false"];
        let mut agent = Agent::start(&wrapped, &host, &loose)?;
        agent.wait_converged(1, TIMEOUT)?;
        let space = NetNs::new("pod1")?;
        let added = Runtime::new(&agent).add("pod1");
        let gateway = added["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        let default = |host: &Host| tool(&host.netns, "ip -6 route show default");
        let advertise_and_ping = || -> anyhow::Result<()> {
            advertise(&space)?;
            tool(&space, &format!("ping -c 1 -W 2 {gateway}"));
            Ok(())
        };
        wait_for_link_local(&space, "eth0");
        for interface in ["gsm0", "gossamer.1"] {
            let name = format!("net/ipv6/conf/{interface}/accept_ra");
            assert_eq!(sysctl(&host.netns, &name), "1", "{name}");
        }
        advertise_and_ping()?;
        assert_eq!(default(&host), "");
        assert_eq!(problems(&mut agent), "");
        // When another program removes the rules, they are re-created before anything else is checked.
        tool(&host.netns, "nft flush chain inet gossamer.1 routers");
        eventually(&host.netns, "nft list chain inet gossamer.1 routers", |shown| {
            shown.contains("nd-router-advert") && shown.contains("gsm*")
        });
        advertise_and_ping()?;
        assert_eq!(default(&host), "");

        // Without the guard the same advertisement is accepted, and the cause is reported.
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        let open = [&loose[..], &["--guard", "false"]].concat();
        agent = Agent::start(&wrapped, &host, &open)?;
        for name in ["gsm0.accept_ra", "gossamer/1.accept_redirects"] {
            status_where(&mut agent, |status| texts(&status["problems"]).contains(name));
        }
        advertise_and_ping()?;
        eventually(&host.netns, "ip -6 route show default", |shown| shown.contains("gsm0"));
        Ok(())
    });
}
