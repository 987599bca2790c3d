//! A member that speaks the real protocol, and sends whatever a test tells it to.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::mpsc,
};

use gossamer::{
    lab::{Host, NetNs},
    model::{
        BootId, CallError, CallId, ClusterId, Identity, Incarnation, Mac, MemberRecord, NodeId,
        Run, Slot, SlotRecord, SlotState, Version, Vtep,
    },
    transport::{Call, Credentials, NodeKey, Received, Transport},
    wire::{Facts, Frame, GrantWish, Hello, Push, Request, Response, Token},
};

use crate::common::TIMEOUT;

/// The port of each agent's gossip.
pub const PORT: u16 = 8473;

/// A simulated member: a key, a certificate from the token, and no node.
pub struct HostileMember {
    orders: tokio::sync::mpsc::UnboundedSender<Order>,
    cluster: ClusterId,
    pub node: NodeId,
    ip: IpAddr,
    version: Version,
    _thread: std::thread::JoinHandle<()>,
}

pub enum Order {
    Ask(SocketAddr, Vec<u8>, mpsc::Sender<Result<(NodeId, Response), CallError>>),
    Tell(NodeId, SocketAddr, Vec<u8>),
    /// Every request is answered with these response bytes from now on.
    AnswerWith(Vec<u8>),
}

impl HostileMember {
    pub fn new(host: &Host, token: &str) -> anyhow::Result<Self> {
        let token: Token = token.parse()?;
        let key = NodeKey::from_seed([77; 32])?;
        let credentials = Credentials::new(std::slice::from_ref(&token.secret), &key)?;
        let ip = IpAddr::from(host.ip);
        let (orders, inbox) = tokio::sync::mpsc::unbounded_channel();
        let cluster = token.cluster;
        let thread = in_namespace(&host.netns, move || {
            serve((ip, PORT).into(), &credentials, cluster, inbox);
        })?;
        let version = Version { starts: 1, change: 0 };
        Ok(Self { orders, cluster, node: key.id(), ip, version, _thread: thread })
    }

    /// Returns the record that an honest member with this key and address would send.
    pub fn record(&self) -> MemberRecord {
        MemberRecord {
            node: self.node,
            version: self.version,
            boot: BootId::from_bytes([7; 8]),
            name: "evil".parse().expect("a name"),
            address: (self.ip, PORT).into(),
            vtep: Vtep { mac: Mac::of_node(self.node), underlay: self.ip },
            left_to: None,
        }
    }

    pub fn identity(&self) -> Identity {
        let incarnation = Incarnation { starts: self.version.starts, renewals: 0 };
        Identity { node: self.node, incarnation }
    }

    pub fn ask(&self, host: &Host, request: Request) -> anyhow::Result<(NodeId, Response)> {
        let (reply, answer) = mpsc::channel();
        let bytes = Frame::Request(&request.encode()).encode(self.cluster);
        self.order(Order::Ask((host.ip, PORT).into(), bytes, reply));
        Ok(answer.recv_timeout(TIMEOUT)??)
    }

    pub fn greet(&self, host: &Host, member: MemberRecord) -> anyhow::Result<(NodeId, Response)> {
        let (identity, settings) = (self.identity(), Default::default());
        let grant = GrantWish::default();
        self.ask(host, Request::Hello(Hello { member, identity, settings, grant }))
    }

    pub fn push(&self, to: NodeId, host: &Host, facts: Facts) {
        let bytes = Frame::Push(&Push { facts }.encode()).encode(self.cluster);
        self.order(Order::Tell(to, (host.ip, PORT).into(), bytes));
    }

    /// Pushes a changed version of its own record.
    pub fn push_self(&mut self, to: NodeId, host: &Host, change: impl FnOnce(&mut MemberRecord)) {
        self.version.change += 1;
        let mut record = self.record();
        change(&mut record);
        self.push(to, host, Facts { members: vec![record], ..Facts::default() });
    }

    /// Tells an agent of further members, all of the name "same". The first ones have a subnet in each of
    /// these slots; all are active in gossip if `are_alive`.
    pub fn invent(
        &self,
        host: &Host,
        count: u16,
        are_alive: bool,
        slots: &[Slot],
    ) -> anyhow::Result<()> {
        let invented = |number: u16| {
            let [high, low] = number.to_be_bytes();
            let node = NodeId::from_bytes([high, low, 7, 7, 7, 7, 7, 7]);
            let underlay = IpAddr::from([10, 98, high, low]);
            MemberRecord {
                node,
                name: "same".parse().expect("a name"),
                address: (underlay, PORT).into(),
                vtep: Vtep { mac: Mac::of_node(node), underlay },
                ..self.record()
            }
        };
        let members: Vec<_> = (1..=count).map(invented).collect();
        let incarnation = Incarnation { starts: 1, renewals: 0 };
        let active = members.iter().filter(|_| are_alive);
        let active = active.map(|record| Identity { node: record.node, incarnation }).collect();
        let lease = |(slot, member): (&Slot, &MemberRecord)| {
            let (owner, state) = (member.node, SlotState::Leased);
            let record = SlotRecord { epoch: 9, owner, state, granter: self.node };
            Run { start: *slot, len: 1, record }
        };
        let slots = slots.iter().zip(&members).map(lease).collect();
        let facts = Facts { active, members, slots, ..Facts::default() };
        let request = Request::Exchange { buckets: u32::MAX, identity: self.identity(), facts };
        self.ask(host, request)?;
        Ok(())
    }

    pub fn order(&self, order: Order) {
        assert!(self.orders.send(order).is_ok(), "the hostile member has ended");
    }
}

/// Starts a thread whose sockets belong to a namespace.
fn in_namespace(
    netns: &NetNs,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<std::thread::JoinHandle<()>> {
    let (started, thread) = mpsc::channel();
    netns.run(move || {
        // A thread inherits the namespace of the thread that starts it.
        started.send(std::thread::spawn(work)).map_err(io::Error::other)
    })?;
    thread.recv().map_err(io::Error::other)
}

fn serve(
    address: SocketAddr,
    credentials: &Credentials,
    cluster: ClusterId,
    mut inbox: tokio::sync::mpsc::UnboundedReceiver<Order>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let (mut transport, mut events) = Transport::bind(address, credentials).expect("binds");
        let mut waiting = std::collections::BTreeMap::new();
        let mut answer = None;
        let mut calls = 0;
        loop {
            tokio::select! {
                order = inbox.recv() => match order {
                    None => return,
                    Some(Order::AnswerWith(bytes)) => answer = Some(bytes),
                    Some(Order::Tell(to, address, bytes)) => transport.send(to, address, bytes),
                    Some(Order::Ask(address, bytes, reply)) => {
                        calls += 1;
                        waiting.insert(CallId(calls), reply);
                        transport.call_name(Call::Node(CallId(calls)), address.to_string(), bytes);
                    }
                },
                Some(event) = events.recv() => match transport.handle(event) {
                    Some(Received::Answer { call: Call::Node(call), result }) => {
                        let read = |(from, bytes): (NodeId, Vec<u8>)| match Frame::decode(&bytes) {
                            Ok((_, Frame::Response(payload))) => {
                                (from, Response::decode(payload).expect("a response"))
                            }
                            other => panic!("no response: {other:?}"),
                        };
                        let reply = waiting.remove(&call).expect("asked");
                        let _ = reply.send(result.map(read));
                    }
                    Some(Received::Request { reply, .. }) => {
                        if let Some(payload) = &answer {
                            transport.reply(reply, Frame::Response(payload).encode(cluster));
                        }
                    }
                    _ => {}
                },
            }
        }
    });
}
