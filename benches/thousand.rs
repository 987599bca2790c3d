//! Measures what one agent costs in a cluster of a thousand members: `cargo bench --bench thousand [--
//! MEMBERS] [watched]`.
//!
//! `GOSSAMER=PATH` measures that program, for example the shipped static one. `watched` measures while a
//! browser shows the agent's dashboard and a collector reads its metrics.
//!
//! The agent is real, with its kernel, database and QUIC. The other members are the production core in
//! one process: they exchange messages in memory, and talk to the agent by QUIC, each from its own
//! endpoint. The kernel of their host answers for all their VTEPs through a real tunnel, and sends probes
//! as often as a thousand kernels would.

#![allow(clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use gossamer::{
    core::{Bootstrap, CallId, Gate, Input, Node, NodeConfig, Output, ReplyId, Target},
    icmp::{self, Family},
    lab::{self, Agent, Host, Lab, cpu_seconds, memory_mib},
    model::{
        BootId, ClusterId, Mac, MemberRecord, NodeId, PathState, SettingsWish, Time, Version, Vtep,
    },
    netlink, rpc,
    transport::{Call, CredentialError, Credentials, Event, NodeKey, Received, Transport},
    wire::{InquiryAnswer, Key, PathReport, Record, Report, Secret, Token},
};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

const MEMBERS: usize = 1_000;
const TIMEOUT: Duration = Duration::from_secs(300);
const PORT: u16 = 20_000;
const HTTP: &str = "127.0.0.1:9473";
/// A network with room for 4,096 subnets.
const NETWORK: &str = "172.16.0.0/12";
/// Time until the load of the start has ended.
const SETTLE: Duration = Duration::from_secs(30);
/// Length of the idle measurement.
const IDLE_PERIOD: Duration = Duration::from_secs(60);
/// Interval between two probes that all members together send to the agent's VTEP.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Returns what a node is told of what its transport has received.
fn input(received: Received) -> Option<Input> {
    Some(match received {
        Received::Message { from, bytes } => Input::Message { from, bytes },
        Received::Request { from, reply, bytes } => Input::Request { from, reply, bytes },
        Received::Answer { call: Call::Node(call), result } => Input::Answer { call, result },
        Received::Answer { call: Call::Inquiry(_), .. } => return None,
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    let members = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(MEMBERS);
    let watched = arguments.iter().any(|argument| argument == "watched");
    measure(members, watched).expect("measured");
    ExitCode::SUCCESS
}

fn measure(members: usize, watched: bool) -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let host = lab.host(1, "agent")?;
    let others = lab.host(2, "others")?;
    let program = std::env::var_os("GOSSAMER");
    let program = Path::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_gossamer").as_ref()));
    let mut agent = Agent::start(program, &host, &["--init", "--network", NETWORK])?;
    let status = agent.wait_converged(1, TIMEOUT)?;
    let answer = agent.ask("/v1/token", TIMEOUT)?;
    let token: Token = answer["token"].as_str().context("no token")?.parse()?;
    let own = &status["members"][0];
    let mac = own["vtep_mac"].as_str().context("no MAC")?;
    tunnel(&others, host.ip, Agent::subnet(&status)?.network(), mac)?;

    agent.end(Signal::SIGTERM)?;
    let keys: Vec<NodeKey> = (0..members).map(key).collect::<Result<_, _>>()?;
    let records: Vec<MemberRecord> =
        keys.iter().enumerate().map(|(n, key)| member(n, key.id(), others.ip)).collect();
    let saved = lab::add_crowd(&host, &records)?;
    let begun = Instant::now();
    let target = Agent::subnet(&status)?.network();
    thread::spawn(move || {
        others.netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let crowd = Crowd::start(&keys, records, &saved, &token.secret).expect("a crowd");
                crowd.run(target).await;
            });
            Ok(())
        })
    });
    let http: &[&str] = if watched { &["--http", HTTP] } else { &[] };
    let mut agent = Agent::start(program, &host, http)?;
    agent.wait_converged(members + 1, TIMEOUT)?;
    println!(
        "all {} have started and are known as alive after {:.1?}",
        members + 1,
        begun.elapsed()
    );

    // Without this, the first comparison with all members takes most of an hour, with a new connection
    // for each of them.
    let begun = Instant::now();
    while agent.ask("/v1/status?wait=0&members=1", TIMEOUT)?["members"]
        .as_array()
        .is_none_or(|members| members.iter().any(|member| member["heard"] != true))
    {
        ensure!(begun.elapsed() < TIMEOUT, "not compared with all members");
    }
    println!("compared with all of them after another {:.1?}", begun.elapsed());
    if watched {
        watch(&host)?;
    }
    thread::sleep(SETTLE);
    let before = cpu_seconds(agent.pid());
    thread::sleep(IDLE_PERIOD);
    let cpu = (cpu_seconds(agent.pid()) - before) / IDLE_PERIOD.as_secs_f64() * 100.0;
    let memory = |field| memory_mib(agent.pid(), field);
    let (rss, anonymous) = (memory("VmRSS:"), memory("RssAnon:"));
    let status = agent.ask("/v1/status", TIMEOUT)?;
    let count = |list: &str, field: &str, value: &str| {
        let all = status[list].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(|item| item[field] == value).count()
    };
    println!(
        "alive {}, answering through the tunnel {}, connections {}",
        count("members", "liveness", "alive"),
        count("paths", "state", "ok"),
        status["connections"]
    );
    println!("one agent among {members}, at rest for {IDLE_PERIOD:?} (goals: 40 MiB, 0.2 %)");
    println!("RSS {rss:.1} MiB (anonymous {anonymous:.1}), CPU {cpu:.3} % of a core");
    Ok(())
}

/// Sends the requests of a dashboard, as often as a dashboard does, and those of a metrics collector.
fn watch(host: &Host) -> anyhow::Result<()> {
    let ask = |path: &'static str, every: Duration| {
        let netns = host.netns.file().try_clone();
        netns.map(|netns| {
            thread::spawn(move || {
                let turn = || {
                    let mut stream = TcpStream::connect(HTTP)?;
                    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
                    stream.read_to_end(&mut Vec::new())
                };
                while netlink::inside(&netns, turn).is_ok() {
                    thread::sleep(every);
                }
            });
        })
    };
    ask("/v1/events", Duration::ZERO)?;
    ask("/v1/status", Duration::from_secs(2))?;
    ask("/v1/matrix", Duration::from_secs(10))?;
    ask("/v1/samples", Duration::from_secs(10))?;
    ask("/metrics", Duration::from_secs(10))?;
    Ok(())
}

/// Sets up the remote end of the agent's tunnel to all members: a kernel that has all their addresses.
fn tunnel(host: &Host, remote: Ipv4Addr, vtep: Ipv4Addr, mac: &str) -> anyhow::Result<()> {
    let commands = [
        format!(
            "ip link add vx type vxlan id 1 dev eth0 local {} dstport 8472 nolearning",
            host.ip
        ),
        "ip link set vx up mtu 1450".to_owned(),
        "ip link set lo up".to_owned(),
        // The kernel limits "port unreachable" to one per second and destination. This kernel sends it
        // for all members.
        "sysctl -q net.ipv4.icmp_ratelimit=0".to_owned(),
        format!("ip route add local {NETWORK} dev lo"),
        format!("ip route add table 7 {vtep} dev vx"),
        // All addresses are local here, except the agent's.
        "ip rule add priority 100 table local".to_owned(),
        "ip rule del priority 0".to_owned(),
        format!("ip rule add to {vtep} table 7 priority 10"),
        format!("ip neigh add {vtep} lladdr {mac} dev vx nud permanent"),
        format!("bridge fdb add {mac} dev vx dst {remote}"),
        // Accept frames that are addressed to any member's MAC.
        "nft add table netdev others".to_owned(),
        "nft add chain netdev others in { type filter hook ingress device vx priority 0 ; }"
            .to_owned(),
        "nft add rule netdev others in meta pkttype set host".to_owned(),
    ];
    for command in commands {
        let mut words = command.split_whitespace();
        let mut tool = Command::new(words.next().context("a command")?);
        let done = host.netns.spawn(tool.args(words))?.wait()?;
        ensure!(done.success(), "{command} failed");
    }
    Ok(())
}

fn key(number: usize) -> Result<NodeKey, CredentialError> {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&(number as u64).to_le_bytes());
    NodeKey::from_seed(seed)
}

fn member(number: usize, node: NodeId, ip: Ipv4Addr) -> MemberRecord {
    MemberRecord {
        node,
        version: Version { starts: 1, change: 0 },
        boot: BootId::from_bytes([1; 8]),
        name: format!("n{number}").parse().expect("a name"),
        address: (ip, PORT + number as u16).into(),
        vtep: Vtep { mac: Mac::of_node(node), underlay: ip.into() },
        left_to: None,
    }
}

/// A simulated member.
struct Member {
    id: NodeId,
    node: Node,
    gate: Gate,
    transport: Transport,
    vtep: Option<IpAddr>,
    timer: Option<Time>,
}

/// All simulated members, and the messages in transit between them.
struct Crowd {
    members: Vec<Member>,
    places: BTreeMap<NodeId, usize>,
    inputs: VecDeque<(usize, Input)>,
    /// The member and call that wait for an in-memory reply.
    replies: BTreeMap<ReplyId, (usize, CallId)>,
    asked: u64,
    timers: BTreeSet<(Time, usize)>,
    arrivals: mpsc::UnboundedReceiver<(usize, Event)>,
    epoch: Instant,
}

impl Crowd {
    /// Starts all members with the same database content.
    fn start(
        keys: &[NodeKey],
        records: Vec<MemberRecord>,
        saved: &[(Key, Record)],
        secret: &Secret,
    ) -> anyhow::Result<Self> {
        let (events, arrivals) = mpsc::unbounded_channel();
        let mut crowd = Self {
            members: Vec::new(),
            places: records.iter().enumerate().map(|(n, record)| (record.node, n)).collect(),
            inputs: VecDeque::new(),
            replies: BTreeMap::new(),
            // Far above the call ids that transports assign.
            asked: 1 << 60,
            timers: BTreeSet::new(),
            arrivals,
            epoch: Instant::now(),
        };
        for (number, (key, record)) in keys.iter().zip(records).enumerate() {
            let (transport, mut network) = Transport::bind(
                record.address,
                &Credentials::new(std::slice::from_ref(secret), key)?,
            )?;
            let events = events.clone();
            tokio::spawn(async move {
                while let Some(event) = network.recv().await {
                    let _ = events.send((number, event));
                }
            });
            let mut rng_seed = [7; 32];
            rng_seed[..8].copy_from_slice(record.node.as_bytes());
            let config = NodeConfig {
                node: record.node,
                boot: BootId::from_bytes([2; 8]),
                name: record.name,
                address: record.address,
                vtep: record.vtep,
                bootstrap: Bootstrap::Join,
                seeds: 0,
                cluster: None,
                wish: SettingsWish::default(),
                prefer_subnet: None,
                occupied: Vec::new(),
                assigned: None,
                replace_by_name: false,
                quorum: None,
                rng_seed,
            };
            let (id, gate) = (record.node, Gate::default());
            let node = Node::start(crowd.now(), config, saved.to_vec())?;
            crowd.members.push(Member { id, node, gate, transport, vtep: None, timer: None });
        }
        (0..crowd.members.len()).for_each(|number| crowd.carry_out(number));
        Ok(crowd)
    }

    async fn run(mut self, agent: Ipv4Addr) {
        let mut asks = tokio::time::interval(PROBE_INTERVAL);
        loop {
            let now = self.now();
            while let Some((at, member)) = self.timers.first().copied().filter(|(at, _)| *at <= now)
            {
                self.timers.remove(&(at, member));
                self.inputs.push_back((member, Input::Timeout));
            }
            while let Some((member, input)) = self.inputs.pop_front() {
                self.members[member].node.handle(now, input);
                self.carry_out(member);
            }
            let next = self.timers.first().map_or(Duration::MAX, |(at, _)| at.since(self.now()));
            tokio::select! {
                Some((member, event)) = self.arrivals.recv() => {
                    let received = self.members[member].transport.handle(event);
                    match received {
                        Some(Received::Request { reply, bytes, .. }) if rpc::is_inquiry(&bytes) => {
                            self.report(member, reply);
                        }
                        Some(received) => {
                            self.inputs.extend(input(received).map(|input| (member, input)));
                        }
                        None => {}
                    }
                }
                _ = asks.tick() => self.ask(agent),
                () = tokio::time::sleep(next.min(PROBE_INTERVAL)) => {}
            }
        }
    }

    /// Sends an ICMP echo request from one of the members to the agent's kernel.
    fn ask(&mut self, agent: Ipv4Addr) {
        self.asked += 1;
        let member = self.members.get(self.asked as usize % self.members.len());
        let Some(from) = member.and_then(|member| member.vtep) else { return };
        let sent = Family::Inet.open().and_then(|socket| {
            socket.bind(&SocketAddr::new(from, 0).into())?;
            let request = Family::Inet.request(1, self.asked as u16, icmp::SMALL);
            socket.send_to(&request, &SocketAddr::from((agent, 0)).into())
        });
        sent.expect("an echo request");
    }

    fn now(&self) -> Time {
        Time::from_nanos(self.epoch.elapsed().as_nanos() as u64)
    }

    fn carry_out(&mut self, member: usize) {
        while let Some(output) = self.members[member].node.poll_output() {
            if let Some(output) = self.members[member].gate.pass(output) {
                self.execute(member, output);
            }
        }
        let Member { node, timer, .. } = &mut self.members[member];
        let (before, after) = (*timer, node.poll_timeout());
        *timer = after;
        self.timers.extend(after.map(|at| (at, member)));
        if let Some(before) = before.filter(|_| before != after) {
            self.timers.remove(&(before, member));
        }
    }

    /// Answers an inquiry of the agent: all members reach each other.
    fn report(&mut self, member: usize, reply: ReplyId) {
        let paths_to_all = self.members.iter().map(|member| PathReport {
            node: member.id,
            state: PathState::Ok,
            round_trip_us: Some(300),
        });
        let report = Report { paths: paths_to_all.collect(), ..Report::default() };
        let Member { node, transport, .. } = &mut self.members[member];
        let cluster = node.cluster().map_or(ClusterId::UNKNOWN, |cluster| cluster.id);
        let answer = InquiryAnswer::Report(Box::new(report));
        transport.reply(reply, rpc::answer_frame(cluster, &answer));
    }

    fn execute(&mut self, member: usize, output: Output) {
        let from = self.members[member].id;
        match output {
            Output::Send { to, address, bytes, .. } => match self.places.get(&to) {
                Some(place) => self.inputs.push_back((*place, Input::Message { from, bytes })),
                None => self.members[member].transport.send(to, address, bytes),
            },
            Output::Call { call, to: Target::Member { node, address }, bytes, .. } => {
                let Some(place) = self.places.get(&node) else {
                    return self.members[member].transport.call(
                        Call::Node(call),
                        node,
                        address,
                        bytes,
                    );
                };
                self.asked += 1;
                let reply = ReplyId(self.asked);
                self.replies.insert(reply, (member, call));
                self.inputs.push_back((*place, Input::Request { from, reply, bytes }));
            }
            Output::Reply { reply, bytes, .. } => match self.replies.remove(&reply) {
                Some((asker, call)) => {
                    self.inputs
                        .push_back((asker, Input::Answer { call, result: Ok((from, bytes)) }));
                }
                None => self.members[member].transport.reply(reply, bytes),
            },
            Output::Write { seq, .. } => {
                for output in self.members[member].gate.open(seq) {
                    self.execute(member, output);
                }
            }
            Output::Program { view, .. } => {
                let subnet = view.own.subnets.first;
                self.members[member].vtep = Some(subnet.network());
                self.inputs.push_back((member, Input::KernelSubnet(Some(subnet))));
            }
            Output::SlotsChanged(_) => {}
            other => println!("{from} wants {other:?}"),
        }
    }
}
