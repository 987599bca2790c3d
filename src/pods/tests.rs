//! Tests of the address allocation.

use super::*;

fn subnets(first: &str, second: Option<&str>) -> Subnets {
    let parse = |text: &str| text.parse().expect("a network");
    Subnets { first: parse(first), second: second.map(parse) }
}

/// A node's subnets and pods.
struct Node {
    subnets: Subnets,
    pods: Pods,
}

fn pods(first: &str, second: Option<&str>) -> Node {
    Node { subnets: subnets(first, second), pods: Pods::default() }
}

fn named(container: &str) -> Attachment {
    Attachment::new(container, "eth0").expect("a name")
}

fn pod_request(container: &str, addresses: &[IpAddr]) -> PodRequest {
    let [owner, netns] = ["cni/net", "/ns"].map(str::to_owned);
    PodRequest {
        attachment: named(container),
        owner,
        netns,
        addresses: addresses.to_vec(),
        mac: None,
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

const fn at(seconds: u64) -> Time {
    Time::from_nanos(seconds * 1_000_000_000)
}

impl Node {
    fn allocate(&mut self, now: Time, container: &str) -> Result<IpAddr, NoAddress> {
        self.pods
            .attach(now, self.subnets, pod_request(container, &[]))
            .map(|pod| pod.addresses.first)
    }

    fn request(&mut self, container: &str, addresses: &[IpAddr]) -> Result<Addresses, NoAddress> {
        self.pods
            .attach(at(0), self.subnets, pod_request(container, addresses))
            .map(|pod| pod.addresses)
    }
}

#[test]
fn lowest_address_is_allocated_and_released_one_rests() {
    let mut pods = pods("10.42.7.0/24", None);
    assert_eq!(pods.allocate(at(0), "a"), Ok(ip("10.42.7.2")));
    assert_eq!(pods.allocate(at(0), "b"), Ok(ip("10.42.7.3")));
    pods.pods.detach(at(1), &named("a"));
    assert_eq!(pods.allocate(at(2), "c"), Ok(ip("10.42.7.4")));
    assert_eq!(pods.allocate(at(1) + RELEASE_COOLDOWN, "d"), Ok(ip("10.42.7.2")));
}

#[test]
fn address_released_first_is_allocated_when_no_other_is_free() {
    let mut pods = pods("10.42.7.0/29", None);
    for name in ["a", "b", "c", "d"] {
        assert!(pods.allocate(at(0), name).is_ok());
    }
    assert_eq!(pods.allocate(at(0), "f"), Err(NoAddress::Exhausted(4)));
    pods.pods.detach(at(2), &named("b"));
    pods.pods.detach(at(1), &named("d"));
    assert_eq!(pods.allocate(at(3), "f"), Ok(ip("10.42.7.5")));
    assert_eq!(pods.allocate(at(3), "g"), Ok(ip("10.42.7.3")));
    assert_eq!(pods.pods.iter().count(), 4);
}

#[test]
fn last_address_is_reserved_unless_it_is_the_only_one() {
    for (first, second, last) in [
        ("10.42.7.0/24", None, "10.42.7.254"),
        ("10.42.7.0/24", Some("fd42:0:0:7::/64"), "fd42:0:0:7::fe"),
        ("fd42:0:0:7::/120", None, "fd42:0:0:7::ff"),
    ] {
        let refused = pods(first, second).request("a", &[ip(last)]);
        assert!(matches!(refused, Err(NoAddress::Reserved { .. })), "{last}: {refused:?}");
    }
    let mut earlier = pods("10.42.7.0/29", None);
    let addresses = Addresses { first: ip("10.42.7.6"), second: None };
    let [owner, netns] = ["cni/net", "/ns"].map(str::to_owned);
    let old = Pod { attachment: named("old"), owner, addresses, netns, mac: None };
    earlier.pods = Pods::new([old]);
    assert!(["a", "b", "c", "d"].iter().all(|name| earlier.allocate(at(0), name).is_ok()));
    assert_eq!(earlier.allocate(at(0), "e"), Err(NoAddress::Exhausted(4)));
    assert!(earlier.pods.holder(ip("10.42.7.6")).is_some(), "a pod of an earlier run keeps it");
    let mut tiny = pods("10.42.7.0/30", None);
    assert_eq!(tiny.allocate(at(0), "a"), Ok(ip("10.42.7.2")));
}

#[test]
fn pod_has_the_same_place_in_both_subnets() {
    let mut pods = pods("10.42.7.0/24", Some("fd42:0:0:7::/64"));
    let addresses = pods.request("a", &[]).expect("addresses");
    assert_eq!(addresses, Addresses { first: ip("10.42.7.2"), second: Some(ip("fd42:0:0:7::2")) });
    let addresses = pods.request("b", &[ip("fd42:0:0:7::9")]).expect("addresses");
    assert_eq!(addresses.first, ip("10.42.7.9"));
    let both = [ip("10.42.7.10"), ip("fd42:0:0:7::a")];
    assert_eq!(pods.request("c", &both).expect("addresses").second, Some(both[1]));
    let two = pods.request("d", &[ip("10.42.7.11"), ip("fd42:0:0:7::c")]);
    assert!(matches!(two, Err(NoAddress::TwoPlaces { .. })), "{two:?}");
}

#[test]
fn request_for_outside_or_taken_address_is_refused_and_changes_nothing() {
    let mut pods = pods("10.42.7.0/24", None);
    for outside in ["10.42.7.0", "10.42.7.255", "10.42.8.2", "10.42.6.2", "fd42::2"] {
        let refused = pods.request("a", &[ip(outside)]);
        assert!(matches!(refused, Err(NoAddress::Outside { .. })), "{outside}: {refused:?}");
    }
    let gateway = pods.request("a", &[ip("10.42.7.1")]).expect_err("the gateway").to_string();
    assert!(gateway.contains("10.42.7.1: it is the gateway"), "{gateway}");
    let two = pods.request("a", &[ip("10.42.7.5"), ip("10.42.7.6")]).expect_err("two").to_string();
    assert!(two.contains("a pod has one IPv4 address"), "{two}");
    assert!(pods.request("a", &[ip("10.42.7.253")]).is_ok());
    let taken = pods.request("b", &[ip("10.42.7.253")]).expect_err("taken").to_string();
    assert!(taken.contains("a eth0 has it"), "{taken}");
    let again = pods.request("a", &[]);
    assert!(matches!(again, Err(NoAddress::Attached { .. })), "{again:?}");
    assert_eq!(pods.pods.iter().count(), 1);
}

#[test]
fn pods_of_an_earlier_run_and_of_another_subnet_keep_their_addresses() {
    let mut before = pods("10.42.7.0/24", None);
    before.allocate(at(0), "a").expect("an address");
    let mut pods = Node { pods: Pods::new(before.pods.iter().cloned()), ..before };
    assert_eq!(pods.allocate(at(0), "b"), Ok(ip("10.42.7.3")));
    assert_eq!(pods.pods.outside(Some(pods.subnets)).count(), 0);
    pods.subnets = subnets("10.42.9.0/24", None);
    let known = pods.pods.get(&named("a"));
    assert_eq!(known.map(|pod| pod.addresses.first), Some(ip("10.42.7.2")));
    assert_eq!(pods.allocate(at(0), "c"), Ok(ip("10.42.9.2")));
    assert_eq!(pods.pods.outside(Some(pods.subnets)).count(), 2);
    assert_eq!(pods.pods.outside(None).count(), 3);
}

#[test]
fn renamed_pod_keeps_its_addresses() {
    let mut pods = pods("10.42.7.0/24", None);
    pods.allocate(at(0), "a").expect("an address");
    let renamed = pods.pods.rename(&named("a"), named("b"), "/ns2".to_owned()).cloned();
    assert_eq!(renamed.as_ref().map(|pod| pod.addresses.first), Some(ip("10.42.7.2")));
    assert_eq!(pods.pods.holder(ip("10.42.7.2")), renamed.as_ref());
    assert_eq!((pods.pods.get(&named("a")), pods.pods.iter().count()), (None, 1));
    assert_eq!(pods.pods.rename(&named("a"), named("c"), String::new()), None);
}
