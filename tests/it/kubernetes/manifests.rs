//! The manifests are valid for Kubernetes, and the program understands their settings.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use gossamer::lab::{Agent, Host};
use serde::Deserialize as _;
use serde_json::Value;

use crate::common::{program, skipped};

pub const MANIFESTS: [&str; 2] = ["config/kubernetes.yaml", "config/kubernetes-gossip.yaml"];

pub fn objects(text: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(text)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .filter(|object| !object.is_null())
        .collect()
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

pub fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| panic!("no text: {value}"), str::to_owned)
}

/// Returns the pods of a manifest's `DaemonSets`.
fn pods(manifest: &str) -> Vec<Value> {
    let objects = objects(&fs::read_to_string(manifest).expect(manifest));
    let sets = objects.into_iter().filter(|object| object["kind"] == "DaemonSet");
    let pods: Vec<Value> = sets.map(|set| set["spec"]["template"]["spec"].clone()).collect();
    assert!(!pods.is_empty(), "{manifest}");
    pods
}

/// Starts an agent as a kubelet starts the container of `config/kubernetes.yaml`: with its arguments, its
/// environment and the files of its secret. `more` is what a kustomization adds to the environment.
pub fn start_as_kubelet(
    host: &Host,
    node_ip: &str,
    secret: &str,
    service: &[(&'static str, String)],
    more: &[(&'static str, &str)],
) -> anyhow::Result<Agent> {
    let pod = pods(MANIFESTS[0]).remove(0);
    let container = list(&pod["containers"])[0].clone();
    let mut variables: BTreeMap<String, String> = BTreeMap::new();
    for variable in list(&container["env"]) {
        let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            Some("spec.nodeName") => host.name.clone(),
            Some("status.hostIP") => node_ip.to_owned(),
            Some(other) => panic!("{other}"),
            None => text(&variable["value"]),
        };
        variables.insert(text(&variable["name"]), value);
    }
    for volume in list(&pod["volumes"]).iter().filter(|volume| !volume["secret"].is_null()) {
        let mounts = list(&container["volumeMounts"]).iter();
        for mount in mounts.filter(|mount| mount["name"] == volume["name"]) {
            let directory = PathBuf::from(text(&mount["mountPath"]));
            fs::create_dir_all(&directory)?;
            let file = directory.join("token");
            fs::write(&file, secret)?;
            fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o400))?;
        }
    }
    variables.extend(service.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    variables.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let arguments: Vec<String> = list(&container["args"]).iter().map(text).collect();
    let (agent, arguments) = arguments.split_first().expect("arguments");
    assert_eq!(agent, "agent");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let variables: Vec<(&str, String)> =
        variables.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    Ok(Agent::start_with(program(), host, &arguments, &variables)?)
}

/// Helm takes over the objects that it is told to, and no others.
#[test]
fn documented_helm_adoption_covers_all_objects_of_the_manifest() {
    let page = fs::read_to_string("docs/KUBERNETES.md").expect("a page");
    let line = page.lines().find_map(|line| line.strip_prefix("OBJECTS=")).expect("a list");
    let mut named: Vec<&str> = line.trim_matches('"').split(' ').collect();
    named.sort_unstable();
    let made = objects(&fs::read_to_string(MANIFESTS[0]).expect("a manifest"));
    let name = |object: &Value| {
        let kind = text(&object["kind"]).to_lowercase();
        format!("{kind}/{}", text(&object["metadata"]["name"]))
    };
    let mut made: Vec<String> = made.iter().map(name).collect();
    made.sort_unstable();
    assert_eq!(named, made);
}

/// Uses the schemas in the Python package `kubernetes-validate`.
#[test]
fn manifests_match_the_kubernetes_schemas() {
    let validate = Command::new("kubernetes-validate").arg("--strict").args(MANIFESTS).output();
    match validate {
        Err(_) => {
            let why = "kubernetes-validate is not installed (pip)";
            skipped("manifests_match_the_kubernetes_schemas", why);
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("daemonset/gossamer "), "{output:?}");
        }
    }
}

#[test]
fn manifests_use_existing_settings() {
    let help = Command::new(program()).args(["agent", "--help"]).output().expect("gossamer runs");
    let help = String::from_utf8_lossy(&help.stdout);
    let mut names = 0;
    for manifest in MANIFESTS {
        for pod in pods(manifest) {
            let container = &list(&pod["containers"])[0];
            let flags = list(&container["args"]).iter().map(text).filter(|flag| flag != "agent");
            let flags = flags.map(|flag| flag.split('=').next().unwrap_or_default().to_owned());
            let variables = list(&container["env"]).iter().map(|variable| text(&variable["name"]));
            for name in flags.chain(variables) {
                assert!(help.contains(&name), "{manifest}: {name}");
                names += 1;
            }
        }
    }
    assert!(names > 10, "{names}");
}

#[test]
fn manifest_pods_restart_without_the_api_server_and_have_minimal_rights() {
    let image = format!("gossamer:{}", env!("CARGO_PKG_VERSION"));
    for manifest in MANIFESTS {
        for pod in pods(manifest) {
            // The kubelet has to query the API server for these when a container starts.
            let whole = pod.to_string();
            assert!(
                !whole.contains("secretKeyRef") && !whole.contains("configMapKeyRef"),
                "{whole}"
            );
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
            let node_ip = |variable: &Value| {
                variable["name"] == "GOSSAMER_IFACE"
                    && variable["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIP"
            };
            assert!(list(&pod["containers"][0]["env"]).iter().any(node_ip), "{manifest}");
            for container in list(&pod["containers"]).iter().chain(list(&pod["initContainers"])) {
                assert_eq!(text(&container["image"]), image, "{manifest}");
                let rights = &container["securityContext"];
                assert_eq!(rights["readOnlyRootFilesystem"], true);
                assert_eq!(rights["capabilities"]["drop"][0], "ALL");
            }
        }
    }
}

/// Returns the value of an environment variable of the agent in the output of kustomize.
fn variable(objects: &[Value], name: &str) -> String {
    let set = objects.iter().find(|object| object["kind"] == "DaemonSet").expect("a DaemonSet");
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let found = list(&container["env"]).iter().find(|variable| variable["name"] == name);
    found.map(|variable| text(&variable["value"])).unwrap_or_default()
}

/// The example of docs/KUBERNETES.md is applied to the base.
#[test]
fn kustomize_renders_the_manifest_from_the_base_and_applies_the_example() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let build = |directory: &std::path::Path| {
        let output = Command::new("kubectl").arg("kustomize").arg(directory).output();
        output.ok().map(|output| {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            objects(&String::from_utf8_lossy(&output.stdout))
        })
    };
    let Some(mut base) = build(&root.join("config")) else {
        let test = "kustomize_renders_the_manifest_from_the_base_and_applies_the_example";
        return skipped(test, "kubectl is not installed");
    };
    let mut plain = objects(&fs::read_to_string(root.join(MANIFESTS[0])).expect("a manifest"));
    let by_kind = |object: &Value| object["kind"].to_string();
    base.sort_by_key(by_kind);
    plain.sort_by_key(by_kind);
    // kubectl reads `0400` as YAML 1.1 does; this parser does not.
    let mode = |objects: &mut [Value]| {
        let sets = objects.iter_mut().filter(|object| object["kind"] == "DaemonSet");
        for volume in sets.flat_map(|set| {
            set["spec"]["template"]["spec"]["volumes"].as_array_mut().expect("volumes")
        }) {
            if let Some(secret) = volume["secret"].as_object_mut() {
                secret.remove("defaultMode");
            }
        }
    };
    mode(&mut base);
    mode(&mut plain);
    assert_eq!(base, plain);

    let page = fs::read_to_string(root.join("docs/KUBERNETES.md")).expect("the page");
    let example = page
        .split("```yaml\n")
        .filter_map(|block| block.split("\n```").next())
        .find(|block| block.contains("kind: Kustomization"))
        .expect("an example");
    // Next to the base, because kustomize resolves relative paths.
    let directory = tempfile::tempdir_in(root.join("target")).expect("a directory");
    let example = example.replace("../gossamer/config", "../../config");
    fs::write(directory.path().join("kustomization.yaml"), example).expect("written");
    let built = build(directory.path()).expect("kubectl is installed");
    assert_eq!(variable(&built, "GOSSAMER_NETWORK"), "10.244.0.0/16");
    assert_eq!(variable(&built, "GOSSAMER_NETWORK6"), "fd00:10:244::/56");
    let images = serde_json::to_string(&built).expect("JSON");
    assert!(images.contains("\"registry.example/gossamer:0.1.0\""), "{images}");
    assert!(!images.contains("\"gossamer:0.1.0\""), "{images}");
}
