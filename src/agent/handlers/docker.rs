//! The event loop's side of Docker's plugin. Endpoints are pods to which Docker assigns addresses before it
//! names them.
//!
//! An address is reserved under the MAC of its container, as the endpoint has no name yet; then it belongs to
//! the endpoint until Docker deletes that. Everything is on disk before the reply.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::oneshot::Sender;

use crate::{
    agent::{
        Agent,
        pods::{
            address::{AddressError, NETWORK_PREFIX},
            record,
            vanished::{Join, PendingRequest, Reservation},
        },
    },
    api::{PodError, PodErrorKind},
    docker::{self, EndpointInterface, OWNER, Request},
    model::{Attachment, Pod, family_name},
    pods::{
        PodRequest,
        desired::Bridge,
        gateway,
        wiring::{End, loose_name},
        with_length,
    },
};

/// Stands for the name of the interface, which Docker chooses itself.
const INTERFACE: &str = "docker";
/// Prefix of the names of reservations for a container; its MAC follows.
const MAC_PREFIX: &str = "mac-";
/// How long a reservation for a container lasts. Docker creates its endpoint a moment after it requests the
/// address.
const RESERVATION_TIMEOUT: Duration = Duration::from_secs(600);

impl Agent {
    /// Answers a request of Docker, now or when this node has a subnet.
    pub(in crate::agent) fn on_docker(&mut self, request: Request) {
        let is_early = request.needs_subnet() && !self.has_subnet_in_use();
        if is_early && self.storage.failure().is_none() {
            self.pods.early_requests.push((Instant::now(), request));
        } else {
            self.answer_docker(request);
        }
    }

    /// Answers the requests that waited for this node's subnet.
    pub(in crate::agent) fn answer_early_docker_requests(&mut self) {
        let is_ready = self.has_subnet_in_use();
        let may_be_answered =
            |(_, request): &mut (Instant, Request)| is_ready || !request.needs_subnet();
        let ready: Vec<_> = self.pods.early_requests.extract_if(.., may_be_answered).collect();
        // Older ones have already timed out.
        let waiting = ready.into_iter().filter(|(since, _)| since.elapsed() < docker::TIMEOUT);
        waiting.for_each(|(_, request)| self.answer_docker(request));
    }

    /// Answers a request of Docker.
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

    /// Returns this node's subnet of a family.
    fn docker_pool(&self, ipv6: bool) -> Result<IpNet, PodError> {
        let subnets = self.ready_bridge()?.subnets;
        let found = subnets.iter().find(|subnet| subnet.addr().is_ipv6() == ipv6);
        found
            .ok_or_else(|| PodError::invalid(format!("this overlay has no {}", family_name(!ipv6))))
    }

    /// Checks the pools of a network, and returns its MTU in bytes.
    fn docker_network(&self, pools: &[IpNet]) -> Result<u32, PodError> {
        pools.iter().try_for_each(|pool| self.own_subnet(*pool).map(drop))?;
        Ok(self.ready_bridge()?.mtu)
    }

    /// Returns the subnet that a pool stands for: this node's subnet of that family, or a named subnet if it
    /// is this node's.
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

    /// Reserves an address, and looks for pods that no longer exist if one may hold it.
    fn reserve(&mut self, reservation: Reservation) {
        match self.find_or_reserve(&reservation) {
            // A container that no longer exists may hold the address, for example after a power cut.
            Err(AddressError::Address(error)) if error.is_pod_conflict() => {
                self.check_gone_pods(PendingRequest::Reserve(reservation));
            }
            result => self.answer_reservation(reservation, result),
        }
    }

    /// Repeats a reservation after pods that no longer exist have released their addresses.
    pub(in crate::agent) fn retry_reservation(&mut self, reservation: Reservation) {
        let result = self.find_or_reserve(&reservation);
        self.answer_reservation(reservation, result);
    }

    /// Replies to a reservation, once its record is on disk.
    fn answer_reservation(
        &mut self,
        Reservation { reply, .. }: Reservation,
        result: Result<(Pod, IpNet), AddressError>,
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

    /// Returns the record that holds the requested address for this container, or reserves one.
    fn find_or_reserve(&mut self, reservation: &Reservation) -> Result<(Pod, IpNet), AddressError> {
        let address = reservation.address;
        let subnet = self.own_subnet(reservation.pool)?;
        let name = match (&reservation.mac, address) {
            (Some(mac), _) => format!("{MAC_PREFIX}{}", mac.digits()),
            (None, Some(address)) => {
                format!("{NETWORK_PREFIX}{}", address.to_string().replace(':', "-"))
            }
            (None, None) => {
                return Err(PodError::invalid(
                    "request for an address without a MAC: no container or address is named",
                )
                .into());
            }
        };
        let attachment = attachment(&name)?;
        if let Some(pod) = self.pods.table.get(&attachment) {
            // Requested before, or for the other family.
            if address.is_none_or(|address| pod.addresses.iter().any(|ip| ip == address)) {
                return Ok((pod.clone(), subnet));
            }
            let first = pod.addresses.first;
            self.release_pod(&attachment);
            let why = format!(
                "{} and {first}: the addresses of a container have the same offset in both subnets: set both \
                 --ip and --ip6, or neither",
                address.unwrap_or(first)
            );
            return Err(PodError::new(PodErrorKind::Address, why).into());
        }
        self.drop_old_reservations();
        let bridge = self.ready_bridge()?;
        let mac = reservation.mac;
        if let Some(mac) = mac {
            self.check_docker_mac_is_free(mac, &attachment, address, bridge.subnets.first)?;
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

    /// Releases a reserved address.
    fn release(&mut self, address: IpAddr, reply: Sender<Result<(), PodError>>) {
        // Not if a container uses it: Docker deletes the endpoint first. This may be a repeated request for
        // an address that was assigned again since.
        let is_free = |pod: &&Pod| pod.owner == OWNER && pod.netns.is_empty();
        match self.pods.table.holder(address).filter(is_free) {
            Some(pod) => self.remove_endpoint(&pod.attachment.clone(), reply),
            // An address that is not reserved is free already.
            None => _ = reply.send(Ok(())),
        }
    }

    /// Disconnects and removes an endpoint.
    fn remove_endpoint(&mut self, attachment: &Attachment, reply: Sender<Result<(), PodError>>) {
        self.detach_then(attachment, None, move |result| _ = reply.send(result.map(drop)));
    }

    /// Turns the reservation of these addresses into an endpoint.
    fn bind(&mut self, endpoint: &str, addresses: &[IpAddr]) -> Result<(), PodError> {
        let attachment = attachment(endpoint)?;
        let foreign_address = |address: &IpAddr| {
            PodError::invalid(format!(
                "address {address}: not assigned by gossamer: create the network with \
                 --ipam-driver gossamer"
            ))
        };
        let none = || PodError::invalid(format!("endpoint {endpoint}: no address"));
        let first = addresses.first().ok_or_else(none)?;
        let holder = self.pods.table.holder(*first).filter(|pod| pod.owner == OWNER);
        let holder = holder.ok_or_else(|| foreign_address(first))?;
        if let Some(other) =
            addresses.iter().find(|ip| !holder.addresses.iter().any(|held| held == **ip))
        {
            return Err(foreign_address(other));
        }
        if !addresses.contains(&holder.addresses.first) {
            let why = "its network lacks the first address family of the overlay";
            return Err(PodError::invalid(format!("endpoint {endpoint}: {why}")));
        }
        let held = holder.attachment.clone();
        if held == attachment {
            return Ok(());
        }
        if let Some(pod) = self.pods.table.get(&attachment) {
            let present = pod.addresses.first;
            return Err(PodError::invalid(format!(
                "endpoint {endpoint}: already has address {present}"
            )));
        }
        if !is_reservation(&held) {
            let why = format!("address {first}: in use by endpoint {}", held.container());
            return Err(PodError::new(PodErrorKind::Address, why));
        }
        self.pods.table.rename(&held, attachment.clone(), String::new());
        // A network of one family uses no second address, and must not receive routes of the other family.
        if addresses.len() == 1 {
            self.pods.table.drop_second(&attachment);
        }
        Ok(())
    }

    /// Replies once the record of an endpoint is on disk.
    fn save_endpoint(&mut self, endpoint: &str, reply: Sender<Result<(), PodError>>) {
        match self.endpoint(endpoint).cloned() {
            Ok(pod) => self.save_then(&pod, move |saved| _ = reply.send(saved)),
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    /// Connects the container of an endpoint.
    fn join(&mut self, join: Join) {
        // Docker may have removed the container from the other network while no agent ran.
        if self.other_in_sandbox(&join).is_some() {
            self.check_gone_pods(PendingRequest::Join(join));
        } else {
            self.finish_join(join);
        }
    }

    /// Connects the container, after pods that no longer exist have released their addresses.
    pub(in crate::agent) fn finish_join(&mut self, join: Join) {
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

    /// Returns another endpoint of the same container.
    fn other_in_sandbox(&self, Join { endpoint, sandbox, .. }: &Join) -> Option<&Pod> {
        let is_other = |pod: &&Pod| {
            pod.owner == OWNER && pod.netns == *sandbox && pod.attachment.container() != endpoint
        };
        self.pods.table.iter().filter(|_| !sandbox.is_empty()).find(is_other)
    }

    /// Records the container of an endpoint. Returns the bridge, the pod and the routes of the container.
    fn enter_sandbox(&mut self, join: &Join) -> Result<SandboxEntry, PodError> {
        let attachment = self.endpoint(&join.endpoint)?.attachment.clone();
        let bridge = self.ready_bridge()?;
        // Docker would fail to set the second address, and leave the container without routes.
        if let Some(other) = self.other_in_sandbox(join) {
            return Err(PodError::invalid(format!(
                "the container is already in a network of gossamer, with address {}. All networks of \
                 gossamer belong to the same overlay, and Docker does not accept a second address of \
                 it: omit this network",
                other.addresses.first
            )));
        }
        let sandbox = join.sandbox.clone();
        let moved = self.pods.table.rename(&attachment, attachment.clone(), sandbox).cloned();
        let pod = moved.ok_or_else(|| {
            PodError::invalid(format!("endpoint {}: no longer exists", join.endpoint))
        })?;
        let routes = bridge.networks.iter().filter_map(|network| {
            let own = bridge.subnets.iter().find(|subnet| network.contains(subnet))?;
            let has_address = pod.addresses.iter().any(|ip| network.contains(&ip));
            has_address.then(|| (network, gateway(own)))
        });
        let routes = routes.collect();
        Ok((bridge, pod, routes))
    }

    /// Returns the pod of an endpoint.
    fn endpoint(&self, endpoint: &str) -> Result<&Pod, PodError> {
        let unknown = || PodError::invalid(format!("endpoint {endpoint}: no such endpoint"));
        self.pods.table.get(&attachment(endpoint)?).ok_or_else(unknown)
    }

    /// Releases the addresses of a pod without a reply.
    fn release_pod(&mut self, attachment: &Attachment) {
        let number = self.pods.next();
        self.forget_pod(number, attachment);
    }

    /// Releases reservations of containers that never came: the client may have ended after its request.
    fn drop_old_reservations(&mut self) {
        let now = self.clock.now();
        let names = self.pods.table.iter().map(|pod| &pod.attachment);
        let reserved: BTreeSet<_> =
            names.filter(|name| name.container().starts_with(MAC_PREFIX)).cloned().collect();
        self.pods.reserved.retain(|name, _| reserved.contains(name));
        for name in reserved {
            let since = *self.pods.reserved.entry(name.clone()).or_insert(now);
            if now.since(since) > RESERVATION_TIMEOUT {
                self.release_pod(&name);
            }
        }
    }

    /// Writes the record of a pod, and replies once it is on disk.
    fn save_then(&mut self, pod: &Pod, answer: impl FnOnce(Result<(), PodError>) + Send + 'static) {
        let number = self.pods.next();
        self.storage.writer.save(vec![record(pod)], number);
        self.pods.pending_saves.insert(number, Box::new(answer));
    }
}

impl Reservation {
    /// Replies with an error.
    pub(in crate::agent) fn refuse(self, error: PodError) {
        let _ = self.reply.send(Err(error));
    }
}

impl Join {
    /// Replies with an error.
    pub(in crate::agent) fn refuse(self, error: PodError) {
        let _ = self.reply.send(Err(error));
    }
}

/// The bridge of an endpoint, its pod, and the routes of the container.
type SandboxEntry = (Bridge, Pod, Vec<(IpNet, IpAddr)>);

/// Returns the attachment of an endpoint or a reservation.
fn attachment(name: &str) -> Result<Attachment, PodError> {
    Attachment::new(name, INTERFACE).map_err(PodError::invalid)
}

/// Whether the record is a reservation, without an endpoint.
fn is_reservation(attachment: &Attachment) -> bool {
    [MAC_PREFIX, NETWORK_PREFIX].iter().any(|prefix| attachment.container().starts_with(prefix))
}
