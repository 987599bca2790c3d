//! The loop's side of Docker's plugin: endpoints are pods that Docker gives addresses to before it names
//! them.
//!
//! An address is reserved under its container's MAC, for the endpoint has no name yet; then it is the
//! endpoint's until Docker deletes that. Everything is on disk before it is answered.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::oneshot::Sender;

use super::{Agent, pod_address::NotGiven, pods::record, vanished_pods::PendingRequest};
use crate::{
    api::{PodError, PodErrorKind},
    docker::{self, Endpoint, EndpointInterface, OWNER, Request},
    model::{Attachment, Mac, Pod},
    pods::{
        PodRequest,
        bridge::Bridge,
        gateway,
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
    /// Answers Docker, now or when this node has a subnet.
    pub(super) fn on_docker(&mut self, request: Request) {
        let is_early = request.needs_subnet() && !self.has_subnet_in_use();
        if is_early && self.store_problem().is_none() {
            self.pods.early.push((Instant::now(), request));
        } else {
            self.answer_docker(request);
        }
    }

    /// Answers what has waited for this node's subnet.
    pub(super) fn answer_early(&mut self) {
        let is_ready = self.has_subnet_in_use();
        let may_be_answered =
            |(_, request): &mut (Instant, Request)| is_ready || !request.needs_subnet();
        let ready: Vec<_> = self.pods.early.extract_if(.., may_be_answered).collect();
        // Docker has had an answer to the others.
        let waiting = ready.into_iter().filter(|(since, _)| since.elapsed() < docker::TIMEOUT);
        waiting.for_each(|(_, request)| self.answer_docker(request));
    }

    fn answer_docker(&mut self, request: Request) {
        match request {
            Request::Pool { ipv6, reply } => _ = reply.send(self.docker_pool(ipv6)),
            Request::Network { pools, reply } => _ = reply.send(self.docker_network(&pools)),
            Request::Gateway { pool, reply } => {
                let gateway = |subnet: IpNet| with_length(gateway(subnet), subnet);
                let _ = reply.send(self.own_subnet(pool).map(gateway));
            }
            Request::Reserve { pool, address, mac, reply } => {
                self.reserve(Reservation { pool, address, mac, reply });
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
            Request::Join { endpoint, sandbox, reply } => {
                self.join(Join { endpoint, sandbox, reply });
            }
            Request::Delete { endpoint, reply } => match attachment(&endpoint) {
                Err(error) => _ = reply.send(Err(error)),
                Ok(attachment) => self.remove_endpoint(&attachment, reply),
            },
        }
    }

    fn docker_pool(&self, ipv6: bool) -> Result<IpNet, PodError> {
        let subnets = self.ready_bridge()?.subnets;
        let found = subnets.iter().find(|subnet| subnet.addr().is_ipv6() == ipv6);
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        found.ok_or_else(|| PodError::invalid(format!("this overlay has no {family}")))
    }

    fn docker_network(&self, pools: &[IpNet]) -> Result<u32, PodError> {
        pools.iter().try_for_each(|pool| self.own_subnet(*pool).map(drop))?;
        Ok(self.ready_bridge()?.mtu)
    }

    /// The subnet that a pool stands for: this node's one of its family, unless its user has named one.
    fn own_subnet(&self, pool: IpNet) -> Result<IpNet, PodError> {
        if pool.prefix_len() == 0 {
            return self.docker_pool(pool.addr().is_ipv6());
        }
        let subnets = self.ready_bridge()?.subnets;
        let found = subnets.iter().find(|subnet| *subnet == pool.trunc());
        found.ok_or_else(|| {
            PodError::invalid(format!(
                "pool {pool}: this node's subnet is {}: create the network again, with \
                 --ipam-driver gossamer and without --subnet",
                subnets.first
            ))
        })
    }

    fn reserve(&mut self, reservation: Reservation) {
        match self.find_or_reserve(&reservation) {
            // A container that is gone may stand in the way: one that did not survive a power cut.
            Err(NotGiven::Address(error)) if error.is_pod_conflict() => {
                self.check_gone_pods(PendingRequest::Reserve(reservation));
            }
            result => self.answer_reservation(reservation, result),
        }
    }

    /// The second try, when those that are gone have given back what they had.
    pub(super) fn reserve_again(&mut self, reservation: Reservation) {
        let result = self.find_or_reserve(&reservation);
        self.answer_reservation(reservation, result);
    }

    fn answer_reservation(
        &mut self,
        Reservation { reply, .. }: Reservation,
        result: Result<(Pod, IpNet), NotGiven>,
    ) {
        match result {
            Err(error) => _ = reply.send(Err(error.into())),
            Ok((pod, subnet)) => {
                let given = pod.addresses.iter().find(|ip| subnet.contains(ip));
                let given = with_length(given.unwrap_or(pod.addresses.first), subnet);
                self.save_then(&pod, move |saved| _ = reply.send(saved.map(|()| given)));
            }
        }
    }

    fn find_or_reserve(&mut self, reservation: &Reservation) -> Result<(Pod, IpNet), NotGiven> {
        let address = reservation.address;
        let subnet = self.own_subnet(reservation.pool)?;
        let name = match (&reservation.mac, address) {
            (Some(mac), _) => format!("{BY_MAC}{}", mac.digits()),
            (None, Some(address)) => {
                format!("{BY_ADDRESS}{}", address.to_string().replace(':', "-"))
            }
            (None, None) => {
                return Err(PodError::invalid("an address for a container without a MAC").into());
            }
        };
        let attachment = attachment(&name)?;
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
            return Err(PodError::new(PodErrorKind::Address, why).into());
        }
        self.drop_old_reservations();
        let bridge = self.ready_bridge()?;
        let mac = reservation.mac;
        if let Some(mac) = mac {
            self.expect_free_docker_mac(mac, &attachment, address, bridge.subnets.first)?;
        }
        let addresses = address.into_iter().collect();
        let wish = PodRequest {
            attachment,
            owner: OWNER.to_owned(),
            netns: String::new(),
            addresses,
            mac,
        };
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
        self.detach_then(attachment, None, move |result| _ = reply.send(result.map(drop)));
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
        // A network of one family takes no more, and must not be told of routes of the other.
        if addresses.len() == 1 {
            self.pods.table.drop_second(&attachment);
        }
        Ok(())
    }

    fn save_endpoint(&mut self, endpoint: &str, reply: Sender<Result<(), PodError>>) {
        match self.endpoint(endpoint).cloned() {
            Ok(pod) => self.save_then(&pod, move |saved| _ = reply.send(saved)),
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    fn join(&mut self, join: Join) {
        // It may be one that Docker has taken the container out of, while no agent ran.
        if self.other_in_sandbox(&join).is_some() {
            self.check_gone_pods(PendingRequest::Join(join));
        } else {
            self.join_now(join);
        }
    }

    /// When pods that are gone have given back what they had.
    pub(super) fn join_now(&mut self, join: Join) {
        let entered = self.enter_sandbox(&join);
        let reply = join.reply;
        match entered {
            Err(error) => _ = reply.send(Err(error)),
            Ok((bridge, pod, routes)) => {
                let joined = EndpointInterface { interface: loose_name(&pod.attachment), routes };
                let answer =
                    move |result: Result<_, PodError>| _ = reply.send(result.map(|_| joined));
                self.connect(bridge, pod, End::Loose, Box::new(answer));
            }
        }
    }

    /// A pod that the container of an endpoint is already.
    fn other_in_sandbox(&self, Join { endpoint, sandbox, .. }: &Join) -> Option<&Pod> {
        let is_other = |pod: &&Pod| {
            pod.owner == OWNER && pod.netns == *sandbox && pod.attachment.container() != endpoint
        };
        self.pods.table.iter().filter(|_| !sandbox.is_empty()).find(is_other)
    }

    /// Notes which container an endpoint is of. Gives the routes that the container gets along with it.
    fn enter_sandbox(&mut self, join: &Join) -> Result<Entered, PodError> {
        let attachment = self.endpoint(&join.endpoint)?.attachment.clone();
        let bridge = self.ready_bridge()?;
        // Docker would fail when it sets the second address, and leave the container without routes.
        if let Some(other) = self.other_in_sandbox(join) {
            return Err(PodError::invalid(format!(
                "the container is in a network of gossamer already and has {} there: all networks of \
                 gossamer lead to the same overlay, and Docker does not take a second address of it: \
                 leave this one out",
                other.addresses.first
            )));
        }
        let sandbox = join.sandbox.clone();
        let moved = self.pods.table.rename(&attachment, attachment.clone(), sandbox).cloned();
        let pod = moved
            .ok_or_else(|| PodError::invalid(format!("endpoint {}: it is gone", join.endpoint)))?;
        let routes = bridge.networks.iter().filter_map(|network| {
            let own = bridge.subnets.iter().find(|subnet| network.contains(subnet))?;
            let has = pod.addresses.iter().any(|ip| network.contains(&ip));
            has.then(|| (network, gateway(own)))
        });
        let routes = routes.collect();
        Ok((bridge, pod, routes))
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

    fn save_then(&mut self, pod: &Pod, answer: impl FnOnce(Result<(), PodError>) + Send + 'static) {
        let number = self.pods.next();
        self.writer.save(vec![record(pod)], number);
        self.pods.saving.insert(number, Box::new(answer));
    }
}

/// Asks for an address of a pool, any or a certain one, for the container that will have this MAC.
pub(super) struct Reservation {
    pool: IpNet,
    address: Option<IpAddr>,
    mac: Option<Mac>,
    reply: Sender<Result<IpNet, PodError>>,
}

impl Reservation {
    pub(super) fn refuse(self, error: PodError) {
        let _ = self.reply.send(Err(error));
    }
}

/// Asks for an interface for an endpoint, for the container in this sandbox.
pub(super) struct Join {
    endpoint: Endpoint,
    sandbox: String,
    reply: Sender<Result<EndpointInterface, PodError>>,
}

impl Join {
    pub(super) fn refuse(self, error: PodError) {
        let _ = self.reply.send(Err(error));
    }
}

/// What an endpoint is plugged into, its pod, and the container's routes.
type Entered = (Bridge, Pod, Vec<(IpNet, IpAddr)>);

fn attachment(name: &str) -> Result<Attachment, PodError> {
    Attachment::new(name, INTERFACE).map_err(PodError::invalid)
}

/// No endpoint has it yet.
fn is_reservation(attachment: &Attachment) -> bool {
    [BY_MAC, BY_ADDRESS].iter().any(|prefix| attachment.container().starts_with(prefix))
}

/// It is held for as long as a network of Docker's is there.
pub(super) fn is_of_a_network(pod: &Pod) -> bool {
    pod.owner == OWNER && pod.attachment.container().starts_with(BY_ADDRESS)
}
