//! The CNI specification, verb by verb, version by version and error by error (SPEC.md 1.1.0).
//!
//! The specification leaves codes 8 to 10 free. Code 51 needs a node that has lost its subnet while pods
//! run; `cni::plugin` tests it.

use gossamer::lab::Agent;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    cni::{Runtime, address, invoke, namespaces, pods},
    common::{Cluster, TIMEOUT, isolated, program, tool},
};

/// Versions; whether they have CHECK; whether they have GC and STATUS.
const VERSIONS: [(&str, bool, bool); 7] = [
    ("0.1.0", false, false),
    ("0.2.0", false, false),
    ("0.3.0", false, false),
    ("0.3.1", false, false),
    ("0.4.0", true, false),
    ("1.0.0", true, false),
    ("1.1.0", true, true),
];

/// Returns the address in a result, after checking that the result has the form of its version.
fn address_of(version: &str, result: &Value) -> String {
    assert_eq!(result["cniVersion"], version);
    if matches!(version, "0.1.0" | "0.2.0") {
        assert!(
            result["ip4"]["gateway"].is_string()
                && result["ip4"]["routes"][0]["dst"] == "0.0.0.0/0"
        );
        assert!(result.get("ips").is_none() && result.get("interfaces").is_none(), "{result}");
        let address = result["ip4"]["ip"].as_str().expect("an address");
        return address.split('/').next().expect("an address").to_owned();
    }
    let ip = &result["ips"][0];
    let old = version.starts_with("0.");
    assert_eq!((ip["version"] == "4", ip.get("version").is_some()), (old, old), "{result}");
    let interface = &result["interfaces"][ip["interface"].as_u64().expect("an index") as usize];
    assert!(interface["name"] == "eth0" && interface["sandbox"].is_string(), "{result}");
    assert_eq!(interface.get("mtu").is_some(), version == "1.1.0", "{result}");
    assert_eq!(result["routes"][0]["gw"], ip["gateway"]);
    address(result)
}

#[test]
fn each_cni_version_has_its_verbs_and_its_result_format() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        for (version, check, gc) in VERSIONS {
            let runtime = Runtime::new(&cluster.agents[0]);
            let with_version = |more: Value| {
                let mut config = more;
                config["cniVersion"] = version.into();
                config
            };
            let (done, result) = runtime.call("ADD", "a", &with_version(json!({})));
            assert!(done, "{version}: {result}");
            let ip = address_of(version, &result);
            assert!(tool(&spaces[0], "ip addr show dev eth0").contains(&ip));
            let (done, said) = runtime.call("VERSION", "a", &with_version(json!({})));
            let spoken = VERSIONS.map(|(version, ..)| version);
            assert!(done && said["supportedVersions"] == json!(spoken), "{said}");
            let keep = json!([{ "containerID": "a", "ifname": "eth0" }]);
            for (verb, there, more) in [
                ("CHECK", check, json!({ "prevResult": result })),
                ("STATUS", gc, json!({})),
                ("GC", gc, json!({ "cni.dev/valid-attachments": keep })),
            ] {
                let (done, said) = runtime.call(verb, "a", &with_version(more));
                assert_eq!(done, there, "{verb} {version}: {said}");
                if there {
                    assert!(said.is_null(), "{verb} {version}: {said}");
                } else {
                    assert_eq!((&said["code"], &said["cniVersion"]), (&json!(1), &json!(version)));
                }
            }
            // DEL with the earlier result, without it, and repeated.
            for more in [json!({ "prevResult": result }), json!({}), json!({ "prevResult": null })]
            {
                let (done, said) = runtime.call("DEL", "a", &with_version(more));
                assert!(done && said.is_null(), "DEL {version}: {said}");
            }
            assert_eq!(pods(&mut cluster.agents[0]), 0, "{version}");
        }
        Ok(())
    });
}

struct Case {
    verb: &'static str,
    variables: Vec<(&'static str, &'static str)>,
    more: Value,
    code: u64,
    words: &'static str,
}

fn case(
    verb: &'static str,
    variables: &[(&'static str, &'static str)],
    more: Value,
    code: u64,
    words: &'static str,
) -> Case {
    Case { verb, variables: variables.to_vec(), more, code, words }
}

#[test]
fn each_cni_error_has_the_specified_code_and_a_reason() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let small = ["--init", "--network", "10.42.0.0/24", "--subnet-len", "29"];
        let mut agent = Agent::start(program(), &host, &small)?;
        agent.wait_converged(1, TIMEOUT)?;
        let spaces = namespaces(&["a", "b", "c", "d", "e", "f"])?;
        let runtime = Runtime::new(&agent);
        let lost = runtime.add("a");
        tool(&spaces[0], "ip addr flush dev eth0");
        // The previous result of the runtime does not match what was assigned.
        let mut other = runtime.add("f");
        other["ips"][0]["address"] = "192.0.2.9/24".into();
        let none = || json!({});
        let cases = [
            case("ADD", &[], json!({ "cniVersion": "0.5.0" }), 1, "0.5.0"),
            case("DEL", &[], json!({ "cniVersion": "2.0.0" }), 1, "2.0.0"),
            case("CHECK", &[], json!({ "cniVersion": "0.3.1" }), 1, "0.4.0"),
            case("STATUS", &[], json!({ "cniVersion": "1.0.0" }), 1, "1.1.0"),
            case(
                "ADD",
                &[],
                json!({ "runtimeConfig": { "bandwidth": { "a": 1 } } }),
                2,
                "bandwidth",
            ),
            case("CHECK", &[("CNI_CONTAINERID", "b")], none(), 3, "no such pod"),
            case("PLUG", &[], none(), 4, "CNI_COMMAND"),
            case("", &[], none(), 4, "CNI_COMMAND"),
            case("ADD", &[("CNI_CONTAINERID", "")], none(), 4, "CNI_CONTAINERID"),
            case("ADD", &[("CNI_CONTAINERID", "-")], none(), 4, "CNI_CONTAINERID"),
            case("DEL", &[("CNI_CONTAINERID", "")], none(), 4, "CNI_CONTAINERID"),
            case("ADD", &[("CNI_IFNAME", "a/b")], none(), 4, "CNI_IFNAME"),
            case("DEL", &[("CNI_IFNAME", "")], none(), 4, "CNI_IFNAME"),
            case("ADD", &[("CNI_NETNS", "")], none(), 4, "CNI_NETNS"),
            case("ADD", &[("CNI_NETNS", "/run/netns/nowhere")], none(), 4, "/run/netns/nowhere"),
            case(
                "ADD",
                &[("CNI_CONTAINERID", "b"), ("CNI_NETNS", "/etc/passwd")],
                none(),
                4,
                "/etc/passwd",
            ),
            case("ADD", &[("CNI_ARGS", "COLOUR=red")], none(), 4, "COLOUR"),
            // ADD for the second time.
            case("ADD", &[], none(), 4, "has an address already"),
            case("CHECK", &[], json!({ "prevResult": lost }), 5, "has lost"),
            case(
                "CHECK",
                &[("CNI_CONTAINERID", "f"), ("CNI_NETNS", "/run/netns/f")],
                json!({ "prevResult": other }),
                5,
                "192.0.2.9",
            ),
            case("ADD", &[], json!({ "isDefaultGateway": 1 }), 7, "isDefaultGateway"),
            case("ADD", &[], json!({ "socket": null, "instance": "A B" }), 7, "instance"),
            case("ADD", &[], json!({ "runtimeConfig": { "ips": ["10.42.0"] } }), 7, "10.42.0"),
            case("DEL", &[], json!({ "socket": "gossamer.sock" }), 7, "absolute path"),
            case("GC", &[], none(), 7, "cni.dev/valid-attachments"),
            case("ADD", &[], json!({ "socket": "/nowhere/sock" }), 11, "does not run"),
            case("STATUS", &[], json!({ "socket": "/nowhere/sock" }), 50, "does not run"),
            case(
                "ADD",
                &[("CNI_CONTAINERID", "b"), ("CNI_ARGS", "IP=192.0.2.1")],
                none(),
                101,
                "192.0.2.1",
            ),
        ];
        for Case { verb, variables, more, code, words } in cases {
            let (done, error) = runtime.call_with(verb, "a", &variables, &more);
            let what = format!("{verb} {variables:?} {more}: {error}");
            assert!(!done && error["code"] == code, "{what}");
            assert!(error["msg"].as_str().is_some_and(|why| why.contains(words)), "{what}");
            assert!(error["details"].is_string() && error["cniVersion"].is_string(), "{what}");
        }
        let variables = [("CNI_COMMAND", "ADD")];
        for input in ["", "{", "[]", "null"] {
            let (done, error) = invoke(program(), &variables, input);
            assert!(!done && error["code"] == 6, "{input}: {error}");
        }
        runtime.del("f");
        ["b", "c", "d"].iter().for_each(|name| _ = runtime.add(name));
        assert_eq!(runtime.refused("ADD", "f", &json!({})).0, 100);
        // A fault of one pod does not affect the others.
        runtime.del("a");
        runtime.add("f");
        agent.end(Signal::SIGTERM)?;
        let runtime = Runtime::new(&agent);
        assert_eq!(runtime.refused("ADD", "a", &json!({})).0, 11);
        assert_eq!(runtime.refused("STATUS", "a", &json!({})).0, 50);
        Ok(())
    });
}

#[test]
fn del_of_an_absent_pod_succeeds() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _space = namespaces(&["a"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let too_long = "a".repeat(300);
        for (variables, more) in [
            (vec![("CNI_NETNS", "")], json!({})),
            (vec![("CNI_NETNS", "/run/netns/nowhere")], json!({})),
            (vec![("CNI_NETNS", "/proc/self/ns/net")], json!({})),
            (vec![("CNI_CONTAINERID", "unknown")], json!({})),
            // ADD rejects these names, so there is nothing to delete.
            (vec![("CNI_CONTAINERID", "-")], json!({})),
            (vec![("CNI_CONTAINERID", too_long.as_str())], json!({})),
            (vec![("CNI_IFNAME", "all")], json!({})),
            (vec![("CNI_IFNAME", "eth%d")], json!({})),
            (vec![("CNI_IFNAME", "a-name-that-is-too-long")], json!({})),
            (vec![("CNI_ARGS", "nonsense")], json!({ "runtimeConfig": { "ips": "nonsense" } })),
            // The configuration has changed since ADD.
            (vec![], json!({ "name": "another", "cniVersion": "0.3.1", "mac": "nonsense" })),
        ] {
            runtime.add("a");
            let (done, said) = runtime.call_with("DEL", "a", &variables, &more);
            assert!(done && said.is_null(), "{variables:?} {more}: {said}");
            runtime.del("a");
        }
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        Ok(())
    });
}

#[test]
fn result_that_cannot_be_written_is_a_failure() {
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let mut plugin = std::process::Command::new(program());
    plugin.env("CNI_COMMAND", "VERSION").stdin(std::process::Stdio::null()).stdout(full);
    let output = plugin.output().expect("the plugin runs");
    assert!(!output.status.success(), "{output:?}");
}

#[test]
fn gc_accepts_the_attachment_keys_of_all_libcni_versions() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a", "b"])?;
        let keep = |name: &str| json!([{ "containerID": name, "ifname": "eth0" }]);
        for (more, left) in [
            (json!({ "cni.dev/valid-attachments": keep("a") }), 1),
            (json!({ "cni.dev/attachments": keep("a") }), 1),
            // Where the two keys differ, a pod in either one is kept.
            (
                json!({
                    "cni.dev/valid-attachments": keep("a"),
                    "cni.dev/attachments": keep("b"),
                }),
                2,
            ),
            (json!({ "cni.dev/valid-attachments": null }), 0),
            (json!({ "cni.dev/attachments": [] }), 0),
        ] {
            let runtime = Runtime::new(&cluster.agents[0]);
            ["a", "b"].iter().for_each(|name| runtime.del(name));
            ["a", "b"].iter().for_each(|name| _ = runtime.add(name));
            let (done, said) = runtime.call("GC", "", &more);
            assert!(done && said.is_null(), "{more}: {said}");
            assert_eq!(pods(&mut cluster.agents[0]), left, "{more}");
        }
        Ok(())
    });
}

#[test]
fn check_reports_the_missing_route_of_the_previous_result() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a"])?;
        let (runtime, pod) = (Runtime::new(&cluster.agents[0]), &spaces[0]);
        let mut result = runtime.add("a");
        let gateway = result["ips"][0]["gateway"].as_str().expect("a gateway").to_owned();
        let check = |result: &Value| runtime.call("CHECK", "a", &json!({ "prevResult": result }));
        let names = |result: &Value, route: &str| {
            let (done, error) = check(result);
            assert!(!done && error["code"] == 5, "{error}");
            let said = error["msg"].as_str().expect("a text");
            assert!(said.contains(&format!("the route {route} of prevResult")), "{said}");
        };
        assert!(check(&result).0);
        tool(pod, "ip route del default");
        let default = format!("0.0.0.0/0 via {gateway}");
        names(&result, &default);
        // A different default route does not count as the assigned one.
        let other = gateway.rsplit_once('.').map(|(net, _)| format!("{net}.77")).expect("dots");
        tool(pod, &format!("ip route add default via {other} dev eth0 onlink"));
        names(&result, &default);
        tool(pod, &format!("ip route replace default via {gateway}"));
        assert!(check(&result).0);
        // Routes that plugins behind gossamer have added, in any table and family.
        for (more, route, command) in [
            (json!({ "dst": "192.0.2.0/24" }), "192.0.2.0/24", "192.0.2.0/24 dev eth0"),
            (
                json!({ "dst": "198.51.100.0/24", "table": 100, "priority": 7 }),
                "198.51.100.0/24 metric 7 table 100",
                "198.51.100.0/24 dev eth0 metric 7 table 100",
            ),
            (json!({ "dst": "2001:db8::/32" }), "2001:db8::/32", "2001:db8::/32 dev lo"),
        ] {
            tool(pod, "ip link set lo up");
            result["routes"].as_array_mut().expect("a list").push(more);
            names(&result, route);
            tool(pod, &format!("ip route add {command}"));
            assert!(check(&result).0, "{route}");
        }
        Ok(())
    });
}
