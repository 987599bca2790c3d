//! Runs two nodes of a cluster without any IO: no socket, no disk, no kernel, no clock.
//!
//! ```sh
//! cargo run --no-default-features --example two_nodes
//! ```
//!
//! A [`Node`] is a state machine. The program around it passes inputs in, carries outputs out and says what time
//! it is. The agent does so with QUIC, sled and netlink, the simulator with models of them. Here a queue in memory is
//! the network, and each write counts as durable at once.

use std::{collections::VecDeque, error::Error, net::Ipv4Addr, time::Duration};

use gossamer::{
    core::{Bootstrap, CallError, CallId, Gate, Input, Node, NodeConfig, Output, ReplyId, Target},
    model::{BootId, ClusterSettings, Mac, NodeId, Pool, PoolSpec, SettingsWish, Time, Vtep},
};

/// Nodes by their index, and the inputs that are on their way to them.
struct Network {
    nodes: Vec<(NodeId, Node, Gate)>,
    queue: VecDeque<(usize, Input)>,
    /// The caller and the call of each request; a [`ReplyId`] is an index into it.
    requests: Vec<(usize, CallId)>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let pool = Pool::new(&PoolSpec::of("10.42.0.0/16".parse()?))?;
    let settings = ClusterSettings { pool, vni: 1, vxlan_port: 8472 };
    let mut now = Time::ZERO;
    let mut network = Network { nodes: Vec::new(), queue: VecDeque::new(), requests: Vec::new() };
    // The first node creates the cluster, the second one joins with the first as its seed.
    for (number, bootstrap) in [(1, Bootstrap::Create(settings)), (2, Bootstrap::Join)] {
        let config = config(number, bootstrap)?;
        network.nodes.push((config.node, Node::start(now, config, Vec::new())?, Gate::default()));
    }
    for _ in 0..2_000 {
        network.deliver(now);
        now = now + Duration::from_millis(5);
        for (_, node, _) in &mut network.nodes {
            if node.poll_timeout().is_some_and(|due| due <= now) {
                node.handle(now, Input::Timeout);
            }
        }
    }
    for (id, node, _) in &network.nodes {
        let status = node.status();
        let subnet = status.subnet.ok_or("no subnet")?;
        if !status.settled {
            return Err(format!("{} has not compared its facts with a peer", status.name).into());
        }
        println!("{} ({id}): {:?} with {subnet}", status.name, status.phase);
    }
    Ok(())
}

fn config(number: u8, bootstrap: Bootstrap) -> Result<NodeConfig, Box<dyn Error>> {
    let node = NodeId::from_bytes([number; 8]);
    let underlay = Ipv4Addr::new(192, 0, 2, number).into();
    Ok(NodeConfig {
        node,
        boot: BootId::from_bytes([number; 8]),
        name: format!("node{number}").parse()?,
        address: (underlay, 8473).into(),
        vtep: Vtep { mac: Mac::of_node(node), underlay },
        bootstrap,
        seeds: 1,
        cluster: None,
        wish: SettingsWish::default(),
        prefer_subnet: None,
        assigned: None,
        occupied: Vec::new(),
        replace_by_name: false,
        quorum: None,
        rng_seed: [number; 32],
    })
}

impl Network {
    /// Carries outputs out and passes inputs in until all nodes are idle.
    fn deliver(&mut self, now: Time) {
        loop {
            for from in 0..self.nodes.len() {
                while let Some(output) = self.nodes[from].1.poll_output() {
                    let gate = &mut self.nodes[from].2;
                    // The gate holds back what may not leave before a write is durable.
                    let ready = match output {
                        Output::Write { seq, .. } => gate.open(seq),
                        output => gate.pass(output).into_iter().collect(),
                    };
                    ready.into_iter().for_each(|output| self.carry(from, output));
                }
            }
            let Some((to, input)) = self.queue.pop_front() else { return };
            self.nodes[to].1.handle(now, input);
        }
    }

    /// Turns an output of one node into the input that it causes.
    fn carry(&mut self, index: usize, output: Output) {
        let from = self.nodes[index].0;
        let of = |id: NodeId| self.nodes.iter().position(|(node, ..)| *node == id);
        match output {
            Output::Send { to, bytes, .. } => {
                self.queue.extend(of(to).map(|to| (to, Input::Message { from, bytes })));
            }
            Output::Call { call, to, bytes, .. } => {
                let peer = match to {
                    Target::Member { node, .. } => of(node),
                    // The only configured seed is the first node. A call of a node's own address fails.
                    Target::Seed(_) => Some(0).filter(|seed| *seed != index),
                };
                let reply = ReplyId(self.requests.len() as u64);
                self.requests.push((index, call));
                self.queue.push_back(match peer {
                    Some(peer) => (peer, Input::Request { from, reply, bytes }),
                    None => (index, Input::Answer { call, result: Err(CallError::Myself) }),
                });
            }
            Output::Reply { reply: ReplyId(number), bytes, .. } => {
                let (caller, call) = self.requests[number as usize];
                self.queue.push_back((caller, Input::Answer { call, result: Ok((from, bytes)) }));
            }
            // A kernel would get the device and the entries of this view, and then use the subnet.
            Output::Program { view, .. } => {
                let subnet = Some(view.own.subnets.first);
                self.queue.push_back((index, Input::KernelSubnet(subnet)));
            }
            Output::Stop(stop) => println!("{from} stops: {stop:?}"),
            _ => {}
        }
    }
}
