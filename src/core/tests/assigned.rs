//! Stories of nodes whose subnets somebody outside gives: Kubernetes.

use super::*;

/// Hosts that all know each other by name, with these subnets (by their third octets).
fn cluster(given: &[u8]) -> World {
    let mut world = World::new(1, settings("10.42.0.0/16", 24));
    // The judge knows of no authority outside the cluster.
    world.oracle.lenient = true;
    for octet in given {
        add(&mut world, *octet);
    }
    (0..given.len()).for_each(|host| world.start(host));
    world
}

fn add(world: &mut World, octet: u8) -> usize {
    let host = world.add_creator();
    world.hosts[host].assigned = Some([10, 42, octet, 0].into());
    for one in 0..=host {
        world.hosts[one].seeds = (0..=host).filter(|other| *other != one).collect();
    }
    host
}

fn has(world: &World, host: usize, octet: u8) -> bool {
    world.subnet(host) == Some(format!("10.42.{octet}.0/24").parse().expect("a subnet"))
}

#[test]
fn everybody_has_the_subnet_that_was_given_to_it_and_knows_all_others() {
    let mut world = cluster(&[7, 3, 9]);
    world.run_for(seconds(5));
    for (host, octet) in [7, 3, 9].into_iter().enumerate() {
        assert!(has(&world, host, octet), "{:?}", world.subnet(host));
        assert_eq!((world.leased(host), world.problems(host)), (3, String::new()));
        assert_eq!(world.node(host).view().expect("a view").peers.len(), 2);
    }
    assert_eq!(world.oracle.shared_subnets().count(), 0);
    // Nobody asks anybody for it again.
    world.restart(1);
    world.run_for(seconds(2));
    assert!(has(&world, 1, 3));
}

#[test]
fn a_subnet_that_was_given_twice_stays_with_its_user_and_is_named() {
    let mut world = cluster(&[7, 3]);
    world.run_for(seconds(5));
    let third = add(&mut world, 7);
    world.start(third);
    world.run_for(seconds(10));
    assert!(has(&world, 0, 7) && world.subnet(third).is_none());
    let problem = world.problems(third);
    assert!(problem.contains("10.42.7.0/24 was given to this node and to n0"), "{problem}");
    assert_eq!(world.oracle.shared_subnets().count(), 0);
    // Once the other one is gone it is nobody else's.
    world.kill(0);
    world.run_for(seconds(20));
    assert!(has(&world, third, 7), "{}", world.problems(third));
    // Who comes back finds it given to somebody else, and says so.
    world.start(0);
    world.run_for(seconds(5));
    assert!(world.subnet(0).is_none() && world.problems(0).contains("and to n2"));
    assert_eq!(world.oracle.shared_subnets().count(), 0);
}

#[test]
fn a_subnet_that_is_given_at_once_to_two_is_used_by_one() {
    let mut world = cluster(&[7, 7, 3]);
    world.run_for(seconds(10));
    let users = (0..2).filter(|host| has(&world, *host, 7)).count();
    assert_eq!(users, 1);
    let named = (0..2).filter(|host| world.problems(*host).contains("was given to this node"));
    assert_eq!(named.count(), 1);
    assert_eq!(world.oracle.shared_subnets().count(), 0);
}

#[test]
fn who_wants_to_be_given_one_by_gossip_is_refused() {
    let mut world = cluster(&[7, 3]);
    world.run_for(seconds(5));
    let joiner = world.add_joiner(&[0]);
    world.start(joiner);
    world.run_for(seconds(2));
    let stopped = format!("{:?}", world.hosts[joiner].stopped);
    assert!(stopped.contains("lease_source"), "{stopped}");
}
