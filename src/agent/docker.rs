//! The loop's side of Docker's plugin: endpoints are pods that Docker gives addresses to before it names
//! them.
//!
//! An address is reserved under its container's MAC, for the endpoint has no name yet; then it is the
//! endpoint's until Docker deletes that. Everything is on disk before it is answered.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use ipnet::IpNet;
use tokio::sync::oneshot::Sender;

use super::{Agent, pods::record, wirer::Job};
use crate::{
    api::{PodError, PodErrorKind},
    docker::{Joined, OWNER, Request},
    model::{Attachment, Mac, Pod, Subnets},
    pods::{
        Wish, gateway,
        wiring::{End, loose_name},
        with_length,
    },
};

/// In the place of an interface's name: Docker chooses that itself.
const INTERFACE: &str = "docker";
/// How the names of addresses begin that are held for a container, and for a network.
const BY_MAC: &str = "mac-";
const BY_ADDRESS: &str = "address-";
/// Docker names the container's place in the network a moment after it has asked for an address.
const RESERVED: Duration = Duration::from_secs(600);

impl Agent {
    pub(super) fn on_docker(&mut self, request: Request) {
        match request {
            Request::Pool { ipv6, named, reply } => self.docker_pool(ipv6, named, reply),
            Request::Network { pools, reply } => _ = reply.send(self.docker_network(&pools)),
            Request::Gateway { pool, reply } => {
                let gateway = |subnet: IpNet| with_length(gateway(subnet), subnet);
                let _ = reply.send(self.own_subnet(pool).map(gateway));
            }
            Request::Reserve { pool, address, mac, reply } => {
                self.reserve(pool, address, mac, reply);
            }
            Request::Release { address, reply } => self.release(address, reply),
            Request::Bind { endpoint, addresses, reply } => {
                if let Err(error) = self.bind(&endpoint, &addresses) {
                    let _ = reply.send(Err(error));
                } else {
                    self.save_endpoint(&endpoint, reply);
                }
            }
            Request::Find { endpoint, reply } => {
                let _ = reply.send(self.endpoint(&endpoint).map(drop));
            }
            Request::Join { endpoint, sandbox, reply } => self.join(&endpoint, sandbox, reply),
            Request::Delete { endpoint, reply } => match attachment(&endpoint) {
                Err(error) => _ = reply.send(Err(error)),
                Ok(attachment) => self.remove_endpoint(&attachment, reply),
            },
        }
    }

    fn docker_pool(&mut self, ipv6: bool, named: bool, reply: Sender<Result<IpNet, PodError>>) {
        let bridge = self.ready_bridge();
        let subnet = bridge.as_ref().map_err(PodError::clone).and_then(|bridge| {
            let found = bridge.subnets.iter().find(|subnet| subnet.addr().is_ipv6() == ipv6);
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            found.ok_or_else(|| PodError::invalid(format!("this overlay has no {family}")))
        });
        match (bridge, subnet) {
            (Ok(bridge), Ok(subnet)) if !named && !ipv6 => {
                // Docker would find the route of a bridge, ask for another pool, and so without end.
                if !self.pods.table.is_empty() {
                    let why = format!(
                        "this host has containers on {subnet} already, and Docker takes such a subnet only \
                         if it is named: add --subnet {subnet}"
                    );
                    let _ = reply.send(Err(PodError::invalid(why)));
                } else {
                    self.pods.bridge = None;
                    self.wirer.ask(Job::Vacate {
                        bridge: bridge.name,
                        table: bridge.table,
                        subnet,
                        reply,
                    });
                }
            }
            (_, subnet) => _ = reply.send(subnet),
        }
    }

    fn docker_network(&self, pools: &[IpNet]) -> Result<u32, PodError> {
        pools.iter().try_for_each(|pool| self.own_subnet(*pool).map(drop))?;
        Ok(self.ready_bridge()?.mtu)
    }

    /// A pool as this node has it now.
    fn own_subnet(&self, pool: IpNet) -> Result<IpNet, PodError> {
        let subnets = self.ready_bridge()?.subnets;
        let found = subnets.iter().find(|subnet| *subnet == pool.trunc());
        found.ok_or_else(|| {
            PodError::invalid(format!(
                "pool {pool}: this node's subnet is {}: create the network anew, with --ipam-driver gossamer",
                subnets.first
            ))
        })
    }

    fn reserve(
        &mut self,
        pool: IpNet,
        address: Option<IpAddr>,
        mac: Option<String>,
        reply: Sender<Result<IpNet, PodError>>,
    ) {
        match self.find_or_reserve(pool, address, mac.as_deref()) {
            Err(error) => _ = reply.send(Err(error)),
            Ok((pod, subnet)) => {
                let given = pod.addresses.iter().find(|ip| subnet.contains(ip));
                let given = with_length(given.unwrap_or(pod.addresses.first), subnet);
                self.save_then(&pod, move || _ = reply.send(Ok(given)));
            }
        }
    }

    fn find_or_reserve(
        &mut self,
        pool: IpNet,
        address: Option<IpAddr>,
        mac: Option<&str>,
    ) -> Result<(Pod, IpNet), PodError> {
        let subnet = self.own_subnet(pool)?;
        let who = match (mac, address) {
            (Some(mac), _) => format!("{BY_MAC}{}", mac.replace(':', "")),
            (None, Some(address)) => {
                format!("{BY_ADDRESS}{}", address.to_string().replace(':', "-"))
            }
            (None, None) => {
                return Err(PodError::invalid("an address for a container without a MAC"));
            }
        };
        let attachment = attachment(&who)?;
        if let Some(pod) = self.pods.table.get(&attachment) {
            // Of the other family, or asked for once more.
            if address.is_none_or(|address| pod.addresses.iter().any(|ip| ip == address)) {
                return Ok((pod.clone(), subnet));
            }
            let first = pod.addresses.first;
            self.forget_pod_unanswered(&attachment);
            let why = format!(
                "{} and {first}: a container has the same place in both subnets: give both addresses, \
                 --ip and --ip6, or none",
                address.unwrap_or(first)
            );
            return Err(PodError::new(PodErrorKind::Address, why));
        }
        self.drop_old_reservations();
        let bridge = self.ready_bridge()?;
        let addresses = address.into_iter().collect();
        let wish = Wish { attachment, owner: OWNER.to_owned(), netns: String::new(), addresses };
        let pod = self.pods.table.attach(self.clock.now(), bridge.subnets, wish)?.clone();
        Ok((pod, subnet))
    }

    fn release(&mut self, address: IpAddr, reply: Sender<Result<(), PodError>>) {
        // Not of a container that is there: Docker deletes that first. The address may have been given again
        // since, and this may be said for the second time.
        let is_free = |pod: &&Pod| pod.owner == OWNER && pod.netns.is_empty();
        match self.pods.table.holder(address).filter(is_free) {
            Some(pod) => self.remove_endpoint(&pod.attachment.clone(), reply),
            // What is not held is free already.
            None => _ = reply.send(Ok(())),
        }
    }

    fn remove_endpoint(&mut self, attachment: &Attachment, reply: Sender<Result<(), PodError>>) {
        self.detach_then(attachment, move |result| _ = reply.send(result.map(drop)));
    }

    fn bind(&mut self, endpoint: &str, addresses: &[IpAddr]) -> Result<(), PodError> {
        let attachment = attachment(endpoint)?;
        let not_ours = |address: &IpAddr| {
            PodError::invalid(format!(
                "address {address}: it was not given by gossamer: create the network with \
                 --ipam-driver gossamer"
            ))
        };
        let none = || PodError::invalid(format!("endpoint {endpoint}: it has no address"));
        let first = addresses.first().ok_or_else(none)?;
        let holder = self.pods.table.holder(*first).filter(|pod| pod.owner == OWNER);
        let holder = holder.ok_or_else(|| not_ours(first))?;
        if let Some(other) =
            addresses.iter().find(|ip| !holder.addresses.iter().any(|has| has == **ip))
        {
            return Err(not_ours(other));
        }
        if !addresses.contains(&holder.addresses.first) {
            let why = "it is in a network without the first family of the overlay";
            return Err(PodError::invalid(format!("endpoint {endpoint}: {why}")));
        }
        let held = holder.attachment.clone();
        if held == attachment {
            return Ok(());
        }
        if let Some(pod) = self.pods.table.get(&attachment) {
            let has = pod.addresses.first;
            return Err(PodError::invalid(format!("endpoint {endpoint}: it has {has} already")));
        }
        if !is_reservation(&held) {
            let why = format!("address {first}: endpoint {} has it", held.container());
            return Err(PodError::new(PodErrorKind::Address, why));
        }
        self.pods.table.rename(&held, attachment.clone(), String::new());
        if let Some(mac) = mac_in(&held) {
            self.pods.macs.insert(attachment.clone(), mac);
        }
        // A network of one family takes no more, and must not be told of routes of the other.
        if addresses.len() == 1 {
            self.pods.table.drop_second(&attachment);
        }
        Ok(())
    }

    fn save_endpoint(&mut self, endpoint: &str, reply: Sender<Result<(), PodError>>) {
        match self.endpoint(endpoint).cloned() {
            Ok(pod) => self.save_then(&pod, move || _ = reply.send(Ok(()))),
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    fn join(&mut self, endpoint: &str, sandbox: String, reply: Sender<Result<Joined, PodError>>) {
        let ready =
            self.endpoint(endpoint).cloned().and_then(|pod| Ok((self.ready_bridge()?, pod)));
        let (bridge, pod) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let attachment = pod.attachment;
        let Some(pod) = self.pods.table.rename(&attachment, attachment.clone(), sandbox) else {
            return;
        };
        let pod = pod.clone();
        let networks = self.kernel.wanted.as_ref().map(|view| view.settings.pool.networks());
        let routes = networks.into_iter().flat_map(Subnets::iter).filter_map(|network| {
            let same = |subnet: &IpNet| network.contains(subnet);
            let has = pod.addresses.iter().any(|ip| network.contains(&ip));
            Some((network, gateway(bridge.subnets.iter().find(same)?))).filter(|_| has)
        });
        let joined = Joined { interface: loose_name(&attachment), routes: routes.collect() };
        let answer = move |result: Result<_, PodError>| _ = reply.send(result.map(|_| joined));
        self.connect(bridge, pod, End::Loose, Box::new(answer));
    }

    fn endpoint(&self, endpoint: &str) -> Result<&Pod, PodError> {
        let unknown =
            || PodError::invalid(format!("endpoint {endpoint}: there is none of that name"));
        self.pods.table.get(&attachment(endpoint)?).ok_or_else(unknown)
    }

    fn forget_pod_unanswered(&mut self, attachment: &Attachment) {
        let number = self.pods.next();
        self.forget_pod(number, attachment);
    }

    /// Of containers that never came: what asked for an address may have ended right after.
    fn drop_old_reservations(&mut self) {
        let now = self.clock.now();
        let names = self.pods.table.iter().map(|pod| &pod.attachment);
        let held: BTreeSet<_> =
            names.filter(|name| name.container().starts_with(BY_MAC)).cloned().collect();
        self.pods.reserved.retain(|name, _| held.contains(name));
        for name in held {
            let since = *self.pods.reserved.entry(name.clone()).or_insert(now);
            if now.since(since) > RESERVED {
                self.forget_pod_unanswered(&name);
            }
        }
    }

    fn save_then(&mut self, pod: &Pod, answer: impl FnOnce() + Send + 'static) {
        let number = self.pods.next();
        self.writer.save(vec![record(pod)], number);
        self.pods.saving.insert(number, Box::new(answer));
    }
}

fn attachment(name: &str) -> Result<Attachment, PodError> {
    Attachment::new(name, INTERFACE).map_err(PodError::invalid)
}

/// Docker gives it to the container in any case.
fn mac_in(reservation: &Attachment) -> Option<Mac> {
    let digits = reservation.container().strip_prefix(BY_MAC)?;
    let number = u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 12)?;
    let [_, _, bytes @ ..] = number.to_be_bytes();
    Some(Mac::from_bytes(bytes))
}

/// No endpoint has it yet.
fn is_reservation(attachment: &Attachment) -> bool {
    [BY_MAC, BY_ADDRESS].iter().any(|prefix| attachment.container().starts_with(prefix))
}

/// It is held for as long as a network of Docker's is there.
pub(super) fn is_of_a_network(pod: &Pod) -> bool {
    pod.owner == OWNER && pod.attachment.container().starts_with(BY_ADDRESS)
}
