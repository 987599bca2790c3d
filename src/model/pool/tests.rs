//! Tests of the pool: its slots, its networks and their names.

use ipnet::Ipv4Net;
use proptest::prelude::*;

use super::*;

fn spec(network: &str) -> PoolSpec {
    PoolSpec::of(network.parse().expect("network"))
}

#[test]
fn defaults_equal_those_of_flannel() {
    let pool = Pool::new(&spec("10.42.0.0/16")).expect("pool");
    assert_eq!((pool.subnet_len(), pool.slot_count()), (24, 255));
    assert_eq!(pool.subnet(Slot(1)).to_string(), "10.42.1.0/24");
    assert_eq!(pool.subnet(Slot(255)).to_string(), "10.42.255.0/24");
    assert_eq!(Pool::new(&spec("10.42.0.0/23")).expect("pool").subnet_len(), 25);
}

#[test]
fn slot_of_a_dual_stack_pool_has_one_subnet_of_each_family() {
    let dual = PoolSpec { network6: "fd42::/48".parse().ok(), ..spec("10.42.0.0/16") };
    let pool = Pool::new(&dual).expect("pool");
    let subnets: Vec<String> = pool.subnets(Slot(7)).iter().map(|net| net.to_string()).collect();
    assert_eq!(subnets, ["10.42.7.0/24", "fd42:0:0:7::/64"]);
    for address in ["10.42.7.9", "fd42:0:0:7::9"] {
        assert_eq!(pool.slot_of(address.parse().expect("address")), Some(Slot(7)));
    }
    assert_eq!(pool.slot_at("fd42:0:0:7::".parse().expect("address")), Some(Slot(7)));
    let json = serde_json::to_string(&pool).expect("serialized");
    assert_eq!(serde_json::from_str::<Pool>(&json).expect("read back"), pool);
}

#[test]
fn ipv6_pool_is_limited_to_max_slots() {
    let pool = Pool::new(&spec("fd42::/40")).expect("pool");
    assert_eq!((pool.subnet_len(), pool.slot_count()), (64, MAX_SLOTS - 1));
    assert_eq!(pool.subnet(Slot(1)).to_string(), "fd42:0:0:1::/64");
    assert_eq!(pool.slot_of("fd42:0:1::".parse().expect("address")), None);
    let bounds = PoolSpec {
        subnet_min: "fd42:0:0:10::".parse().ok(),
        subnet_max: "fd42:0:0:1f::".parse().ok(),
        ..spec("fd42::/48")
    };
    assert_eq!(Pool::new(&bounds).expect("pool").slots(), 16..=31);
}

#[test]
fn inconsistent_pool_is_refused_with_its_reason() {
    let with = |network, len, min: Option<&str>, max: Option<&str>| {
        let parse = |text: &str| text.parse().expect("address");
        Pool::new(&PoolSpec {
            subnet_len: len,
            subnet_min: min.map(parse),
            subnet_max: max.map(parse),
            ..spec(network)
        })
        .expect_err("must be refused")
        .to_string()
    };
    for (error, words) in [
        (with("10.42.1.0/16", None, None, None), "write 10.42.0.0/16"),
        (with("10.42.0.0/29", None, None, None), "/28 or wider"),
        (with("10.42.0.0/16", Some(17), None, None), "use 18 to 30"),
        (with("10.42.0.0/16", Some(31), None, None), "use 18 to 30"),
        (with("10.0.0.0/8", Some(26), None, None), "262144 subnets"),
        (with("10.42.0.0/16", None, Some("10.43.0.0"), None), "subnet_min 10.43.0.0"),
        (with("10.42.0.0/16", None, Some("10.42.0.9"), None), "first address"),
        (with("10.42.0.0/16", None, None, Some("10.41.0.0")), "subnet_max 10.41.0.0"),
        (with("10.42.0.0/16", None, Some("10.42.9.0"), Some("10.42.8.0")), "swap them"),
    ] {
        assert!(error.contains(words), "{error:?} should say {words:?}");
    }
    let beside = |network, network6: &str, len| {
        let network6 = network6.parse().ok();
        let spec = PoolSpec { network6, subnet_len6: len, ..spec(network) };
        Pool::new(&spec).expect_err("must be refused").to_string()
    };
    for (error, words) in [
        (beside("10.42.0.0/16", "fd42::/58", None), "holds 64 subnets of /64, fewer than the 256"),
        (beside("10.42.0.0/16", "fd42::1/48", None), "network6 fd42::1/48 has host bits"),
        (beside("10.42.0.0/16", "fd42::/48", Some(127)), "subnet_len6 127"),
        (beside("fd42::/48", "fd43::/48", None), "both IPv6"),
    ] {
        assert!(error.contains(words), "{error:?} should say {words:?}");
    }
}

#[test]
fn leasable_networks_cover_all_slots_and_leave_out_the_first_subnet() {
    let network6 = Some("fd42::/48".parse().expect("a network"));
    let spec = PoolSpec { network6, ..PoolSpec::of("10.42.0.0/22".parse().expect("a network")) };
    let pool = Pool::new(&PoolSpec { subnet_len: Some(24), ..spec }).expect("a pool");
    let networks = pool.leasable_networks().iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = ["10.42.1.0/24", "10.42.2.0/23", "fd42:0:0:1::/64", "fd42:0:0:2::/63"];
    assert_eq!(networks, expected);
}

proptest! {
    #[test]
    fn slots_and_subnets_are_one_to_one_and_disjoint(
        address in any::<u32>(), prefix in 8_u8..=28, extra in 2_u8..=8,
    ) {
        let subnet_len = prefix + extra;
        prop_assume!(subnet_len <= 30);
        let network = Ipv4Net::new(Ipv4Addr::from(address), prefix).expect("prefix").trunc();
        let spec = PoolSpec { subnet_len: Some(subnet_len), ..PoolSpec::of(network.into()) };
        let pool = Pool::new(&spec).expect("pool");
        let mut previous: Option<Ipv4Net> = None;
        for slot in pool.slots().map(Slot) {
            let IpNet::V4(subnet) = pool.subnet(slot) else { panic!("of IPv4") };
            prop_assert!(network.contains(&subnet));
            prop_assert_eq!(pool.slot_at(subnet.network().into()), Some(slot));
            prop_assert_eq!(pool.slot_of(subnet.broadcast().into()), Some(slot));
            if let Some(previous) = previous {
                prop_assert_eq!(
                    u32::from(previous.broadcast()) + 1, u32::from(subnet.network()));
            }
            previous = Some(subnet);
        }
    }
}
