//! Third phase: which underlay carries the tunnels, and what the kernel forbids.

use std::net::IpAddr;

use super::{
    StartFailure,
    host_view::{self, HostView},
    identity::Identity,
    memory::Memory,
    wait::StartupWait,
};
use crate::{
    config::Config,
    model::NodeId,
    netlink::Netlink,
    underlay::{self, ChosenUnderlay, UnderlayError},
    wire::{Key, Record},
};

/// The host on which the agent will run.
pub(super) struct Preflight {
    /// This host's end of the underlay.
    pub(super) underlay: ChosenUnderlay,
    /// Name of the pods' bridge.
    pub(super) bridge: String,
    /// The state of the kernel.
    pub(super) view: HostView,
}

impl Preflight {
    /// Reads the kernel. Waits for it, and for an underlay if none is `chosen`. Returns `None` if a
    /// signal ends the agent first.
    ///
    /// # Errors
    /// Fails if no network can satisfy the settings, or another program's objects conflict with the overlay.
    pub(super) async fn check(
        config: &Config,
        chosen: Option<ChosenUnderlay>,
        identity: &Identity,
        waiting: &mut StartupWait<'_>,
    ) -> Result<Option<Self>, StartFailure> {
        let chosen = match chosen {
            Some(chosen) => Some(chosen),
            None => waiting.wait_for_underlay(config).await?,
        };
        let Some(underlay) = chosen else { return Ok(None) };
        let known = identity.known_cluster.map(|cluster| cluster.settings);
        let plan = config.planned_overlay(known, Some(underlay.local));
        let bridge = config.bridge_name(plan.vni);
        let view = waiting.retry_kernel(|| host_view::inspect(&plan, &bridge)).await?;
        Ok(view.map(|view| Self { underlay, bridge, view }))
    }
}

/// Chooses the underlay. Returns the last one for a known member without a network, and `None` for a
/// new node, which waits for one.
///
/// # Errors
/// Fails if the MTU is too small, or if no netlink socket can be opened.
pub(super) fn choose_underlay(
    config: &Config,
    memory: &Memory,
) -> Result<Option<ChosenUnderlay>, StartFailure> {
    let (me, records) = (memory.key.id(), &memory.stored.records);
    let peers = records.iter().filter_map(|(_, record)| match record {
        Record::Member(member) if member.node != me => Some(member.vtep.underlay),
        _ => None,
    });
    match underlay::choose(&mut Netlink::open()?, config, peers) {
        Ok(chosen) => Ok(Some(chosen)),
        Err(error @ UnderlayError::Mtu { .. }) => Err(error.into()),
        Err(error) => {
            let saved = saved_underlay(memory.underlay, records, me);
            if saved.is_some() {
                tracing::warn!(%error, "starting without an underlay");
            }
            Ok(saved)
        }
    }
}

/// Returns the underlay that a known member had when its host last had a network; `None` for a new node.
fn saved_underlay(
    saved: Option<(IpAddr, u32)>,
    records: &[(Key, Record)],
    me: NodeId,
) -> Option<ChosenUnderlay> {
    let own = records.iter().find_map(|(_, record)| match record {
        Record::Member(member) if member.node == me => Some(member.vtep.underlay),
        _ => None,
    });
    let local = own.map(|published| saved.map_or(published, |(local, _)| local));
    let mtu = saved.map(|(_, mtu)| mtu);
    local.map(|local| ChosenUnderlay::remembered(local, mtu))
}
