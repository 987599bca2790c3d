//! Serves Docker's requests. All of them are idempotent, because Docker repeats a request whose answer was
//! lost.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::post,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    net::UnixListener,
    sync::{oneshot::Sender, watch},
};

use super::message::{AddressRequest, CreateNetwork, EndpointRequest, MTU, RequestPool};
use crate::{
    api::{ApiError, PodError},
    http,
    json::{self, Object},
    model::Mac,
};

/// Time that a request waits for this node's subnet. After a boot, Docker tries to start a container only
/// once.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A request to the agent's loop. Each carries the channel for its reply.
#[derive(Debug)]
pub enum Request {
    /// Returns this node's subnet of one family, for a new network.
    Pool {
        /// Whether the IPv6 subnet is requested.
        ipv6: bool,
        /// Channel for the reply.
        reply: Sender<Result<IpNet, PodError>>,
    },
    /// Checks that the pools are this node's subnets, and returns the MTU of the network in bytes.
    Network {
        /// The network's pools.
        pools: Vec<IpNet>,
        /// Channel for the reply.
        reply: Sender<Result<u32, PodError>>,
    },
    /// Returns the host's own address in a pool.
    Gateway {
        /// One of this node's subnets, or the pool that stands for it.
        pool: IpNet,
        /// Channel for the reply.
        reply: Sender<Result<IpNet, PodError>>,
    },
    /// Reserves an address for a container.
    Reserve {
        /// One of this node's subnets, or the pool that stands for it.
        pool: IpNet,
        /// The requested address. `None`: any free one.
        address: Option<IpAddr>,
        /// The MAC that the container will have.
        mac: Option<Mac>,
        /// Channel for the reply.
        reply: Sender<Result<IpNet, PodError>>,
    },
    /// Releases an address.
    Release {
        /// The address.
        address: IpAddr,
        /// Channel for the reply.
        reply: Sender<Result<(), PodError>>,
    },
    /// Assigns reserved addresses to an endpoint.
    Bind {
        /// The endpoint.
        endpoint: Endpoint,
        /// Its addresses.
        addresses: Vec<IpAddr>,
        /// Channel for the reply.
        reply: Sender<Result<(), PodError>>,
    },
    /// Checks that an endpoint exists.
    Find {
        /// The endpoint.
        endpoint: Endpoint,
        /// Channel for the reply.
        reply: Sender<Result<(), PodError>>,
    },
    /// Creates the interface of an endpoint for a container.
    Join {
        /// The endpoint.
        endpoint: Endpoint,
        /// Path of the container's network namespace.
        sandbox: String,
        /// Channel for the reply.
        reply: Sender<Result<EndpointInterface, PodError>>,
    },
    /// Removes an endpoint with its interface and addresses.
    Delete {
        /// The endpoint.
        endpoint: Endpoint,
        /// Channel for the reply.
        reply: Sender<Result<(), PodError>>,
    },
}

impl Request {
    /// Returns whether the request can be answered only while this node has a subnet in use.
    pub const fn needs_subnet(&self) -> bool {
        match self {
            Self::Pool { .. }
            | Self::Network { .. }
            | Self::Gateway { .. }
            | Self::Reserve { .. }
            | Self::Join { .. } => true,
            Self::Release { .. } | Self::Bind { .. } | Self::Find { .. } | Self::Delete { .. } => {
                false
            }
        }
    }
}

/// Docker's id of a container's attachment to a network.
pub type Endpoint = String;

/// The interface that Docker moves into a container, with its routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointInterface {
    /// Name of the interface on the host.
    pub interface: String,
    /// Destination and gateway of each route.
    pub routes: Vec<(IpNet, IpAddr)>,
}

type SubmitFn = Arc<dyn Fn(Request) -> bool + Send + Sync>;

/// Why a request is refused, in one sentence for Docker's user.
struct Refusal(String);

/// Serves Docker's requests in a separate task. Once `closing` becomes true, it answers pending requests
/// and accepts no more. `submit` passes a request to the agent's loop and returns whether the loop took it.
pub fn handle(
    listener: UnixListener,
    closing: watch::Receiver<bool>,
    submit: impl Fn(Request) -> bool + Send + Sync + 'static,
) {
    let submit: SubmitFn = Arc::new(submit);
    let router = Router::new()
        .fallback(post(respond))
        // Connections limit the bodies.
        .layer(DefaultBodyLimit::disable())
        .with_state(submit);
    let closing = http::Closing::when(closing);
    let serving =
        http::serve_until(closing, listener, http::Excess::Waits, router, |_| |_: &mut _| {});
    tokio::spawn(serving);
}

async fn respond(State(submit): State<SubmitFn>, uri: Uri, body: Bytes) -> Response {
    let method = uri.path().trim_start_matches('/');
    // The two drivers report errors under different keys.
    let error = if method.starts_with("IpamDriver.") { "Error" } else { "Err" };
    match answer(&submit, method, &body).await {
        Some(Ok(value)) => axum::Json(value).into_response(),
        Some(Err(Refusal(why))) => {
            tracing::warn!(method, %why, "Docker request refused");
            axum::Json(json!({ error: why })).into_response()
        }
        None => {
            let why = format!("{method} is not implemented");
            (StatusCode::NOT_FOUND, axum::Json(json!({ error: why }))).into_response()
        }
    }
}

async fn answer(submit: &SubmitFn, method: &str, body: &[u8]) -> Option<Result<Value, Refusal>> {
    Some(match method {
        "Plugin.Activate" => Ok(json!({ "Implements": ["NetworkDriver", "IpamDriver"] })),
        // Scope "global" is for Swarm. Containers of several hosts reach each other without it.
        "NetworkDriver.GetCapabilities" => {
            Ok(json!({ "Scope": "local", "ConnectivityScope": "global" }))
        }
        "NetworkDriver.CreateNetwork" => create_network(submit, body).await,
        "NetworkDriver.CreateEndpoint" => create_endpoint(submit, body).await,
        "NetworkDriver.EndpointOperInfo" => {
            find(submit, body).await.map(|()| json!({ "Value": {} }))
        }
        "NetworkDriver.DeleteEndpoint" => delete_endpoint(submit, body).await,
        "NetworkDriver.Join" => join(submit, body).await,
        // DeleteEndpoint removes the interface. After a power cut Docker also sends Leave for endpoints that
        // no longer exist.
        "NetworkDriver.Leave"
        | "NetworkDriver.DeleteNetwork"
        | "NetworkDriver.ProgramExternalConnectivity"
        | "NetworkDriver.RevokeExternalConnectivity"
        | "NetworkDriver.DiscoverNew"
        | "NetworkDriver.DiscoverDelete"
        | "IpamDriver.ReleasePool" => Ok(json!({})),
        // Reservations are on disk, so Docker need not repeat them. A repetition would look like a new
        // request.
        "IpamDriver.GetCapabilities" => {
            Ok(json!({ "RequiresMACAddress": true, "RequiresRequestReplay": false }))
        }
        "IpamDriver.GetDefaultAddressSpaces" => Ok(json!({
            "LocalDefaultAddressSpace": "gossamer",
            "GlobalDefaultAddressSpace": "gossamer",
        })),
        "IpamDriver.RequestPool" => request_pool(submit, body).await,
        "IpamDriver.RequestAddress" => request_address(submit, body).await,
        "IpamDriver.ReleaseAddress" => release_address(submit, body).await,
        _ => return None,
    })
}

async fn create_network(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let request: CreateNetwork = parse(body)?;
    let pools = request.ipv4.iter().chain(&request.ipv6);
    let pools: Vec<IpNet> = pools.map(|data| read("Pool", &data.pool)).collect::<Result<_, _>>()?;
    let mtu = query(submit, |reply| Request::Network { pools, reply }).await?;
    for (name, value) in request.options() {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if name != MTU || text != mtu.to_string() {
            return Err(Refusal(format!(
                "option {name}={text}: not supported (the MTU is {mtu}): leave it out"
            )));
        }
    }
    Ok(json!({}))
}

async fn create_endpoint(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let EndpointRequest { endpoint, interface, .. } = parse(body)?;
    mac("MacAddress", &interface.mac)?;
    let fields = [("Address", interface.address), ("AddressIPv6", interface.address6)];
    let fields = fields.iter().filter(|(_, text)| !text.is_empty());
    let addresses: Vec<IpAddr> = fields
        .map(|(field, text)| read::<IpNet>(field, text).map(|address| address.addr()))
        .collect::<Result<_, _>>()?;
    query(submit, |reply| Request::Bind { endpoint, addresses, reply }).await?;
    // Docker already has the addresses and the MAC.
    Ok(json!({ "Interface": {} }))
}

async fn find(submit: &SubmitFn, body: &[u8]) -> Result<(), Refusal> {
    let EndpointRequest { endpoint, .. } = parse(body)?;
    query(submit, |reply| Request::Find { endpoint, reply }).await
}

async fn delete_endpoint(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let EndpointRequest { endpoint, .. } = parse(body)?;
    query(submit, |reply| Request::Delete { endpoint, reply }).await?;
    Ok(json!({}))
}

async fn join(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let EndpointRequest { endpoint, sandbox, .. } = parse(body)?;
    let joined = query(submit, |reply| Request::Join { endpoint, sandbox, reply }).await?;
    let routes: Vec<Value> = joined
        .routes
        .iter()
        .map(|(network, via)| json!({ "Destination": network, "RouteType": 0, "NextHop": via }))
        .collect();
    Ok(json!({
        "InterfaceName": { "SrcName": joined.interface, "DstPrefix": "eth" },
        "StaticRoutes": routes,
    }))
}

async fn request_pool(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let RequestPool { pool, sub_pool, options, v6 } = parse(body)?;
    let named = (!pool.is_empty()).then(|| read::<IpNet>("subnet", &pool)).transpose()?;
    if !sub_pool.is_empty() {
        let why = "containers get addresses from the node's whole subnet: leave it out";
        return Err(Refusal(format!("ip-range {sub_pool}: {why}")));
    }
    if let Some((name, value)) = options.first_key_value() {
        return Err(Refusal(format!("ipam-opt {name}={value}: not supported: leave it out")));
    }
    let subnet = query(submit, |reply| Request::Pool { ipv6: v6, reply }).await?;
    let pool = match named {
        None => any_subnet(v6),
        Some(named) if named.trunc() == subnet => subnet,
        Some(named) => {
            return Err(Refusal(format!(
                "subnet {named}: this node's subnet is {subnet}: request that one, or none"
            )));
        }
    };
    Ok(json!({ "PoolID": pool, "Pool": pool, "Data": {} }))
}

async fn request_address(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let request: AddressRequest = parse(body)?;
    let pool: IpNet = read("PoolID", &request.pool)?;
    let address: Option<IpAddr> =
        (!request.address.is_empty()).then(|| read("Address", &request.address)).transpose()?;
    let reserved = if request.is_for_gateway() {
        let gateway = query(submit, |reply| Request::Gateway { pool, reply }).await?;
        if address.is_some_and(|address| address != gateway.addr()) {
            let ours = gateway.addr();
            let why = format!("gateway {}: it is {ours} in every network", request.address);
            return Err(Refusal(format!("{why}: leave it out")));
        }
        gateway
    } else {
        let mac = mac("MAC", request.mac().unwrap_or_default())?;
        query(submit, |reply| Request::Reserve { pool, address, mac, reply }).await?
    };
    Ok(json!({ "Address": reserved, "Data": {} }))
}

async fn release_address(submit: &SubmitFn, body: &[u8]) -> Result<Value, Refusal> {
    let request: AddressRequest = parse(body)?;
    let address: IpAddr = read("Address", &request.address)?;
    query(submit, |reply| Request::Release { address, reply }).await?;
    Ok(json!({}))
}

/// Returns the pool of a network for which the user requests no subnet: `0.0.0.0/0` or `::/0`. It stands for
/// the subnet that this node has at the time.
///
/// Docker compares any other pool with the host's routes. Those of the bridge and of other nodes overlap with
/// the node's subnet, and Docker would request pools without end (docs/decisions/0016).
const fn any_subnet(ipv6: bool) -> IpNet {
    if ipv6 {
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))
    } else {
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0))
    }
}

/// Sends a request to the loop and waits for the reply, also while the node has no subnet yet.
async fn query<T>(
    submit: &SubmitFn,
    request: impl FnOnce(Sender<Result<T, PodError>>) -> Request,
) -> Result<T, Refusal> {
    match tokio::time::timeout(TIMEOUT, http::submit(&**submit, request)).await {
        Ok(Ok(result)) => result.map_err(|error| Refusal(error.error)),
        Ok(Err(dropped)) => Err(Refusal(ApiError::from(dropped).message)),
        Err(_) => Err(Refusal(format!(
            "this node has had no subnet in use for {} s: see `gossamer status`",
            TIMEOUT.as_secs()
        ))),
    }
}

/// Parses the body of a request. An empty body is an error: if the answer is lost, Docker repeats the request
/// once with its body and then without it.
fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refusal> {
    if body.is_empty() {
        return Err(Refusal(
            "Docker repeated a request without its content, because gossamer's agent ended before it \
             answered: start the container again"
                .to_owned(),
        ));
    }
    let request: Result<Option<Object<T>>, _> = json::read(body);
    let request = request.map_err(|error| Refusal(format!("the request: {error}")))?;
    Ok(request.unwrap_or_default().0)
}

/// Parses a container's MAC; `None` where Docker sends none.
fn mac(field: &str, text: &str) -> Result<Option<Mac>, Refusal> {
    if text.is_empty() {
        return Ok(None);
    }
    let mac: Mac = read(field, text)?;
    match mac.is_assignable() {
        true => Ok(Some(mac)),
        false => Err(Refusal(format!("{field} {mac}: must be unicast and not zero"))),
    }
}

fn read<T: std::str::FromStr<Err: std::fmt::Display>>(
    field: &str,
    text: &str,
) -> Result<T, Refusal> {
    text.parse().map_err(|error| Refusal(format!("{field} {text:?}: {error}")))
}
