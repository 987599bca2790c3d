//! Docker's questions and our answers. All of them can be asked again: Docker repeats what was lost.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
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
    api::{self, PodError},
    config::Instance,
    json::{self, Object},
    model::Mac,
};

/// Where Docker looks for sockets of plugins.
pub const DIRECTORY: &str = "/run/docker/plugins";
/// So long a request waits for this node's subnet. Docker tries a container that it restarts after a boot
/// only once.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// Longest request that is read, in bytes.
const REQUEST_MAX: usize = 1 << 20;

/// A question to the agent's loop.
#[derive(Debug)]
pub enum Request {
    /// This node's subnet of one family, for a new network.
    Pool {
        ipv6: bool,
        reply: Sender<Result<IpNet, PodError>>,
    },
    /// The MTU of networks, if they are of this node's subnets.
    Network {
        pools: Vec<IpNet>,
        reply: Sender<Result<u32, PodError>>,
    },
    /// The host's own address in a pool.
    Gateway {
        pool: IpNet,
        reply: Sender<Result<IpNet, PodError>>,
    },
    /// Any address of a pool, or a certain one, for the container that will have this MAC.
    Reserve {
        pool: IpNet,
        address: Option<IpAddr>,
        mac: Option<Mac>,
        reply: Sender<Result<IpNet, PodError>>,
    },
    Release {
        address: IpAddr,
        reply: Sender<Result<(), PodError>>,
    },
    /// Addresses that were reserved are of this endpoint.
    Bind {
        endpoint: Endpoint,
        addresses: Vec<IpAddr>,
        reply: Sender<Result<(), PodError>>,
    },
    /// Whether an endpoint is known.
    Find {
        endpoint: Endpoint,
        reply: Sender<Result<(), PodError>>,
    },
    /// An interface for an endpoint, for the container in this sandbox.
    Join {
        endpoint: Endpoint,
        sandbox: String,
        reply: Sender<Result<Joined, PodError>>,
    },
    Delete {
        endpoint: Endpoint,
        reply: Sender<Result<(), PodError>>,
    },
}

impl Request {
    /// Whether it can be answered only when this node has a subnet in use.
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

/// Docker's name of a container's place in a network.
pub type Endpoint = String;

/// What Docker moves into a container, and the routes that belong to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    pub interface: String,
    pub routes: Vec<(IpNet, IpAddr)>,
}

type Ask = Arc<dyn Fn(Request) -> bool + Send + Sync>;

/// Why there is no answer, in one sentence.
struct Refused(String);

/// The name of a driver is that of its socket.
pub fn socket_in(directory: &Path, instance: &Instance) -> PathBuf {
    directory.join(format!("{}.sock", instance.directory()))
}

/// Serves in a task of its own, until `closing` says that no more is answered than was asked before. `ask`
/// hands a request to the agent's loop.
pub fn handle(
    listener: UnixListener,
    closing: watch::Receiver<bool>,
    ask: impl Fn(Request) -> bool + Send + Sync + 'static,
) {
    let ask: Ask = Arc::new(ask);
    let router = Router::new()
        .fallback(post(respond))
        .layer(DefaultBodyLimit::max(REQUEST_MAX))
        .with_state(ask);
    let closing = api::Closing::when(closing);
    let serving =
        api::serve_connections_until(closing, listener, api::Excess::Waits, router, |_| {
            |_: &mut _| {}
        });
    tokio::spawn(serving);
}

async fn respond(State(ask): State<Ask>, uri: Uri, body: Bytes) -> Response {
    let method = uri.path().trim_start_matches('/');
    // The two drivers' errors have two names.
    let error = if method.starts_with("IpamDriver.") { "Error" } else { "Err" };
    match answer(&ask, method, &body).await {
        Some(Ok(value)) => axum::Json(value).into_response(),
        Some(Err(Refused(why))) => {
            tracing::warn!(%why, "refused Docker's {method}");
            axum::Json(json!({ error: why })).into_response()
        }
        None => {
            let why = format!("{method} is not implemented");
            (StatusCode::NOT_FOUND, axum::Json(json!({ error: why }))).into_response()
        }
    }
}

async fn answer(ask: &Ask, method: &str, body: &[u8]) -> Option<Result<Value, Refused>> {
    Some(match method {
        "Plugin.Activate" => Ok(json!({ "Implements": ["NetworkDriver", "IpamDriver"] })),
        // A global scope is for Swarm; containers of several hosts reach each other without.
        "NetworkDriver.GetCapabilities" => {
            Ok(json!({ "Scope": "local", "ConnectivityScope": "global" }))
        }
        "NetworkDriver.CreateNetwork" => create_network(ask, body).await,
        "NetworkDriver.CreateEndpoint" => create_endpoint(ask, body).await,
        "NetworkDriver.EndpointOperInfo" => find(ask, body).await.map(|()| json!({ "Value": {} })),
        "NetworkDriver.DeleteEndpoint" => delete_endpoint(ask, body).await,
        "NetworkDriver.Join" => join(ask, body).await,
        // The interface goes with the endpoint. Docker also leaves what was taken back after a power cut.
        "NetworkDriver.Leave"
        | "NetworkDriver.DeleteNetwork"
        | "NetworkDriver.ProgramExternalConnectivity"
        | "NetworkDriver.RevokeExternalConnectivity"
        | "NetworkDriver.DiscoverNew"
        | "NetworkDriver.DiscoverDelete"
        | "IpamDriver.ReleasePool" => Ok(json!({})),
        // All that was given is on disk: a repetition could not be told from somebody else's request.
        "IpamDriver.GetCapabilities" => {
            Ok(json!({ "RequiresMACAddress": true, "RequiresRequestReplay": false }))
        }
        "IpamDriver.GetDefaultAddressSpaces" => Ok(json!({
            "LocalDefaultAddressSpace": "gossamer",
            "GlobalDefaultAddressSpace": "gossamer",
        })),
        "IpamDriver.RequestPool" => request_pool(ask, body).await,
        "IpamDriver.RequestAddress" => request_address(ask, body).await,
        "IpamDriver.ReleaseAddress" => release_address(ask, body).await,
        _ => return None,
    })
}

async fn create_network(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let request: CreateNetwork = parse(body)?;
    let pools = request.ipv4.iter().chain(&request.ipv6);
    let pools: Vec<IpNet> = pools.map(|data| read("Pool", &data.pool)).collect::<Result<_, _>>()?;
    let mtu = put(ask, |reply| Request::Network { pools, reply }).await?;
    for (name, value) in request.options() {
        let said = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if name != MTU || said != mtu.to_string() {
            return Err(Refused(format!(
                "option {name}={said}: there are no options (the MTU is {mtu}): leave it out"
            )));
        }
    }
    Ok(json!({}))
}

async fn create_endpoint(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let EndpointRequest { endpoint, interface, .. } = parse(body)?;
    mac("MacAddress", &interface.mac)?;
    let given = [("Address", interface.address), ("AddressIPv6", interface.address6)];
    let given = given.iter().filter(|(_, text)| !text.is_empty());
    let addresses: Vec<IpAddr> = given
        .map(|(field, text)| read::<IpNet>(field, text).map(|address| address.addr()))
        .collect::<Result<_, _>>()?;
    put(ask, |reply| Request::Bind { endpoint, addresses, reply }).await?;
    // Addresses and MAC are Docker's already.
    Ok(json!({ "Interface": {} }))
}

async fn find(ask: &Ask, body: &[u8]) -> Result<(), Refused> {
    let EndpointRequest { endpoint, .. } = parse(body)?;
    put(ask, |reply| Request::Find { endpoint, reply }).await
}

async fn delete_endpoint(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let EndpointRequest { endpoint, .. } = parse(body)?;
    put(ask, |reply| Request::Delete { endpoint, reply }).await?;
    Ok(json!({}))
}

async fn join(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let EndpointRequest { endpoint, sandbox, .. } = parse(body)?;
    let joined = put(ask, |reply| Request::Join { endpoint, sandbox, reply }).await?;
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

async fn request_pool(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let RequestPool { pool, sub_pool, options, v6 } = parse(body)?;
    let named = (!pool.is_empty()).then(|| read::<IpNet>("subnet", &pool)).transpose()?;
    if !sub_pool.is_empty() {
        let why = "containers get addresses of the node's whole subnet: leave it out";
        return Err(Refused(format!("ip-range {sub_pool}: {why}")));
    }
    if let Some((name, value)) = options.first_key_value() {
        return Err(Refused(format!("ipam-opt {name}={value}: there are none: leave it out")));
    }
    let subnet = put(ask, |reply| Request::Pool { ipv6: v6, reply }).await?;
    let pool = match named {
        None => any_subnet(v6),
        Some(named) if named.trunc() == subnet => subnet,
        Some(named) => {
            return Err(Refused(format!(
                "subnet {named}: this node's is {subnet}: give that, or none"
            )));
        }
    };
    Ok(json!({ "PoolID": pool, "Pool": pool, "Data": {} }))
}

async fn request_address(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let request: AddressRequest = parse(body)?;
    let pool: IpNet = read("PoolID", &request.pool)?;
    let address: Option<IpAddr> =
        (!request.address.is_empty()).then(|| read("Address", &request.address)).transpose()?;
    let given = if request.is_for_gateway() {
        let gateway = put(ask, |reply| Request::Gateway { pool, reply }).await?;
        if address.is_some_and(|address| address != gateway.addr()) {
            let ours = gateway.addr();
            let why = format!("gateway {}: it is {ours} in every network", request.address);
            return Err(Refused(format!("{why}: leave it out")));
        }
        gateway
    } else {
        let mac = mac("MAC", request.mac().unwrap_or_default())?;
        put(ask, |reply| Request::Reserve { pool, address, mac, reply }).await?
    };
    Ok(json!({ "Address": given, "Data": {} }))
}

async fn release_address(ask: &Ask, body: &[u8]) -> Result<Value, Refused> {
    let request: AddressRequest = parse(body)?;
    let address: IpAddr = read("Address", &request.address)?;
    put(ask, |reply| Request::Release { address, reply }).await?;
    Ok(json!({}))
}

/// The pool of a network whose user has named none: whichever subnet this node has.
///
/// Docker compares a pool with the routes of the host, finds that of the bridge or those of other nodes,
/// asks for another pool, and so without end. It does not compare this one.
const fn any_subnet(ipv6: bool) -> IpNet {
    if ipv6 {
        IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0))
    } else {
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0))
    }
}

/// Asks the loop, and waits for a node that has no subnet yet.
async fn put<T>(
    ask: &Ask,
    request: impl FnOnce(Sender<Result<T, PodError>>) -> Request,
) -> Result<T, Refused> {
    match tokio::time::timeout(TIMEOUT, api::submit(&**ask, request)).await {
        Ok(Some(result)) => result.map_err(|error| Refused(error.error)),
        Ok(None) => Err(Refused(
            "gossamer's agent gave no answer: it is ending, or has too much to do".to_owned(),
        )),
        Err(_) => Err(Refused(format!(
            "this node has had no subnet in use for {} s: see `gossamer status`",
            TIMEOUT.as_secs()
        ))),
    }
}

/// All requests that are read have a body. Docker repeats one whose answer is lost, but the body only once.
fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refused> {
    if body.is_empty() {
        return Err(Refused(
            "Docker repeated a request without its content, for gossamer's agent ended before it answered: \
             start the container again"
                .to_owned(),
        ));
    }
    let request: Result<Option<Object<T>>, _> = json::read(body);
    let request = request.map_err(|error| Refused(format!("the request: {error}")))?;
    Ok(request.unwrap_or_default().0)
}

/// A container's MAC; none, where Docker names none.
fn mac(field: &str, text: &str) -> Result<Option<Mac>, Refused> {
    if text.is_empty() {
        return Ok(None);
    }
    let mac: Mac = read(field, text)?;
    match mac.is_assignable() {
        true => Ok(Some(mac)),
        false => Err(Refused(format!("{field} {mac}: it is not that of one interface"))),
    }
}

fn read<T: std::str::FromStr<Err: std::fmt::Display>>(
    field: &str,
    text: &str,
) -> Result<T, Refused> {
    text.parse().map_err(|error| Refused(format!("{field} {text:?}: {error}")))
}
