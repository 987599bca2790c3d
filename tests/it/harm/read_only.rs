//! A host whose sysctls the agent cannot set, as in a pod of Kubernetes.

use super::*;

#[test]
fn where_sysctls_are_read_only_the_guard_drops_what_would_give_routes_and_nothing_is_wrong() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        is_no_router(&host);
        tool(&host.netns, "sysctl -qw net.ipv6.conf.default.forwarding=0");
        tool(&host.netns, "sysctl -qw net.ipv6.conf.default.accept_ra=1");
        let read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys";
        let wrapped = with_mounts(&host, read_only)?;
        // Held to their addresses pods cannot send it in the first place.
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
        assert_eq!(problems(&mut agent), "[]");
        // Another program takes the rules away: they are there again, and until then nothing else is.
        tool(&host.netns, "nft flush chain inet gossamer.1 routers");
        eventually(&host.netns, "nft list chain inet gossamer.1 routers", |shown| {
            shown.contains("nd-router-advert") && shown.contains("gsm*")
        });
        advertise_and_ping()?;
        assert_eq!(default(&host), "");

        // Without the guard the same advertisement is taken, and that is named.
        agent.end(nix::sys::signal::Signal::SIGTERM)?;
        let open = [&loose[..], &["--guard", "false"]].concat();
        agent = Agent::start(&wrapped, &host, &open)?;
        for name in ["gsm0.accept_ra", "gossamer/1.accept_redirects"] {
            status_where(&mut agent, |status| status["problems"].to_string().contains(name));
        }
        advertise_and_ping()?;
        eventually(&host.netns, "ip -6 route show default", |shown| shown.contains("gsm0"));
        Ok(())
    });
}
