//! One call of the plugin, from its environment to its exit code.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    path::Path,
    process::ExitCode,
};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    error::{CniError, code},
    request::{CniRequest, INPUT_MAX, VERSIONS, ValidAttachment, Verb},
    result::added,
};
use crate::{
    api::{self, AttachRequest, Attached, AttachmentName, PodStatus},
    model::Attachment,
};

/// A runtime sets it; whoever types a command does not.
pub const COMMAND: &str = "CNI_COMMAND";

/// Does what the runtime asks, with the answer or the error on standard output.
pub fn run() -> ExitCode {
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let mut input = Vec::new();
    let read = io::stdin().take(INPUT_MAX).read_to_end(&mut input);
    let read = read.map_err(|error| CniError::new(code::IO, format!("stdin: {error}")));
    let request = read.and_then(|_| CniRequest::parse(&environment, &input));
    let version = request.as_ref().map_or(VERSIONS[VERSIONS.len() - 1], |request| request.version);
    let (answer, exit) = match request.and_then(|request| carry_out(&request)) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Some(error.to_json(version)), ExitCode::FAILURE),
    };
    if let Some(answer) = answer {
        // The runtime that does not listen is told nothing.
        let _ = writeln!(io::stdout(), "{answer}");
    }
    exit
}

fn carry_out(request: &CniRequest) -> Result<Option<Value>, CniError> {
    let socket = request.socket()?;
    match (request.verb, &request.attachment, &request.netns) {
        (Verb::Add, Some(attachment), Some(netns)) => {
            add(request, &socket, attachment, netns).map(Some)
        }
        (Verb::Del, Some(attachment), _) => detach(&socket, attachment.into()).map(|()| None),
        (Verb::Version, ..) => Ok(Some(json!({
            "cniVersion": request.version,
            "supportedVersions": VERSIONS,
        }))),
        (Verb::Check, Some(attachment), _) => {
            let name = AttachmentName::from(attachment);
            ask(api::post_json(&socket, "/v1/pods/check", &name)).map(|_| None)
        }
        (Verb::Gc, ..) => collect(request, &socket).map(|()| None),
        (Verb::Status, ..) => status(&socket).map(|()| None),
        (verb, ..) => {
            Err(CniError::new(code::BAD_ENVIRONMENT, format!("{COMMAND}: {verb:?} cannot be done")))
        }
    }
}

fn add(
    request: &CniRequest,
    socket: &Path,
    attachment: &Attachment,
    netns: &Path,
) -> Result<Value, CniError> {
    let asked = AttachRequest {
        container: attachment.container().to_owned(),
        interface: attachment.interface().to_owned(),
        owner: request.owner(),
        netns: netns.to_owned(),
        addresses: request.addresses.clone(),
    };
    let answer = ask(api::post_json(socket, "/v1/pods/attach", &asked))?;
    let attached: Attached = read(answer)?;
    let shown = netns.display().to_string();
    Ok(added(request.version, attachment.interface(), &shown, &attached))
}

/// Where nothing is there, that is what was wanted.
fn detach(socket: &Path, name: AttachmentName) -> Result<(), CniError> {
    ask(api::post_json(socket, "/v1/pods/detach", &name)).map(drop)
}

/// Removes what this network has connected and the runtime does not know any more: all that can be.
fn collect(request: &CniRequest, socket: &Path) -> Result<(), CniError> {
    let valid = request.config.valid_attachments.as_ref().ok_or_else(|| {
        CniError::new(code::BAD_CONFIG, "cni.dev/valid-attachments is missing: nothing is removed")
    })?;
    let answer = ask(api::get(socket, "/v1/pods"))?;
    let pods: Vec<PodStatus> = read(answer["pods"].clone())?;
    let mut failed = Ok(());
    for PodStatus { container, interface, .. } in
        pods.into_iter().filter(|pod| pod.owner == request.owner())
    {
        let is_it = |known: &ValidAttachment| {
            (&known.container, &known.interface) == (&container, &interface)
        };
        if !valid.iter().any(is_it) {
            failed = failed.and(detach(socket, AttachmentName { container, interface }));
        }
    }
    failed
}

fn status(socket: &Path) -> Result<(), CniError> {
    let unavailable = |error: CniError| CniError { code: code::NOT_AVAILABLE, ..error };
    judge(&ask(api::get(socket, "/v1/status")).map_err(unavailable)?)
}

fn judge(status: &Value) -> Result<(), CniError> {
    let cut_off = status["pods_outside"].as_u64().unwrap_or(0);
    if cut_off > 0 {
        let why = format!(
            "{cut_off} pods have addresses of a subnet that this node has lost: start them anew"
        );
        return Err(CniError::new(code::NOT_AVAILABLE_AND_CUT_OFF, why));
    }
    if status["subnet"].is_null() || status["kernel"]["in_sync"] != true {
        let why = "this node has no subnet in use yet: see `gossamer status`";
        return Err(CniError::new(code::NOT_AVAILABLE, why));
    }
    Ok(())
}

fn ask(answer: impl Future<Output = Result<Value, api::ClientError>>) -> Result<Value, CniError> {
    let answer = api::block_on(answer).map_err(|error| CniError::new(code::IO, error))?;
    Ok(answer?)
}

fn read<T: DeserializeOwned>(answer: Value) -> Result<T, CniError> {
    let unreadable =
        |error| CniError::new(code::UNDECODABLE, format!("the agent's answer: {error}"));
    serde_json::from_value(answer).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_subnet_is_not_available_and_one_that_lost_it_cuts_pods_off() {
        let status = |subnet: Value, in_sync: bool, outside: u64| {
            let kernel = json!({ "in_sync": in_sync });
            let status = json!({ "subnet": subnet, "kernel": kernel, "pods_outside": outside });
            judge(&status).map_err(|error| error.code)
        };
        assert_eq!(status("10.42.7.0/24".into(), true, 0), Ok(()));
        assert_eq!(status(Value::Null, true, 0), Err(50));
        assert_eq!(status("10.42.7.0/24".into(), false, 0), Err(50));
        assert_eq!(status("10.42.9.0/24".into(), true, 2), Err(51));
        assert_eq!(status(Value::Null, false, 2), Err(51));
    }
}
