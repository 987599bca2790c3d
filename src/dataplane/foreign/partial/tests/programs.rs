//! Chains that container programs write.

use super::{super::FORWARD, found_in_lines};

/// The table `filter` as kube-proxy, Docker, netavark, CNI plugins, Calico and kube-router write
/// it. None of the rules affects packets between pods of the overlay.
const PROGRAM_CHAINS: &str = "\
-A base -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A base -m conntrack --ctstate NEW -j KUBE-SERVICES
-A base -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A base -j KUBE-FIREWALL
-A base -j DOCKER-USER
-A base -j DOCKER-ISOLATION-STAGE-1
-A base -o docker0 -j DOCKER
-A base -j NETAVARK_FORWARD
-A base -j CNI-FORWARD
-A base -j cali-FORWARD
-A base -j KUBE-ROUTER-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-SERVICES -d 10.43.9.9/32 -p tcp -m tcp --dport 443 -j REJECT
-A KUBE-EXTERNAL-SERVICES -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j REJECT
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A DOCKER-USER -i eth0 -p tcp -m tcp --dport 8080 -j DROP
-A DOCKER-USER -j RETURN
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A NETAVARK_FORWARD -m conntrack --ctstate INVALID -j DROP
-A NETAVARK_FORWARD -d 10.89.0.0/24 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A CNI-FORWARD -d 10.88.0.5/32 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -i cali+ -j cali-from-wl-dispatch
-A cali-FORWARD -o cali+ -j cali-to-wl-dispatch
-A cali-FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-from-wl-dispatch -j DROP
-A cali-to-wl-dispatch -j DROP
-A KUBE-ROUTER-FORWARD -d 10.45.2.2/32 -j KUBE-POD-FW-A
-A KUBE-POD-FW-A -m mark ! --mark 0x10000/0x10000 -j REJECT";

#[test]
fn chains_of_other_programs_are_reported_only_if_they_affect_packets_of_pods() {
    let with = |own: &[&str]| {
        found_in_lines(
            &PROGRAM_CHAINS.lines().chain(own.iter().copied()).collect::<Vec<_>>(),
            FORWARD,
        )
    };
    assert!(with(&[]).is_empty(), "{:?}", with(&[]));
    // Policies of a program that is gone, with a mark that no rule sets any more.
    let policies = [
        "-A KUBE-ROUTER-FORWARD -d 10.42.2.2/32 -j KUBE-POD-FW-B",
        "-A KUBE-ROUTER-FORWARD -s 10.42.2.2/32 -j KUBE-POD-FW-B",
        "-A KUBE-POD-FW-B -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A KUBE-POD-FW-B -m mark ! --mark 0x10000/0x10000 -j REJECT",
    ];
    assert_eq!(with(&policies), ["Rejects to 10.42.2.2 +1"]);
    // A rule of the administrator.
    let user = "-A DOCKER-USER -p tcp -m tcp --dport 8080 -j DROP";
    let text = PROGRAM_CHAINS.replace("-A DOCKER-USER -j RETURN", user);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(found_in_lines(&lines, FORWARD), ["Drops to port 8080 +0"]);
    let calico = ["-A cali-FORWARD -d 10.42.2.2/32 -j DROP"];
    assert_eq!(with(&calico), ["Drops to 10.42.2.2 +0"]);
}
