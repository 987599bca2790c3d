//! The Helm chart: its default values render the manifests, and other values render what they describe.

use std::{collections::BTreeMap, fs, io::Write as _, process::Command};

use serde_json::{Value, json};

use super::manifests::{MANIFESTS, list, objects, text};
use crate::common::{program, skipped};

const CHART: &str = "config/chart";

/// Renders the chart. Returns the objects, or Helm's error; None without Helm.
fn render(values: &Value) -> Option<Result<Vec<Value>, String>> {
    let mut file = tempfile::Builder::new().suffix(".json").tempfile().expect("a file");
    write!(file, "{values}").expect("written");
    let mut helm = Command::new("helm");
    helm.args(["template", "gossamer", CHART, "--namespace", "kube-system", "--values"]);
    let output = helm.arg(file.path()).output().ok()?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(match output.status.success() {
        true => Ok(objects(&said(&output.stdout))),
        false => Err(said(&output.stderr)),
    })
}

/// Skips a test where Helm is not installed.
macro_rules! rendered {
    ($test:literal, $values:expr) => {
        match render(&$values) {
            Some(rendered) => rendered,
            None => return skipped($test, "helm is not installed (tests/kubernetes/get-helm)"),
        }
    };
}

/// Returns objects by kind and name.
fn by_name(objects: Vec<Value>) -> BTreeMap<String, Value> {
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]);
    objects.into_iter().map(|object| (name(&object), object)).collect()
}

fn pod(object: &Value) -> &Value {
    &object["spec"]["template"]["spec"]
}

/// Returns the environment variables of the agent's container that have a literal value.
fn variables(set: &Value) -> BTreeMap<String, String> {
    let all = list(&pod(set)["containers"][0]["env"]).iter();
    let valued = all.filter(|variable| !variable["value"].is_null());
    valued.map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect()
}

#[test]
fn chart_with_defaults_renders_the_manifests() {
    for (manifest, source) in MANIFESTS.into_iter().zip(["podcidr", "gossip"]) {
        let values = json!({ "leaseSource": source });
        let made = rendered!("chart_with_defaults_renders_the_manifests", values);
        let made = by_name(made.expect("rendered"));
        let written = by_name(objects(&fs::read_to_string(manifest).expect(manifest)));
        assert_eq!(made.keys().collect::<Vec<_>>(), written.keys().collect::<Vec<_>>());
        for (name, object) in &written {
            assert_eq!(&made[name], object, "{manifest}: {name}");
        }
    }
    let lint = Command::new("helm").args(["lint", "--strict", CHART]).output().expect("helm");
    assert!(lint.status.success(), "{}", String::from_utf8_lossy(&lint.stdout));
}

#[test]
fn chart_values_appear_in_the_rendered_objects() {
    let values = json!({
        "network": "10.244.0.0/16",
        "network6": "fd00:10:244::/56",
        "ipMasq": false,
        "settings": { "mtu": 1400, "vni": 16_777_215, "guard": false, "voters": ["n1", "n2", "n3"] },
        "image": { "repository": "registry.example/gossamer", "tag": "9.9.9" },
        "imagePullSecrets": ["registry"],
        "secret": { "name": "overlay", "token": "gsm1-abc" },
        "cni": { "binDir": "/usr/lib/cni", "confDir": "/etc/cni/other" },
        "resources": { "limits": { "memory": "200Mi" } },
        "tolerations": [{ "key": "node.kubernetes.io/not-ready", "operator": "Exists" }],
        "nodeSelector": { "zone": "a" },
        "podAnnotations": { "example/scrape": "yes" },
        "maxUnavailable": "10%",
    });
    let made = rendered!("chart_values_appear_in_the_rendered_objects", values);
    let made = by_name(made.expect("rendered"));
    let set = &made["\"DaemonSet\" \"gossamer\""];
    let expected = [
        ("GOSSAMER_GUARD", "false"),
        ("GOSSAMER_MTU", "1400"),
        ("GOSSAMER_NETWORK", "10.244.0.0/16"),
        ("GOSSAMER_NETWORK6", "fd00:10:244::/56"),
        ("GOSSAMER_TOKEN_FILE", "/run/secrets/gossamer/token"),
        ("GOSSAMER_VNI", "16777215"),
        ("GOSSAMER_VOTERS", "n1,n2,n3"),
    ];
    assert_eq!(variables(set), expected.map(|(n, v)| (n.to_owned(), v.to_owned())).into());
    assert!(!list(&pod(set)["containers"][0]["args"]).contains(&json!("--ip-masq")));
    for container in [&pod(set)["containers"][0], &pod(set)["initContainers"][0]] {
        assert_eq!(container["image"], "registry.example/gossamer:9.9.9");
    }
    assert_eq!(pod(set)["imagePullSecrets"], json!([{ "name": "registry" }]));
    assert_eq!(pod(set)["containers"][0]["resources"]["limits"]["memory"], "200Mi");
    assert_eq!(pod(set)["tolerations"], values["tolerations"]);
    assert_eq!(pod(set)["nodeSelector"]["zone"], "a");
    assert_eq!(set["spec"]["template"]["metadata"]["annotations"], values["podAnnotations"]);
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], "10%");
    let volumes = pod(set)["volumes"].to_string();
    for path in ["/usr/lib/cni", "/etc/cni/other", "\"secretName\":\"overlay\""] {
        assert!(volumes.contains(path), "{path}: {volumes}");
    }
    let secret = &made["\"Secret\" \"overlay\""];
    assert_eq!(secret["stringData"], json!({ "token": "gsm1-abc" }));
}

#[test]
fn chart_with_gossip_leases_has_one_creator_and_passes_its_address() {
    let values = json!({
        "leaseSource": "gossip", "join": ["10.0.0.1", "n1.example"], "secret": { "token": "gsm1-abc" },
        "settings": { "iface": "eth1" }, "nodeSelector": { "zone": "a" },
    });
    let made = rendered!("chart_with_gossip_leases_has_one_creator_and_passes_its_address", values);
    let made = by_name(made.expect("rendered"));
    let file = text(&made["\"Secret\" \"gossamer\""]["stringData"]["gossamer.toml"]);
    let file: toml::Table = file.parse().expect("TOML");
    assert_eq!(file["join"].as_array().map(Vec::len), Some(2));
    for (name, first) in [("gossamer-first", Some("first")), ("gossamer", None)] {
        let set = &made[&format!("\"DaemonSet\" \"{name}\"")];
        assert_eq!(pod(set)["nodeSelector"]["gossamer"].as_str(), first);
        assert_eq!(pod(set)["nodeSelector"]["zone"], "a");
        // A configured interface takes the place of the node's own address.
        let env = list(&pod(set)["containers"][0]["env"]).iter();
        let interfaces: Vec<_> = env.filter(|one| one["name"] == "GOSSAMER_IFACE").collect();
        assert_eq!(interfaces.len(), 1, "{interfaces:?}");
        assert_eq!(interfaces[0]["value"], "eth1");
    }
}

#[test]
fn unknown_chart_values_are_rejected_by_name() {
    for (values, named) in [
        (json!({ "netwrok": "10.0.0.0/16" }), "netwrok"),
        (json!({ "network": "10.0.0.0" }), "network"),
        (json!({ "settings": { "mtuu": 1400 } }), "mtuu"),
        // These settings have their own place in the values.
        (json!({ "settings": { "network": "10.0.0.0/16" } }), "network"),
        (json!({ "settings": { "mtu": { "a": 1 } } }), "mtu"),
        (json!({ "leaseSource": "etcd" }), "leaseSource"),
        (json!({ "image": { "tga": "1" } }), "tga"),
        (json!({ "join": ["10.0.0.1"] }), "secret.token"),
        (json!({ "leaseSource": "gossip", "secret": { "token": "a" } }), "gossamer=first"),
    ] {
        let made = rendered!("unknown_chart_values_are_rejected_by_name", values);
        let error = made.expect_err(named);
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn documented_chart_values_render_as_written() {
    let page = fs::read_to_string("docs/KUBERNETES.md").expect("the page");
    let blocks = page.split("```yaml\n").filter_map(|block| block.split("\n```").next());
    let example = blocks.into_iter().find(|block| block.starts_with("# mine.yaml"));
    let values = objects(example.expect("an example")).remove(0);
    let made = rendered!("documented_chart_values_render_as_written", values);
    let made = by_name(made.expect("rendered"));
    let variables = variables(&made["\"DaemonSet\" \"gossamer\""]);
    assert_eq!(variables.get("GOSSAMER_NETWORK6"), Some(&"fd00:10:244::/56".to_owned()));
    assert_eq!(variables.get("GOSSAMER_MTU"), Some(&"1400".to_owned()));
}

/// Needs no Helm.
#[test]
fn chart_has_this_version_and_its_schema_lists_existing_settings() {
    let read = |file: &str| fs::read_to_string(format!("{CHART}/{file}")).expect(file);
    let chart = objects(&read("Chart.yaml")).remove(0);
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));

    let help = Command::new(program()).args(["agent", "--help"]).output().expect("gossamer runs");
    let help = String::from_utf8_lossy(&help.stdout);
    let schema: Value = serde_json::from_str(&read("values.schema.json")).expect("JSON");
    let keys = list(&schema["properties"]["settings"]["propertyNames"]["enum"]);
    assert!(keys.len() > 20, "{keys:?}");
    for key in keys.iter().map(text) {
        let variable = format!("GOSSAMER_{}=", key.to_uppercase());
        assert!(help.contains(&variable), "{variable}");
    }
    // Each value has an entry in the schema, and each entry has a default.
    let defaults = objects(&read("values.yaml")).remove(0);
    let places = schema["properties"].as_object().expect("properties").keys();
    let defaults = defaults.as_object().expect("values").keys();
    let places: Vec<_> = places.filter(|place| *place != "global").collect();
    assert_eq!(places, defaults.collect::<Vec<_>>());
}
