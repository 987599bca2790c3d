//! Requests of runtimes, valid and invalid.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{super::config::INPUT_MAX, *};
use crate::model::Mac;

type Answer = Result<CniRequest, (CniError, &'static str)>;

fn parse(environment: &[(&str, &str)], input: &str) -> Answer {
    let pairs = environment.iter().map(|(name, value)| ((*name).to_owned(), value.into()));
    CniRequest::parse("gossamer", &pairs.collect(), input.as_bytes())
}

const ADD: [(&str, &str); 4] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/c1"),
    ("CNI_IFNAME", "eth0"),
];
const CONFIG: &str = r#"{"cniVersion": "1.1.0", "name": "net", "type": "gossamer"}"#;

fn with<'a>(name: &'a str, value: &'a str) -> Vec<(&'a str, &'a str)> {
    let others = ADD.into_iter().filter(|(other, _)| *other != name);
    others.chain([(name, value)]).collect()
}

fn config(more: Value) -> String {
    let mut config = json!({ "cniVersion": "1.1.0", "name": "net", "type": "gossamer" });
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config.to_string()
}

fn pod_options(arguments: &str, more: Value) -> Result<PodOptions, CniError> {
    match parse(&with("CNI_ARGS", arguments), &config(more)) {
        Ok(CniRequest { operation: Operation::Add { pod_options, .. }, .. }) => Ok(pod_options),
        Ok(other) => panic!("{other:?}"),
        Err((error, _)) => Err(error),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn complete_request_is_parsed() {
    let request = parse(&ADD, CONFIG).expect("a request");
    assert_eq!((request.version, request.loopback), ("1.1.0", false));
    assert_eq!(request.owner(), "cni/net");
    assert_eq!(request.socket(), Ok(PathBuf::from("/run/gossamer/gossamer.sock")));
    let Operation::Add { attachment, netns, .. } = request.operation else { panic!("not ADD") };
    assert_eq!((attachment.container(), attachment.interface()), ("c1", "eth0"));
    assert_eq!(netns, Path::new("/run/netns/c1"));
    let request = parse(&ADD, &config(json!({ "instance": "blue" }))).expect("a request");
    assert_eq!(request.socket(), Ok(PathBuf::from("/run/gossamer-blue/gossamer.sock")));
}

#[test]
fn address_and_mac_are_read_from_each_source() {
    let mac = Some(Mac::from_bytes([2, 0, 0, 0, 0, 9]));
    let text = "02:00:00:00:00:09";
    for (arguments, more) in [
        ("IP=10.42.7.9;MAC=02-00-00-00-00-09", json!({})),
        ("", json!({ "runtimeConfig": { "ips": ["10.42.7.9/24"], "mac": text } })),
        ("", json!({ "args": { "cni": { "ips": ["10.42.7.9"], "mac": text } } })),
        ("IP=10.42.7.9", json!({ "runtimeConfig": { "ips": ["10.42.7.9"], "mac": text } })),
        ("IP=10.42.7.9", json!({ "mac": text })),
        ("IP=10.42.7.9;K8S_POD_NAME=a;IgnoreUnknown=1", json!({ "mac": text })),
    ] {
        let pod_options = pod_options(arguments, more.clone()).expect("wishes");
        assert_eq!(
            (pod_options.addresses, pod_options.mac),
            (vec![ip("10.42.7.9")], mac),
            "{more}"
        );
        assert!(pod_options.default_route);
    }
    let both = pod_options("IP=10.42.7.9,fd42::9", json!({ "isDefaultGateway": false }));
    let both = both.expect("wishes");
    assert_eq!(both.addresses, [ip("10.42.7.9"), ip("fd42::9")]);
    assert_eq!((both.mac, both.default_route), (None, false));
    // The pod's MAC overrides the network's.
    let both = json!({ "mac": "02:00:00:00:00:01", "runtimeConfig": { "mac": text } });
    assert_eq!(pod_options("", both).expect("wishes").mac, mac);
}

#[test]
fn dns_of_the_runtime_overrides_dns_of_the_network() {
    let network = json!({ "nameservers": ["10.0.0.1"], "domain": "a.test", "search": ["a.test"] });
    let dns = |more| pod_options("", more).expect("wishes").dns;
    assert_eq!(dns(json!({ "dns": network })), network);
    let runtime = json!({ "dns": { "servers": ["10.0.0.2"], "searches": ["b.test"] } });
    assert_eq!(
        dns(json!({ "dns": network, "runtimeConfig": runtime })),
        json!({ "nameservers": ["10.0.0.2"], "domain": "a.test", "search": ["b.test"] })
    );
    assert_eq!(dns(json!({ "dns": null, "runtimeConfig": { "dns": null } })), json!({}));
}

#[test]
fn null_and_unknown_keys_count_as_absent() {
    let nothing = json!({
        "name": null, "socket": null, "instance": null, "isDefaultGateway": null, "dns": null,
        "args": null, "prevResult": null, "mac": null, "capabilities": null,
        "runtimeConfig": { "ips": null, "mac": null, "bandwidth": null, "portMappings": [1] },
        "unknown": { "else": ["s"] },
    });
    let read = pod_options("", nothing).expect("wishes");
    assert_eq!(read, pod_options("", json!({ "runtimeConfig": null })).expect("wishes"));
    assert_eq!((read.addresses, read.mac, read.default_route), (vec![], None, true));
}

/// Returns a configuration with every known key.
fn full_config() -> Value {
    let mac = "02:00:00:00:00:09";
    json!({
        "cniVersion": "1.1.0", "name": "net", "type": "gossamer", "socket": "/run/a.sock",
        "instance": "blue", "mac": mac, "isDefaultGateway": false, "ipMasq": true, "ipam": {},
        "dns": {
            "nameservers": ["10.0.0.1"], "domain": "a.test", "search": ["a.test"], "options": ["ndots:5"],
        },
        "capabilities": { "ips": true, "mac": true },
        "runtimeConfig": {
            "ips": ["10.42.7.9/24"], "mac": mac, "portMappings": [{ "hostPort": 80 }],
            "bandwidth": { "ingressRate": 0, "egressRate": 0 }, "ipRanges": [[]],
            "dns": { "servers": ["10.0.0.1"], "searches": ["a.test"], "options": ["ndots:5"] },
        },
        "args": { "cni": { "ips": ["10.42.7.9"], "mac": mac, "labels": [{ "key": "a" }] } },
        "prevResult": {
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "mac": mac, "mtu": 1450, "sandbox": "/run/netns/c1" }],
            "ips": [{ "interface": 0, "address": "10.42.7.9/24", "gateway": "10.42.7.1" }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.42.7.1" }],
            "dns": { "nameservers": ["10.0.0.1"] },
        },
        "cni.dev/valid-attachments": [{ "containerID": "c1", "ifname": "eth0" }],
        "cni.dev/attachments": [{ "containerID": "c2", "ifname": "eth0" }],
    })
}

/// Collects a pointer (RFC 6901) to every value.
fn pointers(value: &Value, at: &str, all: &mut Vec<String>) {
    let mut each = |key: &str, value: &Value| {
        let pointer = format!("{at}/{}", key.replace('/', "~1"));
        all.push(pointer.clone());
        pointers(value, &pointer, all);
    };
    match value {
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, value)| each(&index.to_string(), value));
        }
        Value::Object(map) => map.iter().for_each(|(key, value)| each(key, value)),
        _ => {}
    }
}

#[test]
fn null_at_any_place_and_unknown_keys_are_accepted_by_every_verb() {
    let mut all = Vec::new();
    pointers(&full_config(), "", &mut all);
    all.push(String::new());
    assert!(all.len() > 60, "{all:?}");
    let mut changed = Vec::new();
    for pointer in &all {
        let mut config = full_config();
        *config.pointer_mut(pointer).expect("a value") = Value::Null;
        if !pointer.is_empty() {
            changed.push((pointer.clone(), config));
        }
        let mut config = full_config();
        let place = config.pointer_mut(pointer).and_then(Value::as_object_mut);
        // Any key there requests bandwidth limits, which are refused.
        if let Some(place) = place.filter(|_| pointer != "/runtimeConfig/bandwidth") {
            place.insert("unknown".to_owned(), json!({ "else": ["s", null] }));
            changed.push((format!("{pointer}/unknown"), config));
        }
    }
    for (pointer, config) in changed {
        for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
            // A null version means the first version, which lacks some verbs.
            let is_old = pointer == "/cniVersion" && !["ADD", "DEL", "VERSION"].contains(&verb);
            // An attachment without a name would be removed.
            let is_name = ["/containerID", "/ifname"].iter().any(|key| pointer.ends_with(key));
            let is_nameless = verb == "GC" && is_name;
            let read = parse(&with("CNI_COMMAND", verb), &config.to_string())
                .and_then(|request| request.socket().map(|_| ()).map_err(|error| (error, "")));
            let code = read.map_err(|(error, _)| error.code);
            let wanted = if is_old {
                Err(1)
            } else if is_nameless {
                Err(7)
            } else {
                Ok(())
            };
            assert_eq!(code, wanted, "{verb} with {pointer}");
        }
    }
}

#[test]
fn unsupported_and_invalid_pod_options_are_named_with_the_error_code() {
    for (arguments, more, code, words) in [
        ("", json!({ "runtimeConfig": { "ips": ["x"] } }), 7, "runtimeConfig.ips: \"x\""),
        ("", json!({ "runtimeConfig": { "ips": ["10.0.0.1/99"] } }), 7, "10.0.0.1/99"),
        ("", json!({ "runtimeConfig": { "ips": "10.42.7.9" } }), 7, "runtimeConfig.ips"),
        ("", json!({ "runtimeConfig": { "mac": "01:00:5e:00:00:01" } }), 7, "runtimeConfig.mac"),
        ("", json!({ "args": { "cni": { "mac": "x" } } }), 7, "args.cni.mac"),
        ("", json!({ "isDefaultGateway": "no" }), 7, "isDefaultGateway"),
        ("", json!({ "dns": { "nameservers": "10.0.0.1" } }), 7, "dns.nameservers"),
        // The keys below are not reachable.
        ("", json!({ "dns": ["10.0.0.1"] }), 7, "dns: not a JSON object"),
        ("", json!({ "runtimeConfig": [] }), 7, "runtimeConfig: not a JSON object"),
        ("", json!({ "args": { "cni": "ips" } }), 7, "args.cni: not a JSON object"),
        ("", json!({ "runtimeConfig": { "bandwidth": { "ingressRate": 8 } } }), 2, "ingressRate"),
        (
            "",
            json!({ "runtimeConfig": { "ipRanges": [[{ "subnet": "10.0.0.0/24" }]] } }),
            2,
            "runtimeConfig.ipRanges",
        ),
        ("IP=x", json!({}), 4, "CNI_ARGS IP"),
        ("MAC=00:00:00:00:00:00", json!({}), 4, "CNI_ARGS MAC"),
        (
            "MAC=02:00:00:00:00:01",
            json!({ "runtimeConfig": { "mac": "02:00:00:00:00:02" } }),
            4,
            "contradicts",
        ),
        ("GATEWAY=10.0.0.1", json!({}), 4, "GATEWAY"),
        ("IgnoreUnknown=0;A=b", json!({}), 4, "A is unknown"),
        ("IgnoreUnknown=perhaps", json!({}), 4, "IgnoreUnknown=perhaps"),
        ("IP", json!({}), 4, "KEY=VALUE"),
        ("IP=10.42.7.9;IP=10.42.7.8", json!({}), 4, "IP is set twice: 10.42.7.9 and 10.42.7.8"),
        ("", json!({ "runtimeConfig": { "ips": ["10.42.7.9", 7] } }), 7, "runtimeConfig.ips[1]: "),
    ] {
        let error = pod_options(arguments, more.clone()).expect_err(words);
        assert!(error.code == code && error.msg.contains(words), "{arguments} {more}: {error:?}");
    }
}

#[test]
fn missing_and_invalid_variables_and_configurations_are_named_with_the_error_code() {
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        for environment in [with(name, ""), ADD.into_iter().filter(|(n, _)| *n != name).collect()] {
            let (error, _) = parse(&environment, CONFIG).expect_err(name);
            assert!(error.code == code::BAD_ENVIRONMENT && error.msg.contains(name), "{error:?}");
        }
    }
    for (environment, config, wanted, word) in [
        (with("CNI_COMMAND", "PLUG"), CONFIG, code::BAD_ENVIRONMENT, "PLUG"),
        (with("CNI_CONTAINERID", "../etc"), CONFIG, code::BAD_ENVIRONMENT, "../etc"),
        (with("CNI_IFNAME", "a/b"), CONFIG, code::BAD_ENVIRONMENT, "a/b"),
        (with("CNI_IFNAME", "eth%d"), CONFIG, code::BAD_ENVIRONMENT, "a number"),
        (with("CNI_IFNAME", "all"), CONFIG, code::BAD_ENVIRONMENT, "sysctls"),
        (with("CNI_IFNAME", "default"), CONFIG, code::BAD_ENVIRONMENT, "sysctls"),
        (ADD.to_vec(), r#"{"dns": {"search": [a]}}"#, code::UNDECODABLE, "dns.search[0]: expected"),
        (
            with("CNI_COMMAND", "GC"),
            r#"{"cniVersion": "1.0.0"}"#,
            code::INCOMPATIBLE_VERSION,
            "CNI_COMMAND GC: not in cniVersion 1.0.0",
        ),
        (ADD.to_vec(), "{", code::UNDECODABLE, "stdin"),
        (ADD.to_vec(), "", code::UNDECODABLE, "stdin"),
        (ADD.to_vec(), "[]", code::UNDECODABLE, "stdin"),
        (ADD.to_vec(), r#"{"cniVersion": 1}"#, code::BAD_CONFIG, "cniVersion"),
        (ADD.to_vec(), r#"{"cniVersion": "2.0.0"}"#, code::INCOMPATIBLE_VERSION, "2.0.0"),
        (ADD.to_vec(), r#"{"cniVersion": "1.0"}"#, code::INCOMPATIBLE_VERSION, "1.0"),
        (with("CNI_COMMAND", "GC"), CONFIG, code::BAD_CONFIG, "valid-attachments"),
    ] {
        let (error, _) = parse(&environment, config).expect_err(word);
        assert!(error.code == wanted && error.msg.contains(word), "{error:?}");
    }
    let bad_instance = parse(&ADD, r#"{"cniVersion": "1.0.0", "instance": "Blue"}"#);
    let error = bad_instance.expect("a request").socket().expect_err("no name");
    assert!(error.code == code::BAD_CONFIG && error.msg.contains("instance"), "{error:?}");
    let long = config(json!({ "name": "n".repeat(201) }));
    assert_eq!(parse(&ADD, &long).expect_err("long").0.code, code::BAD_CONFIG);
    let longest = config(json!({ "more": "n".repeat(INPUT_MAX as usize) }));
    let (error, _) = parse(&ADD, &longest).expect_err("too long");
    assert!(error.code == code::UNDECODABLE && error.msg.contains("longer than"), "{error:?}");
}

#[test]
fn socket_must_be_absolute_and_empty_means_default() {
    let socket =
        |path: &str| parse(&ADD, &config(json!({ "socket": path }))).expect("read").socket();
    assert_eq!(socket(""), Ok(PathBuf::from("/run/gossamer/gossamer.sock")));
    assert_eq!(socket("/run/a.sock"), Ok(PathBuf::from("/run/a.sock")));
    let error = socket("run/a.sock").expect_err("relative");
    assert!(error.code == code::BAD_CONFIG && error.msg.contains("run/a.sock"), "{error:?}");
}

#[test]
fn addresses_of_prev_result_are_those_of_the_pods_interface() {
    let previous = json!({
        "interfaces": [
            { "name": "eth0" }, { "name": "eth0", "sandbox": "/n" }, { "name": "eth1", "sandbox": "/n" },
        ],
        "ips": [
            { "address": "10.42.7.9/24", "interface": 1 }, { "address": "fd42::9/64", "interface": 1 },
            { "address": "10.42.7.1/24", "interface": 0 }, { "address": "10.42.7.8/24", "interface": 2 },
            { "address": "10.42.7.7/24" }, { "address": "10.42.7.6/24", "interface": 9 }, null,
            { "address": "10.42.7.5", "interface": 1 }, { "address": null, "interface": 1 },
            { "address": "10.42.7.4/24", "interface": null }, { "address": "10.42.7.3/24", "interface": "1" },
        ],
    });
    let addresses_of = |previous: Value| {
        let request = parse(&ADD, &config(json!({ "prevResult": previous }))).expect("a request");
        request.config.previous_addresses("eth0")
    };
    assert_eq!(addresses_of(previous), [ip("10.42.7.9"), ip("fd42::9"), ip("10.42.7.5")]);
    let without =
        json!({ "interfaces": null, "ips": [{ "address": "10.42.7.9/24", "interface": 0 }] });
    for nothing in
        [json!(null), json!([]), json!({}), json!({ "ips": 1 }), json!({ "ips": [] }), without]
    {
        assert!(addresses_of(nothing).is_empty());
    }
}

#[test]
fn del_ignores_missing_namespace_and_invalid_pod_options() {
    let more = json!({
        "runtimeConfig": { "ips": ["x"], "mac": 7, "bandwidth": { "a": 1 } },
        "isDefaultGateway": "no", "dns": 3, "args": [],
    });
    for arguments in ["", "A=b", "nonsense"] {
        let del = [
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", ""),
            ("CNI_ARGS", arguments),
        ];
        let request = parse(&del, &config(more.clone())).expect("a request");
        assert!(matches!(request.operation, Operation::Del { .. }), "{request:?}");
    }
}

#[test]
fn variable_that_is_not_utf8_is_named_and_does_not_prevent_del() {
    use std::os::unix::ffi::OsStringExt as _;
    let answer = |verb: &str| {
        let mut environment: Environment =
            with("CNI_COMMAND", verb).iter().map(|(n, v)| ((*n).to_owned(), v.into())).collect();
        environment.insert("CNI_NETNS".to_owned(), OsString::from_vec(b"/run/\xff".to_vec()));
        CniRequest::parse("gossamer", &environment, CONFIG.as_bytes())
    };
    let (error, _) = answer("ADD").expect_err("no text");
    assert!(error.code == 4 && error.msg.contains("CNI_NETNS") && error.msg.contains("UTF-8"));
    assert!(answer("DEL").is_ok());
}

#[test]
fn version_decides_which_verbs_exist_and_defaults_to_the_first() {
    for (index, version) in VERSIONS.into_iter().enumerate() {
        for (verb, since) in
            [("ADD", 0), ("DEL", 0), ("VERSION", 0), ("CHECK", 4), ("GC", 6), ("STATUS", 6)]
        {
            let more = json!({ "cniVersion": version, "cni.dev/valid-attachments": [] });
            let answer = parse(&with("CNI_COMMAND", verb), &config(more));
            let code = answer
                .map(|request| request.version)
                .map_err(|(error, version)| (error.code, version));
            let wanted = if index >= since { Ok(version) } else { Err((1, version)) };
            assert_eq!(code, wanted, "{verb} {version}");
        }
    }
    assert_eq!(parse(&ADD, "{}").expect("a request").version, "0.1.0");
    for input in ["", r#"{"cniVersion": "9.9"}"#, "{}"] {
        let version = parse(&[("CNI_COMMAND", "VERSION")], input).expect("a request");
        assert!(matches!(version.operation, Operation::Version));
    }
}

#[test]
fn valid_attachments_are_read_from_both_keys_and_null_is_an_empty_list() {
    let valid = |more| match parse(&with("CNI_COMMAND", "GC"), &config(more)) {
        Ok(CniRequest { operation: Operation::Gc { valid }, .. }) => Ok(valid.len()),
        Ok(other) => panic!("{other:?}"),
        Err((error, _)) => Err(error.code),
    };
    let one = |id| json!([{ "containerID": id, "ifname": "eth0", "more": 1 }]);
    assert_eq!(valid(json!({ "cni.dev/valid-attachments": null })), Ok(0));
    assert_eq!(valid(json!({ "cni.dev/attachments": [] })), Ok(0));
    assert_eq!(valid(json!({ "cni.dev/attachments": one("a") })), Ok(1));
    // If the keys differ, both are kept.
    let both = json!({ "cni.dev/attachments": one("a"), "cni.dev/valid-attachments": one("b") });
    assert_eq!(valid(both), Ok(2));
    assert_eq!(valid(json!({})), Err(7));
    let error = config(json!({ "cni.dev/valid-attachments": [null, {}] }));
    let (error, _) = parse(&with("CNI_COMMAND", "GC"), &error).expect_err("no name");
    assert_eq!(error.code, 7);
    let where_and_what = "cni.dev/valid-attachments[1]: missing field `containerID`";
    assert!(error.msg.contains(where_and_what), "{error:?}");
}

#[test]
fn cni_args_may_repeat_a_value_and_have_unknown_keys_if_ignored() {
    let wished = pod_options("IP=10.42.7.9;IP=10.42.7.9;A=1;A=2;IgnoreUnknown=1", json!({}));
    assert_eq!(wished.map(|pod_options| pod_options.addresses), Ok(vec![ip("10.42.7.9")]));
}

#[test]
fn loopback_is_selected_by_program_name_or_network_type() {
    let environment: Environment =
        ADD.iter().map(|(name, value)| ((*name).to_owned(), value.into())).collect();
    let loopback = |program, kind: &str| {
        let config = config(json!({ "type": kind }));
        CniRequest::parse(program, &environment, config.as_bytes()).expect("a request").loopback
    };
    assert!(loopback("loopback", "loopback") && loopback("gossamer", "loopback"));
    assert!(loopback("loopback", "") && !loopback("gossamer", "gossamer"));
}
