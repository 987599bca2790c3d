//! One trial: packets out of the pod that is the agent's own, packets for it out of the tunnel, and what came
//! of them.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use socket2::{SockRef, Socket};

use super::{Peer, Setting, capture::Capture};
use crate::{
    agent::start::random,
    dataplane::forwarding::{Direction, NONCE_LEN, Seen, Tunnelled, Way},
    icmp::{Asker, Family, SMALL, What},
    model::Addresses,
    pods::standin::{Shape, StandIn},
};

/// What has not come by then is lost.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for what only this host does.
const LOCAL_PATIENCE: Duration = Duration::from_millis(400);
/// Peers that are asked at once.
const ASKED: usize = 3;
/// Ports at which nothing listens, as traceroute has it: where tunnelled packets seem to come from, and
/// another for those that go out, which must not pass for answers to the former.
const UNUSED: u16 = 33_434;
const UNUSED_OUT: u16 = 33_435;

/// Those of the pod, and those of this host.
pub struct Sockets(Vec<FamilySockets>);

struct FamilySockets {
    family: Family,
    /// The pod's address.
    address: IpAddr,
    inside: Socket,
    datagrams: UdpSocket,
    home: Socket,
    mate: Option<Mate>,
}

/// A second pod, to which the first speaks.
struct Mate {
    address: IpAddr,
    datagrams: UdpSocket,
}

impl Sockets {
    /// With a mate for packets between pods where that is to be tried.
    pub fn open(standin: &StandIn, mate: Option<&StandIn>, shape: &Shape) -> io::Result<Self> {
        let open_mate = |mate: &StandIn, address: IpAddr| {
            let datagrams = mate.inside(|| UdpSocket::bind((address, 0)))?;
            datagrams.set_nonblocking(true)?;
            io::Result::Ok(Mate { address, datagrams })
        };
        let open = |address: IpAddr| {
            let family = Family::of(address);
            let any: IpAddr = match family {
                Family::Inet => Ipv4Addr::UNSPECIFIED.into(),
                Family::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            };
            let (inside, datagrams) =
                standin.inside(|| Ok((family.open()?, UdpSocket::bind((any, 0))?)))?;
            let home = family.open()?;
            for socket in [&inside, &home] {
                socket.set_nonblocking(true)?;
            }
            datagrams.set_nonblocking(true)?;
            let of_family = |ip: &IpAddr| ip.is_ipv4() == address.is_ipv4();
            let beside = shape.mate.into_iter().flat_map(Addresses::iter).find(of_family);
            let beside = mate.zip(beside).map(|(mate, address)| open_mate(mate, address));
            Ok(FamilySockets {
                family,
                address,
                inside,
                datagrams,
                home,
                mate: beside.transpose()?,
            })
        };
        shape.addresses.iter().map(open).collect::<io::Result<_>>().map(Self)
    }
}

pub struct Trial<'a> {
    pub setting: &'a Setting,
    pub sockets: &'a Sockets,
    /// Whether packets between pods of this host are tried, with IPv4 and with IPv6.
    pub between: [bool; 2],
    /// Another number each time.
    pub turn: usize,
}

/// Packets of one family.
struct Check<'a> {
    sockets: &'a FamilySockets,
    asker: Asker,
    /// Peers' addresses; the first of them is where tunnel packets seem to come from.
    asked: Vec<IpAddr>,
    tunnelled: Option<Tunnelled>,
    /// Who has answered the pod, and this host itself.
    inside: BTreeSet<IpAddr>,
    home: BTreeSet<IpAddr>,
    arrived: bool,
    /// Whether another pod has heard of the pod; none where that is not tried.
    between: Option<bool>,
    /// What the pod sends out, and whether that and the tunnelled packet were seen on the device.
    leaving: [u8; NONCE_LEN],
    has_left: bool,
    has_come: bool,
}

impl Trial<'_> {
    /// Waits by `wait`, which says whether to go on.
    ///
    /// # Errors
    /// What kept packets from being sent.
    pub fn run(
        &self,
        mut wait: impl FnMut(&[BorrowedFd<'_>], Duration) -> bool,
    ) -> io::Result<Vec<(Way, Seen)>> {
        let mut checks = self.checks()?;
        let tunnel = self.tunnel()?;
        checks.iter().for_each(|check| check.ask());
        checks.iter().for_each(|check| self.inject(check, &tunnel));
        let until = Instant::now() + PATIENCE;
        while !checks.iter().all(Check::is_done) {
            let pause = until.saturating_duration_since(Instant::now());
            if pause.is_zero() {
                break;
            }
            let fds: Vec<_> = checks.iter().flat_map(Check::fds).collect();
            if !wait(&fds, pause) {
                return Ok(Vec::new());
            }
            checks.iter_mut().for_each(Check::hear);
        }
        if !checks.iter().all(Check::is_forwarded) && !self.look_closer(&mut checks, &tunnel, wait)
        {
            return Ok(Vec::new());
        }
        Ok(checks.iter().flat_map(Check::seen).collect())
    }

    /// Looks at the device itself whether what was lost had come to it, and has left by it.
    fn look_closer(
        &self,
        checks: &mut [Check<'_>],
        tunnel: &UdpSocket,
        mut wait: impl FnMut(&[BorrowedFd<'_>], Duration) -> bool,
    ) -> bool {
        let is_tunnelled = checks.iter().any(|check| check.tunnelled.is_some());
        let exit = if is_tunnelled { self.setting.device } else { self.setting.underlay };
        let mut capture = match Capture::open(exit) {
            Ok(capture) => capture,
            Err(error) => {
                tracing::debug!(%error, "packets of a trial cannot be looked at");
                return true;
            }
        };
        checks.iter().for_each(|check| {
            check.send_out();
            self.inject(check, tunnel);
        });
        let until = Instant::now() + LOCAL_PATIENCE;
        loop {
            let pause = until.saturating_duration_since(Instant::now());
            if pause.is_zero() {
                return true;
            }
            let mut fds: Vec<_> = checks.iter().flat_map(Check::fds).collect();
            fds.push(capture.socket().as_fd());
            if !wait(&fds, pause) {
                return false;
            }
            checks.iter_mut().for_each(Check::hear);
            while let Ok(Some(payload)) = capture.next() {
                checks.iter_mut().for_each(|check| check.on_device(&payload));
            }
        }
    }

    fn checks(&self) -> io::Result<Vec<Check<'_>>> {
        let random = || random::<NONCE_LEN>().map_err(io::Error::other);
        let mut checks = Vec::new();
        for sockets in &self.sockets.0 {
            let is_ipv4 = sockets.address.is_ipv4();
            let of_family =
                |peer: &Peer| peer.vteps.iter().find(|vtep| vtep.is_ipv4() == is_ipv4).copied();
            let peers: Vec<(&Peer, IpAddr)> = self
                .setting
                .peers
                .iter()
                .filter_map(|peer| Some((peer, of_family(peer)?)))
                .collect();
            let [between4, between6] = self.between;
            let tries_between = if is_ipv4 { between4 } else { between6 };
            let between = sockets.mate.as_ref().filter(|_| tries_between).map(|_| false);
            if peers.is_empty() && between.is_none() {
                continue;
            }
            let from = self.turn.wrapping_mul(ASKED) % peers.len().max(1);
            let chosen: Vec<_> =
                peers.iter().cycle().skip(from).take(ASKED.min(peers.len())).collect();
            let [a, b, ..] = random()?;
            let asker = Asker { identifier: u16::from_ne_bytes([a, b]), port: 0 };
            for socket in [&sockets.inside, &sockets.home] {
                sockets.family.filter(socket, asker, false)?;
            }
            let nonce = random()?;
            let port = sockets.datagrams.local_addr()?.port();
            let through = chosen.iter().find(|(peer, _)| peer.tunnelled);
            let tunnelled = through.map(|(peer, vtep)| Tunnelled {
                vni: self.setting.vni,
                macs: [peer.mac, self.setting.mac],
                from: *vtep,
                to: sockets.address,
                ports: [UNUSED, port],
                nonce,
            });
            checks.push(Check {
                sockets,
                asker,
                asked: chosen.iter().map(|(_, vtep)| *vtep).collect(),
                tunnelled,
                inside: BTreeSet::new(),
                home: BTreeSet::new(),
                arrived: false,
                between,
                leaving: random()?,
                has_left: false,
                has_come: false,
            });
        }
        Ok(checks)
    }

    fn tunnel(&self) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((self.setting.local, 0))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.setting.mark {
            SockRef::from(&socket).set_mark(mark)?;
        }
        Ok(socket)
    }

    /// By loopback, as if it came from the peer's host.
    fn inject(&self, check: &Check<'_>, tunnel: &UdpSocket) {
        let Some(packet) = check.tunnelled.filter(|_| !check.arrived) else { return };
        let to = SocketAddr::new(self.setting.local, self.setting.port);
        // What cannot be sent is not seen coming.
        let _ = tunnel.send_to(&packet.bytes(), to);
    }
}

impl Check<'_> {
    fn ask(&self) {
        let Self { sockets, asker, .. } = self;
        for (number, to) in self.asked.iter().enumerate() {
            let packet = sockets.family.request(asker.identifier, number as u16, SMALL);
            let to = SocketAddr::new(*to, 0).into();
            for socket in [&sockets.inside, &sockets.home] {
                let _ = socket.send_to(&packet, &to);
            }
        }
        self.ask_mate();
    }

    /// By an echo and by a datagram: rules may drop the one or the other alone.
    fn ask_mate(&self) {
        let Self { sockets, asker, .. } = self;
        let Some(mate) = sockets.mate.as_ref().filter(|_| self.between == Some(false)) else {
            return;
        };
        let echo = sockets.family.request(asker.identifier, ASKED as u16, SMALL);
        let _ = sockets.inside.send_to(&echo, &SocketAddr::new(mate.address, 0).into());
        let to = mate.datagrams.local_addr();
        let _ = to.and_then(|to| sockets.datagrams.send_to(&Tunnelled::payload(self.leaving), to));
    }

    fn send_out(&self) {
        for to in self.asked.iter().filter(|_| self.inside.is_empty()) {
            let payload = Tunnelled::payload(self.leaving);
            let _ = self.sockets.datagrams.send_to(&payload, SocketAddr::new(*to, UNUSED_OUT));
        }
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let FamilySockets { inside, datagrams, home, mate, .. } = self.sockets;
        let mate = mate.as_ref().map(|mate| mate.datagrams.as_fd());
        [inside.as_fd(), datagrams.as_fd(), home.as_fd()].into_iter().chain(mate)
    }

    fn hear(&mut self) {
        let Self { sockets, asker, .. } = *self;
        let answers = |socket: &Socket, answered: &mut BTreeSet<IpAddr>| {
            while let Ok(heard) = sockets.family.receive(socket, asker) {
                let answer = heard.filter(|heard| matches!(heard.what, What::Answer(_)));
                answered.extend(answer.map(|heard| heard.from));
            }
        };
        answers(&sockets.inside, &mut self.inside);
        answers(&sockets.home, &mut self.home);
        let mut buffer = [0; 64];
        if let Some(mate) = &sockets.mate {
            let mut heard = self.inside.remove(&mate.address);
            while let Ok(length) = mate.datagrams.recv(&mut buffer) {
                heard |= buffer[..length] == Tunnelled::payload(self.leaving);
            }
            self.between = self.between.map(|before| before || heard);
        }
        while let Ok(length) = sockets.datagrams.recv(&mut buffer) {
            let wanted = self.tunnelled.map(|packet| Tunnelled::payload(packet.nonce));
            self.arrived |= wanted.is_some_and(|wanted| buffer[..length] == wanted);
        }
    }

    fn on_device(&mut self, payload: &[u8]) {
        self.has_left |= payload == Tunnelled::payload(self.leaving);
        let injected = self.tunnelled.map(|packet| Tunnelled::payload(packet.nonce));
        self.has_come |= injected.is_some_and(|injected| payload == injected);
    }

    fn is_done(&self) -> bool {
        self.is_forwarded() && self.between != Some(false)
    }

    /// What goes to peers and comes from them has passed.
    fn is_forwarded(&self) -> bool {
        let has_left = self.asked.is_empty() || !self.inside.is_empty();
        has_left && (self.arrived || self.tunnelled.is_none())
    }

    fn seen(&self) -> Vec<(Way, Seen)> {
        let ipv4 = self.sockets.address.is_ipv4();
        // A peer that does not answer this host either may be gone, or answer no echoes.
        let out = match (self.inside.is_empty(), self.home.is_empty(), self.has_left) {
            (false, ..) | (true, _, true) => Seen::Passed,
            (true, false, false) => Seen::Lost,
            (true, true, false) => Seen::Unclear,
        };
        let comes = match (self.arrived, self.has_come) {
            (true, _) => Seen::Passed,
            (false, true) => Seen::Lost,
            (false, false) => Seen::Unclear,
        };
        let between = self.between.map(|heard| if heard { Seen::Passed } else { Seen::Lost });
        let seen = [
            (Direction::Out, Some(out).filter(|_| !self.asked.is_empty())),
            (Direction::In, self.tunnelled.map(|_| comes)),
            (Direction::Between, between),
        ];
        let seen = seen.into_iter().filter_map(|(direction, seen)| Some((direction, seen?)));
        seen.map(|(direction, seen)| (Way { direction, ipv4 }, seen)).collect()
    }
}
