//! Rules of other programs: which packets of pods, tunnels and gossip they drop or change.
//!
//! Everything here explains and nothing decides. Rules are read to name the cause of a loss that a trial or a
//! probe has found, or to warn of one that no trial can find. No rule of another program is changed. Only
//! [`trace`] writes: temporary tables of gossamer that mark packets for tracing and let all of them pass.
//!
//! - `rules`: the expressions of nftables, and the targets and matches that iptables stores in them
//! - `chains`: chains that may drop forwarded packets, or packets of this host itself
//! - `nat`: chains that translate addresses
//! - `ports`: chains that close UDP ports of this host
//! - `partial`: rules that affect only some packets, followed through chains, sets and marks
//! - [`trace`]: what the kernel reports about single packets (`nft monitor trace`)

mod chains;
mod nat;
mod partial;
mod ports;
mod rules;
pub mod trace;

use std::{collections::BTreeSet, io};

use ipnet::IpNet;

pub use self::{
    chains::{DroppingChain, ForeignChains, LostPackets, OwnHook},
    partial::{Act, ForeignRules, Interfaces, LegacyTable, Partial, Traffic},
    ports::{ClosedPort, Extent},
};
use self::{
    nat::{redirecting_chains, translating_chains},
    ports::{closed_ports, redirected_port},
};
use crate::netlink::nftables::Nftables;

/// Reads the tables of other programs in the network namespace in which it was opened.
pub struct ForeignTables {
    nftables: Nftables,
}

impl ForeignTables {
    /// Opens a netlink socket for nftables.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Self { nftables: Nftables::open()? })
    }

    /// Returns what chains of other programs do with packets of these networks.
    ///
    /// # Errors
    /// When the chains cannot be listed.
    pub fn chains(&mut self, networks: &[IpNet]) -> io::Result<ForeignChains> {
        ForeignChains::read(&mut self.nftables, networks, None)
    }

    /// Like [`ForeignTables::chains`], without rules that certainly match none of the
    /// `lost` packets.
    ///
    /// # Errors
    /// When the chains cannot be listed.
    pub fn chains_that_may_drop(
        &mut self,
        networks: &[IpNet],
        lost: &LostPackets,
    ) -> io::Result<ForeignChains> {
        ForeignChains::read(&mut self.nftables, networks, Some(lost))
    }

    /// Returns foreign chains that may prevent pods from resolving the gateway of this subnet.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn chains_around_gateway(&mut self, network: IpNet) -> io::Result<Vec<DroppingChain>> {
        ForeignChains::read_around_gateway(&mut self.nftables, network)
    }

    /// Returns foreign chains that may drop packets between this host itself and a network.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn chains_at(&mut self, at: OwnHook, network: IpNet) -> io::Result<Vec<DroppingChain>> {
        ForeignChains::read_at(&mut self.nftables, at, network)
    }

    /// Returns foreign chains that translate the source of packets that leave this host.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn translating_chains(&mut self, ipv4: bool) -> io::Result<Vec<String>> {
        translating_chains(&mut self.nftables, ipv4)
    }

    /// Returns foreign chains that give incoming packets another destination.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn redirecting_chains(&mut self, ipv4: bool) -> io::Result<Vec<String>> {
        redirecting_chains(&mut self.nftables, ipv4)
    }

    /// Returns the rules of other programs, including those of iptables-legacy.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn rules(&mut self, legacy: Vec<LegacyTable>) -> io::Result<ForeignRules> {
        ForeignRules::read(&mut self.nftables, legacy)
    }

    /// Returns foreign rules that affect only some of these packets.
    pub fn partial_rules(
        &mut self,
        rules: &mut ForeignRules,
        traffic: &Traffic<'_>,
    ) -> Vec<Partial> {
        rules.partial(&mut self.nftables, traffic)
    }

    /// Returns foreign chains that give UDP packets to a port of this host another destination.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn redirected_port(&mut self, ipv4: bool, port: u16) -> io::Result<BTreeSet<String>> {
        redirected_port(&mut self.nftables, ipv4, port)
    }

    /// Returns foreign base chains with those of the UDP `ports` that they close.
    ///
    /// # Errors
    /// When chains or rules cannot be listed.
    pub fn closed_ports(&mut self, ports: &[u16]) -> io::Result<BTreeSet<ClosedPort>> {
        closed_ports(&mut self.nftables, ports)
    }
}
