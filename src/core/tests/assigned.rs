//! Tests of nodes with assigned subnets, as in Kubernetes.

use super::*;

/// Creates hosts with these assigned subnets (their third octets); each has all others as seeds.
fn cluster(octets: &[u8]) -> World {
    let mut world = World::new(1, settings("10.42.0.0/16", 24));
    // The oracle does not model assignments from outside the cluster.
    world.oracle.lenient = true;
    for octet in octets {
        add(&mut world, *octet);
    }
    (0..octets.len()).for_each(|host| world.start(host));
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
fn nodes_lease_their_assigned_subnets_and_know_each_other() {
    let mut world = cluster(&[7, 3, 9]);
    world.run_for(seconds(5));
    for (host, octet) in [7, 3, 9].into_iter().enumerate() {
        assert!(has(&world, host, octet), "{:?}", world.subnet(host));
        assert_eq!((world.leased(host), world.problems(host)), (3, String::new()));
        assert_eq!(world.node(host).view().expect("a view").peers.len(), 2);
    }
    assert_eq!(world.oracle.shared_subnets().count(), 0);
    // The nodes send no grant requests.
    world.restart(1);
    world.run_for(seconds(2));
    assert!(has(&world, 1, 3));
}

#[test]
fn subnet_assigned_twice_stays_with_its_user_and_is_a_problem() {
    let mut world = cluster(&[7, 3]);
    world.run_for(seconds(5));
    let third = add(&mut world, 7);
    world.start(third);
    world.run_for(seconds(10));
    assert!(has(&world, 0, 7) && world.subnet(third).is_none());
    let problem = world.problems(third);
    assert!(problem.contains("10.42.7.0/24 was assigned to this node and to n0"), "{problem}");
    assert_eq!(world.oracle.shared_subnets().count(), 0);
    // Once the user is down, another node claims the subnet.
    world.kill(0);
    world.run_for(seconds(20));
    assert!(has(&world, third, 7), "{}", world.problems(third));
    // The first user returns, finds the subnet in use, and reports it.
    world.start(0);
    world.run_for(seconds(5));
    assert!(world.subnet(0).is_none() && world.problems(0).contains("and to n2"));
    assert_eq!(world.oracle.shared_subnets().count(), 0);
}

#[test]
fn subnet_assigned_to_two_nodes_at_once_is_used_by_one() {
    let mut world = cluster(&[7, 7, 3]);
    world.run_for(seconds(10));
    let users = (0..2).filter(|host| has(&world, *host, 7)).count();
    assert_eq!(users, 1);
    let named = (0..2).filter(|host| world.problems(*host).contains("was assigned to this node"));
    assert_eq!(named.count(), 1);
    assert_eq!(world.oracle.shared_subnets().count(), 0);
}

#[test]
fn joiner_without_an_assigned_subnet_is_refused() {
    let mut world = cluster(&[7, 3]);
    world.run_for(seconds(5));
    let joiner = world.add_joiner(&[0]);
    world.start(joiner);
    world.run_for(seconds(2));
    let stopped = format!("{:?}", world.hosts[joiner].stopped);
    assert!(stopped.contains("lease_source"), "{stopped}");
}
