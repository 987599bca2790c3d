//! One call of the plugin, from its environment to its exit code.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::IpAddr,
    os::fd::OwnedFd,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    Note, Spool,
    config::Wishes,
    error::{CniError, code},
    loopback, netns,
    request::{Asked, CniRequest, Environment, INPUT_MAX, VERSIONS},
    result::Made,
    routes,
};
use crate::{
    api::{
        self, AttachRequest, Attached, AttachmentName, ClientError, PodError, PodErrorKind,
        PodStatus,
    },
    model::Attachment,
    pods::wiring::open_netns,
};

/// A runtime sets it, and a person who types a command does not.
pub const COMMAND: &str = "CNI_COMMAND";
/// An agent that is silent for so long hangs. Runtimes wait longer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The end of a pod can be noted for an agent that is silent for so long.
const UNDO_PATIENCE: Duration = Duration::from_secs(5);
/// So long the kernel may take to remove pods that are gone, when their addresses are needed.
const VANISHING: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

/// Does what the runtime asks, with the answer or the error on standard output.
pub fn run() -> ExitCode {
    let environment: Environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .collect();
    let program = std::env::args_os().next().unwrap_or_default();
    let program = Path::new(&program).file_name().and_then(|name| name.to_str());
    let mut input = Vec::new();
    let newest = VERSIONS[VERSIONS.len() - 1];
    // One byte more than is allowed, so that a configuration that is too long is seen to be.
    let done = match io::stdin().take(INPUT_MAX + 1).read_to_end(&mut input) {
        Err(error) => Err((CniError::new(code::IO, format!("stdin: {error}")), newest)),
        Ok(_) => CniRequest::parse(program.unwrap_or_default(), &environment, &input)
            .and_then(|request| carry_out(&request).map_err(|error| (error, request.version))),
    };
    let (answer, exit) = match done {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err((error, version)) => (Some(error.to_json(version)), ExitCode::FAILURE),
    };
    say(answer.as_ref(), exit)
}

/// Prints the answer of a plugin. A runtime that does not get it must not believe that all is well.
pub fn say(answer: Option<&Value>, exit: ExitCode) -> ExitCode {
    let said = answer.map_or(Ok(()), |answer| writeln!(io::stdout(), "{answer}"));
    match said {
        Ok(()) => exit,
        Err(error) => {
            // Not by a macro, which panics where that cannot be written either.
            let _ = writeln!(io::stderr(), "gossamer: the answer cannot be written: {error}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(request: &CniRequest) -> Result<Option<Value>, CniError> {
    if matches!(request.asked, Asked::Version) {
        return Ok(Some(json!({
            "cniVersion": request.version,
            "supportedVersions": VERSIONS,
        })));
    }
    if request.loopback {
        return loopback::carry_out(request);
    }
    let socket = request.socket()?;
    match &request.asked {
        Asked::Add { attachment, netns, wishes } => {
            add(request, &socket, attachment, netns, wishes).map(Some)
        }
        Asked::Del { name, netns } => {
            disconnect(&socket, name, netns.as_deref())?;
            Ok(None)
        }
        Asked::Check { attachment, netns } => {
            let opened = netns::open("CNI_NETNS", netns)?;
            let again = opened.try_clone();
            let again = again.map_err(|error| netns::unusable("CNI_NETNS", netns, &error))?;
            let name = AttachmentName::from(attachment);
            let checked =
                ask(api::post_with(&socket, "/v1/pods/check", &name, Some(opened.into())))?;
            let has: Vec<IpAddr> = read(&socket, checked["addresses"].clone())?;
            let expected = request.config.previous_addresses(attachment.interface());
            compare(attachment.interface(), netns, &has, &expected)?;
            let expected = request.config.previous().map(routes::Expected::all);
            routes::compare(&again, netns, &expected.unwrap_or_default()).map(|()| None)
        }
        Asked::Gc { valid } => {
            let (owner, valid) = (request.owner(), valid.clone());
            let collecting = || collect(&socket, &owner, &valid);
            let note = Note::Collect { owner: owner.clone(), valid: valid.clone() };
            undo(&socket, &note, collecting)?;
            Ok(None)
        }
        Asked::Status => status(&socket).map(|()| None),
        Asked::Version => Ok(None),
    }
}

fn add(
    request: &CniRequest,
    socket: &Path,
    attachment: &Attachment,
    path: &Path,
    wishes: &Wishes,
) -> Result<Value, CniError> {
    let netns = netns::open("CNI_NETNS", path)?;
    let asked = AttachRequest {
        container: attachment.container().to_owned(),
        interface: attachment.interface().to_owned(),
        owner: request.owner(),
        netns: path.to_owned(),
        addresses: wishes.addresses.clone(),
        mac: wishes.mac,
        default_route: wishes.default_route,
        others_first: false,
    };
    let attached = connect(socket, &asked, &netns)?;
    let shown = path.display().to_string();
    let made = Made::new(attachment.interface(), &shown, &attached, wishes.dns.clone());
    Ok(made.to_json(request.version))
}

/// Connects a pod.
///
/// # Errors
/// Why the agent has not done it.
pub fn connect(
    socket: &Path,
    asked: &AttachRequest,
    netns: &File,
) -> Result<Attached, ClientError> {
    let attached = read(socket, attach(socket, asked, netns)?)?;
    // Whatever was asked for earlier and is not done yet was not about this pod.
    let spool = Spool::beside(socket);
    let (container, interface) = (asked.container.clone(), asked.interface.clone());
    spool.drop(&Note::Detach(AttachmentName { container, interface }));
    spool.drop(&Note::Collect { owner: asked.owner.clone(), valid: Vec::new() });
    Ok(attached)
}

/// Disconnects a pod, or notes it for the agent that is not there.
///
/// # Errors
/// Why the agent has not done it.
pub fn disconnect(
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&Path>,
) -> Result<(), ClientError> {
    if Attachment::new(&name.container, &name.interface).is_err() {
        // Nothing can have been connected by this name.
        return Ok(());
    }
    // Its other interfaces are given routes in there. It may be gone.
    let netns = netns.and_then(|path| open_netns(path).ok());
    undo(socket, &Note::Detach(name.clone()), || detach(socket, name, netns.as_ref()))
}

/// Waits for the kernel where what is needed is about to become free.
fn attach(socket: &Path, asked: &impl Serialize, netns: &File) -> Result<Value, ClientError> {
    let start = Instant::now();
    loop {
        let again = netns.try_clone().map_err(|error| broken(error.to_string()))?;
        match ask(api::post_with(socket, "/v1/pods/attach", asked, Some(again.into()))) {
            Err(error) if may_succeed_later(&error) && start.elapsed() < VANISHING => {
                thread::sleep(PAUSE);
            }
            answer => return answer,
        }
    }
}

fn may_succeed_later(error: &ClientError) -> bool {
    refusal(error).is_some_and(|refusal| refusal.again)
}

fn refusal(error: &ClientError) -> Option<PodError> {
    match error {
        ClientError::Refused { answer, .. } => serde_json::from_value(answer.clone()).ok(),
        _ => None,
    }
}

/// Where nothing is there, that is what was wanted.
///
/// # Errors
/// Why the agent has not done it.
pub fn detach(
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&File>,
) -> Result<(), ClientError> {
    detach_within(UNDO_PATIENCE, socket, name, netns)
}

/// The same for a pod that is connected at once afterwards: it waits for as long as that does.
///
/// # Errors
/// Why the agent has not done it.
pub fn detach_first(socket: &Path, name: &AttachmentName, netns: &File) -> Result<(), ClientError> {
    detach_within(TIMEOUT, socket, name, Some(netns))
}

fn detach_within(
    patience: Duration,
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&File>,
) -> Result<(), ClientError> {
    let netns = netns.and_then(|netns| netns.try_clone().ok()).map(OwnedFd::from);
    ask_for(patience, api::post_with(socket, "/v1/pods/detach", name, netns)).map(drop)
}

/// Removes what a network has connected and the runtime does not know any more: all that can be.
fn collect(socket: &Path, owner: &str, valid: &[AttachmentName]) -> Result<(), ClientError> {
    let answer = ask_for(UNDO_PATIENCE, api::get(socket, "/v1/pods"))?;
    let pods: Vec<PodStatus> = read(socket, answer["pods"].clone())?;
    let mut failed = Ok(());
    for PodStatus { container, interface, .. } in pods.into_iter().filter(|pod| pod.owner == owner)
    {
        let name = AttachmentName { container, interface };
        if !valid.contains(&name) {
            failed = failed.and(detach(socket, &name, None));
        }
    }
    failed
}

/// Does what ends pods, or notes it for the agent that is not there or does not answer.
fn undo(
    socket: &Path,
    note: &Note,
    work: impl Fn() -> Result<(), ClientError>,
) -> Result<(), ClientError> {
    let hangs = match work() {
        Err(error) if is_away(&error) => matches!(error, ClientError::Broken { .. }),
        done => return done,
    };
    let spool = Spool::beside(socket);
    if let Err(error) = spool.put(note) {
        // The agent takes back the addresses of pods that are gone by itself.
        eprintln!("gossamer: the agent does not answer, and nothing was noted for it: {error}");
        return Ok(());
    }
    // It may be back, and have read its notes a moment too early. One that hangs reads them when it goes on.
    if !hangs && work().is_ok() {
        spool.drop(note);
    }
    Ok(())
}

/// Whether the agent will be able to do it another time.
fn is_away(error: &ClientError) -> bool {
    match error {
        // One of another version is about to be restarted.
        ClientError::NoAgent { .. }
        | ClientError::NoAnswer
        | ClientError::OtherVersion { .. }
        | ClientError::Broken { .. } => true,
        ClientError::NotPermitted { .. } => false,
        ClientError::Refused { .. } => {
            refusal(error).is_some_and(|refusal| refusal.kind == PodErrorKind::NotReady)
        }
    }
}

fn status(socket: &Path) -> Result<(), CniError> {
    let unavailable = |error| CniError { code: code::NOT_AVAILABLE, ..CniError::from(error) };
    judge(&ask(api::get(socket, "/v1/status")).map_err(unavailable)?)
}

/// By the agent's own verdict. Earlier versions of it have none, and are judged by whether they have a subnet
/// in use. Pods that have kept addresses of another subnet do not keep new ones from being connected.
fn judge(status: &Value) -> Result<(), CniError> {
    let refused = status["pods_refused"].as_str();
    let in_use = !status["subnet"].is_null() && status["kernel"]["in_sync"] == true;
    if in_use && refused.is_none() {
        return Ok(());
    }
    let why = refused.unwrap_or("this node has no subnet in use yet");
    match status["pods_outside"].as_u64().unwrap_or(0) {
        cut_off @ 1.. if !in_use => {
            let why = format!(
                "{why}, and {cut_off} pods have addresses of a subnet that it has lost: see `gossamer status`"
            );
            Err(CniError::new(code::NOT_AVAILABLE_AND_CUT_OFF, why))
        }
        _ => Err(CniError::new(code::NOT_AVAILABLE, format!("{why}: see `gossamer status`"))),
    }
}

/// Whether an interface has what the results of this plugin and of others say of it.
fn compare(
    interface: &str,
    netns: &Path,
    has: &[IpAddr],
    expected: &[IpAddr],
) -> Result<(), CniError> {
    match expected.iter().find(|ip| !has.contains(ip)) {
        None => Ok(()),
        Some(ip) => {
            let netns = netns.display();
            let why = format!("interface {interface} in {netns} does not have {ip} of prevResult");
            Err(CniError::new(code::IO, why))
        }
    }
}

/// Asks the agent, and does not wait for ever.
///
/// # Errors
/// Why there is no answer.
pub fn ask(answer: impl Future<Output = Result<Value, ClientError>>) -> Result<Value, ClientError> {
    ask_for(TIMEOUT, answer)
}

fn ask_for(
    patience: Duration,
    answer: impl Future<Output = Result<Value, ClientError>>,
) -> Result<Value, ClientError> {
    let late = || Err(broken(format!("no answer within {} seconds", patience.as_secs())));
    let answer = api::block_on(async {
        tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| late())
    });
    answer.unwrap_or_else(|error| Err(broken(error.to_string())))
}

fn broken(why: String) -> ClientError {
    ClientError::Broken { path: "the control socket".into(), why }
}

fn read<T: DeserializeOwned>(socket: &Path, answer: Value) -> Result<T, ClientError> {
    serde_json::from_value(answer).map_err(|error| {
        let asked = ask(async { Err(api::other_version(socket, error.to_string()).await) });
        asked.err().unwrap_or(ClientError::NoAnswer)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_fails_only_without_a_subnet_in_use_and_says_whether_pods_are_cut_off() {
        let status = |subnet: Value, in_sync: bool, outside: u64| {
            let kernel = json!({ "in_sync": in_sync });
            let status = json!({ "subnet": subnet, "kernel": kernel, "pods_outside": outside });
            judge(&status).map_err(|error| error.code)
        };
        assert_eq!(status("10.42.7.0/24".into(), true, 0), Ok(()));
        assert_eq!(status("10.42.9.0/24".into(), true, 2), Ok(()));
        assert_eq!(status(Value::Null, true, 0), Err(50));
        assert_eq!(status("10.42.7.0/24".into(), false, 0), Err(50));
        assert_eq!(status(Value::Null, false, 2), Err(51));
        let refusing = json!({
            "subnet": "10.42.7.0/24", "kernel": { "in_sync": true }, "pods_refused": "why not",
        });
        let error = judge(&refusing).expect_err("no pod can be connected");
        assert_eq!((error.code, error.msg.starts_with("why not")), (50, true));
    }
}
