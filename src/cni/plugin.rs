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
    config::INPUT_MAX,
    config::PodOptions,
    error::{CniError, code},
    loopback, netns,
    request::{CniRequest, Environment, Operation, VERSIONS},
    result::AddResult,
    routes,
};
use crate::{
    api::{
        self, ApiError, AttachRequest, Attached, AttachmentName, Checked, ClientError, PodError,
        PodErrorKind, PodStatus, Pods,
    },
    model::Attachment,
    pods::wiring::open_netns,
    runtime,
};

/// Environment variable that every runtime sets. Its presence distinguishes a plugin call from a command
/// line.
pub const COMMAND: &str = "CNI_COMMAND";
/// Time to wait for the agent. Runtimes wait longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time to wait for the agent when a pod ends. After that, the request is stored in the spool.
const DETACH_TIMEOUT: Duration = Duration::from_secs(5);
/// Time during which ADD is retried while the kernel removes a pod that holds the address.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Carries out the runtime's request. Prints the result or the error to standard output.
pub fn run() -> ExitCode {
    let environment: Environment = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .collect();
    let program = std::env::args_os().next().unwrap_or_default();
    let program = Path::new(&program).file_name().and_then(|name| name.to_str());
    let mut input = Vec::new();
    let newest = VERSIONS[VERSIONS.len() - 1];
    // One byte more than allowed, to detect a configuration that is too long.
    let done = match io::stdin().take(INPUT_MAX + 1).read_to_end(&mut input) {
        Err(error) => Err((CniError::new(code::IO, format!("stdin: {error}")), newest)),
        Ok(_) => CniRequest::parse(program.unwrap_or_default(), &environment, &input)
            .and_then(|request| carry_out(&request).map_err(|error| (error, request.version))),
    };
    let (answer, exit) = match done {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err((error, version)) => (Some(error.to_json(version)), ExitCode::FAILURE),
    };
    print_answer(answer.as_ref(), exit)
}

/// Prints the answer of a plugin. Returns a failure if it cannot be printed, because the runtime lacks it
/// then.
pub fn print_answer(answer: Option<&Value>, exit: ExitCode) -> ExitCode {
    let said = answer.map_or(Ok(()), |answer| writeln!(io::stdout(), "{answer}"));
    match said {
        Ok(()) => exit,
        Err(error) => {
            // `eprintln!` would panic if standard error is closed.
            let _ = writeln!(io::stderr(), "gossamer: cannot write the answer to stdout: {error}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(request: &CniRequest) -> Result<Option<Value>, CniError> {
    if matches!(request.operation, Operation::Version) {
        return Ok(Some(json!({
            "cniVersion": request.version,
            "supportedVersions": VERSIONS,
        })));
    }
    if request.loopback {
        return loopback::carry_out(request);
    }
    let socket = request.socket()?;
    match &request.operation {
        Operation::Add { attachment, netns, pod_options } => {
            add(request, &socket, attachment, netns, pod_options).map(Some)
        }
        Operation::Del { name, netns } => {
            disconnect(&socket, name, netns.as_deref())?;
            Ok(None)
        }
        Operation::Check { attachment, netns } => {
            let opened = netns::open("CNI_NETNS", netns)?;
            let again = opened.try_clone();
            let again =
                again.map_err(|error| netns::namespace_error("CNI_NETNS", netns, &error))?;
            let name = AttachmentName::from(attachment);
            let checked = await_answer(api::post_with(
                &socket,
                "/v1/pods/check",
                &name,
                Some(opened.into()),
            ))?;
            let Checked { addresses: has } = read(&socket, checked)?;
            let expected = request.config.previous_addresses(attachment.interface());
            compare(attachment.interface(), netns, &has, &expected)?;
            let expected = request.config.previous().map(routes::Expected::all);
            routes::compare(&again, netns, &expected.unwrap_or_default()).map(|()| None)
        }
        Operation::Gc { valid } => {
            let (owner, valid) = (request.owner(), valid.clone());
            let collecting = || collect(&socket, &owner, &valid);
            let note = Note::Collect { owner: owner.clone(), valid: valid.clone() };
            detach_or_store(&socket, &note, collecting)?;
            Ok(None)
        }
        Operation::Status => status(&socket).map(|()| None),
        Operation::Version => Ok(None),
    }
}

fn add(
    request: &CniRequest,
    socket: &Path,
    attachment: &Attachment,
    path: &Path,
    pod_options: &PodOptions,
) -> Result<Value, CniError> {
    let netns = netns::open("CNI_NETNS", path)?;
    let attach_request = AttachRequest {
        container: attachment.container().to_owned(),
        interface: attachment.interface().to_owned(),
        owner: request.owner(),
        netns: path.to_owned(),
        addresses: pod_options.addresses.clone(),
        mac: pod_options.mac,
        default_route: pod_options.default_route,
        others_first: false,
    };
    let attached = connect(socket, &attach_request, &netns)?;
    let shown = path.display().to_string();
    let result = AddResult::new(attachment.interface(), &shown, &attached, pod_options.dns.clone());
    Ok(result.to_json(request.version))
}

/// Connects a pod. Drops spooled requests about an earlier pod of the same name.
///
/// # Errors
/// If the agent cannot be reached or refuses the request.
pub fn connect(
    socket: &Path,
    attach_request: &AttachRequest,
    netns: &File,
) -> Result<Attached, ClientError> {
    let attached = read(socket, attach(socket, attach_request, netns)?)?;
    // Pending requests in the spool are about earlier pods.
    let spool = Spool::beside(socket);
    let (container, interface) =
        (attach_request.container.clone(), attach_request.interface.clone());
    spool.drop(&Note::Detach(AttachmentName { container, interface }));
    spool.drop(&Note::Collect { owner: attach_request.owner.clone(), valid: Vec::new() });
    Ok(attached)
}

/// Disconnects a pod. If no agent answers, stores the request in the spool and returns success.
///
/// # Errors
/// If the agent refuses the request.
pub fn disconnect(
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&Path>,
) -> Result<(), ClientError> {
    if Attachment::new(&name.container, &name.interface).is_err() {
        // ADD refuses this name, so no pod has it.
        return Ok(());
    }
    // The agent updates the routes of the pod's other interfaces. The namespace may be gone.
    let netns = netns.and_then(|path| open_netns(path).ok());
    detach_or_store(socket, &Note::Detach(name.clone()), || detach(socket, name, netns.as_ref()))
}

/// Sends the request to connect a pod. Retries while an address is about to become free.
fn attach(socket: &Path, body: &impl Serialize, netns: &File) -> Result<Value, ClientError> {
    let start = Instant::now();
    loop {
        let again = netns.try_clone().map_err(|error| broken(error.to_string()))?;
        match await_answer(api::post_with(socket, "/v1/pods/attach", body, Some(again.into()))) {
            Err(error) if is_retryable(&error) && start.elapsed() < REMOVAL_TIMEOUT => {
                thread::sleep(RETRY_INTERVAL);
            }
            answer => return answer,
        }
    }
}

fn is_retryable(error: &ClientError) -> bool {
    refusal(error).is_some_and(|refusal| refusal.again)
}

fn refusal(error: &ClientError) -> Option<PodError> {
    match error {
        ClientError::Refused { answer, .. } => serde_json::from_value(answer.clone()).ok(),
        _ => None,
    }
}

/// Disconnects a pod through the agent. Succeeds if the pod is not connected.
///
/// # Errors
/// If the agent cannot be reached or refuses the request.
pub fn detach(
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&File>,
) -> Result<(), ClientError> {
    detach_within(DETACH_TIMEOUT, socket, name, netns)
}

/// Like [`detach`], for a pod that is connected again directly afterwards. Waits as long as connecting does.
///
/// # Errors
/// If the agent cannot be reached or refuses the request.
pub fn detach_first(socket: &Path, name: &AttachmentName, netns: &File) -> Result<(), ClientError> {
    detach_within(ANSWER_TIMEOUT, socket, name, Some(netns))
}

fn detach_within(
    timeout: Duration,
    socket: &Path,
    name: &AttachmentName,
    netns: Option<&File>,
) -> Result<(), ClientError> {
    let netns = netns.and_then(|netns| netns.try_clone().ok()).map(OwnedFd::from);
    await_answer_for(timeout, api::post_with(socket, "/v1/pods/detach", name, netns)).map(drop)
}

/// Disconnects all pods of an owner that are not in `valid`. Continues after an error and returns the first
/// one.
fn collect(socket: &Path, owner: &str, valid: &[AttachmentName]) -> Result<(), ClientError> {
    let answer = await_answer_for(DETACH_TIMEOUT, api::get(socket, "/v1/pods"))?;
    let Pods { pods } = read(socket, answer)?;
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

/// Runs a request that ends pods. If the agent does not answer, stores the request in the spool.
fn detach_or_store(
    socket: &Path,
    note: &Note,
    work: impl Fn() -> Result<(), ClientError>,
) -> Result<(), ClientError> {
    let agent_hangs = match work() {
        Err(error) if is_unavailable(&error) => matches!(error, ClientError::Broken { .. }),
        done => return done,
    };
    let spool = Spool::beside(socket);
    if let Err(error) = spool.put(note) {
        // The agent still releases the addresses of pods whose veth pair is gone.
        eprintln!("gossamer: the agent does not answer, and the request is not stored: {error}");
        return Ok(());
    }
    // An agent that started in the meantime may have read the spool before the note was there. An agent that
    // hangs reads it once it continues.
    if !agent_hangs && work().is_ok() {
        spool.drop(note);
    }
    Ok(())
}

/// Returns whether the agent is unavailable now and able to carry out the request later.
fn is_unavailable(error: &ClientError) -> bool {
    match error {
        // An agent of another version is about to be restarted.
        ClientError::NoAgent { .. }
        | ClientError::NoAnswer(_)
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
    check_ready(&await_answer(api::get(socket, "/v1/status")).map_err(unavailable)?)
}

/// Checks from the agent's status whether pods can be connected. Earlier agents do not report `pods_refused`;
/// for them, a subnet in use is enough. Pods that keep addresses of another subnet do not prevent new pods
/// from being connected.
fn check_ready(status: &Value) -> Result<(), CniError> {
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

/// Checks that an interface has the addresses that `prevResult` lists for it.
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

/// Waits for an answer of the agent, at most 30 s.
///
/// # Errors
/// If the request fails or no answer arrives in time.
pub fn await_answer(
    answer: impl Future<Output = Result<Value, ClientError>>,
) -> Result<Value, ClientError> {
    await_answer_for(ANSWER_TIMEOUT, answer)
}

fn await_answer_for(
    timeout: Duration,
    answer: impl Future<Output = Result<Value, ClientError>>,
) -> Result<Value, ClientError> {
    let late = || Err(broken(format!("no answer within {} seconds", timeout.as_secs())));
    let answer = runtime::block_on(async {
        tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| late())
    });
    answer.unwrap_or_else(|error| Err(broken(error.to_string())))
}

fn broken(why: String) -> ClientError {
    ClientError::Broken { path: "the control socket".into(), why }
}

fn read<T: DeserializeOwned>(socket: &Path, answer: Value) -> Result<T, ClientError> {
    serde_json::from_value(answer).map_err(|error| {
        let error =
            await_answer(async { Err(api::other_version(socket, error.to_string()).await) });
        error.err().unwrap_or_else(|| ClientError::NoAnswer(ApiError::unanswered()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_fails_without_subnet_in_use_and_reports_pods_that_are_cut_off() {
        let status = |subnet: Value, in_sync: bool, outside: u64| {
            let kernel = json!({ "in_sync": in_sync });
            let status = json!({ "subnet": subnet, "kernel": kernel, "pods_outside": outside });
            check_ready(&status).map_err(|error| error.code)
        };
        assert_eq!(status("10.42.7.0/24".into(), true, 0), Ok(()));
        assert_eq!(status("10.42.9.0/24".into(), true, 2), Ok(()));
        assert_eq!(status(Value::Null, true, 0), Err(50));
        assert_eq!(status("10.42.7.0/24".into(), false, 0), Err(50));
        assert_eq!(status(Value::Null, false, 2), Err(51));
        let refusing = json!({
            "subnet": "10.42.7.0/24", "kernel": { "in_sync": true }, "pods_refused": "why not",
        });
        let error = check_ready(&refusing).expect_err("no pod can be connected");
        assert_eq!((error.code, error.msg.starts_with("why not")), (50, true));
    }
}
