//! Pods that end without a DEL of their runtime, or while no agent runs.

use std::time::Duration;

use gossamer::lab::{Agent, NetNs};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces, pods, veths},
    common::{
        Cluster, TIMEOUT, assert_logged, client, eventually, isolated, program, resume,
        status_where, suspend, tool, wait_until,
    },
};

/// The agent checks every ten seconds, and acts after it has found a pod missing twice.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(60);

/// Removes a namespace, as the end of its last process does.
fn end_namespace(space: NetNs) {
    let path = format!("/run/netns/{}", space.name());
    drop(space);
    // The agent may have the namespace open at this moment.
    let unmounted = std::process::Command::new("umount").args(["-l", &path]).status();
    let unmounted = unmounted.expect("umount");
    assert!(unmounted.success(), "{path}");
    std::fs::remove_file(path).expect("removed");
}

#[test]
fn addresses_of_vanished_pods_are_reused_as_soon_as_needed() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let small = ["--init", "--network", "10.42.0.0/24", "--subnet-len", "29"];
        let mut agent = Agent::start(program(), &host, &small)?;
        agent.wait_converged(1, TIMEOUT)?;
        let mut spaces = namespaces(&["a", "b", "c", "d"])?;
        let runtime = Runtime::new(&agent);
        let given: Vec<String> =
            spaces.iter().map(|space| address(&runtime.add(space.name()))).collect();
        // The address of an existing pod is never reclaimed.
        let kept = spaces.remove(0);
        spaces.into_iter().for_each(end_namespace);
        // New pods need the addresses at once, while the kernel is still removing the interfaces.
        let _new = namespaces(&["f", "g", "h", "i"])?;
        let more = json!({ "runtimeConfig": { "ips": [given[3]] } });
        let (done, fixed) = runtime.call("ADD", "f", &more);
        assert!(done && address(&fixed) == given[3], "{fixed}");
        ["g", "h"].iter().for_each(|name| _ = runtime.add(name));
        let (code, why) = runtime.refused("ADD", "i", &json!({}));
        assert!(code == 100 && why.contains("all 4 addresses"), "{code} {why}");
        let gateway = fixed["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&kept, &format!("ping -c 1 -W 2 {gateway}"));
        Ok(())
    });
}

#[test]
fn vanished_container_is_reconnected_under_the_same_name() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let space = NetNs::new("a")?;
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        // The veth pair is gone with its namespace, and another namespace has the same name.
        end_namespace(space);
        wait_until("the veth pair is gone", TIMEOUT, || veths(&cluster.hosts[0]) == 0);
        let space = NetNs::new("a")?;
        let added = runtime.add("a");
        let gateway = added["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&space, &format!("ping -c 1 -W 2 {gateway}"));
        Ok(())
    });
}

#[test]
fn container_readded_in_a_new_namespace_of_the_same_name_is_connected_at_once() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let runtime = Runtime::new(&cluster.agents[0]);
        for _ in 0..10 {
            let space = NetNs::new("a")?;
            runtime.add("a");
            end_namespace(space);
            // The kernel may not have removed the veth pair yet, and the path refers to another
            // namespace.
            let space = NetNs::new("a")?;
            runtime.add("a");
            runtime.del("a");
            end_namespace(space);
        }
        Ok(())
    });
}

#[test]
fn mac_of_a_vanished_pod_is_reused_as_soon_as_needed() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let mut spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let wish = json!({ "runtimeConfig": { "mac": "02:00:00:00:00:05" } });
        assert!(runtime.call("ADD", "a", &wish).0);
        end_namespace(spaces.remove(0));
        let (done, b) = runtime.call("ADD", "b", &wish);
        assert!(done, "{b}");
        Ok(())
    });
}

#[test]
fn add_during_del_of_the_same_pod_succeeds_or_fails_with_a_reason() {
    isolated(|lab| {
        let cluster = Cluster::start(lab, 1)?;
        let _space = namespaces(&["a"])?;
        let socket = cluster.agents[0].socket();
        let runtime = Runtime::at(socket);
        runtime.add("a");
        for _ in 0..40 {
            // ADD makes the agent check whether the existing pod of this name is gone; it is not.
            let (added, error) = std::thread::scope(|scope| {
                let add = scope.spawn(|| Runtime::at(socket).call("ADD", "a", &json!({})));
                runtime.del("a");
                add.join().expect("an answer")
            });
            let why = error["msg"].as_str().unwrap_or_default();
            let has_reason =
                why.contains("has an address") || why.contains("disconnected before it was ready");
            assert!(added || has_reason, "{error}");
            let _ = runtime.call("ADD", "a", &json!({}));
        }
        Ok(())
    });
}

#[test]
fn vanished_pod_is_not_counted_and_its_address_is_reclaimed() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let mut spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        ["a", "b", "c"].iter().for_each(|name| _ = runtime.add(name));
        end_namespace(spaces.remove(0));
        // An agent that was not running meanwhile must reach the same result as one that was.
        cluster.restart(0, &[])?;
        end_namespace(spaces.remove(0));
        status_where(&mut cluster.agents[0], |status| status["pods"] == 1);
        let runtime = Runtime::new(&cluster.agents[0]);
        let (done, said) = runtime.call("STATUS", "", &json!({}));
        assert!(done, "{said}");
        wait_until("their addresses are not reclaimed", RECLAIM_TIMEOUT, || {
            pods(&mut cluster.agents[0]) == 1
        });
        assert_logged(&cluster.agents[0], "gone without notice");
        assert_eq!(veths(&cluster.hosts[0]), 1);
        Ok(())
    });
}

#[test]
fn release_command_reclaims_addresses_of_vanished_pods_only() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let mut spaces = namespaces(&["a", "b"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let (a, _) = (runtime.add("a"), runtime.add("b"));
        end_namespace(spaces.remove(0));
        wait_until("the veth pair is gone", TIMEOUT, || veths(&cluster.hosts[0]) == 1);
        let release = |agent: &Agent| {
            let output = client(agent, &["pods", "--release"]);
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).expect("UTF-8")
        };
        let said = release(&cluster.agents[0]);
        assert!(said.contains(&address(&a)) && said.contains("orphan"), "{said}");
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        let said = release(&cluster.agents[0]);
        assert!(said.contains("no pod is gone"), "{said}");
        Ok(())
    });
}

#[test]
fn del_and_gc_without_an_agent_are_noted_and_executed_at_its_start() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        let b = ["a", "b", "c"].map(|name| runtime.add(name))[1].clone();
        let notes = format!("{}.pending", cluster.agents[0].socket().display());
        let count = || std::fs::read_dir(&notes).map_or(0, Iterator::count);
        cluster.agents[0].end(Signal::SIGKILL)?;
        let runtime = Runtime::new(&cluster.agents[0]);
        // One pod twice, one unknown pod, and one for which the runtime names no namespace.
        ["a", "a", "unknown"].iter().for_each(|name| runtime.del(name));
        let nowhere = [("CNI_NETNS", "")];
        assert!(runtime.call_with("DEL", "a", &nowhere, &json!({ "prevResult": null })).0);
        let valid =
            json!({ "cni.dev/valid-attachments": [{ "containerID": "b", "ifname": "eth0" }] });
        assert!(runtime.call("GC", "", &valid).0);
        assert_eq!(count(), 3);
        std::fs::write(format!("{notes}/del-of-another-program"), "{}")?;

        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        wait_until("all notes are done", TIMEOUT, || count() == 0);
        let left = cluster.agents[0].ask("/v1/pods", TIMEOUT)?;
        let left = left["pods"].as_array().expect("a list");
        assert!(left.len() == 1 && left[0]["container"] == "b", "{left:?}");
        wait_until("their veth pairs are gone", TIMEOUT, || veths(&cluster.hosts[0]) == 1);
        let gateway = b["ips"][0]["gateway"].as_str().expect("a gateway");
        tool(&spaces[1], &format!("ping -c 1 -W 2 {gateway}"));

        // A note must not be applied to a pod that was added later.
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        cluster.restart(0, &[])?;
        assert_eq!(pods(&mut cluster.agents[0]), 2);
        eventually(&spaces[0], "ip -o link", |links| links.contains("eth0"));
        Ok(())
    });
}

#[test]
fn notes_for_a_hanging_agent_are_executed_when_it_continues() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a", "b", "c"])?;
        let runtime = Runtime::new(&cluster.agents[0]);
        ["a", "b"].iter().for_each(|name| _ = runtime.add(name));
        let notes = format!("{}.pending", cluster.agents[0].socket().display());
        let count = || std::fs::read_dir(&notes).map_or(0, Iterator::count);
        suspend(&cluster.agents[0])?;
        // All at once, because each call waits as long as an agent may take.
        std::thread::scope(|scope| {
            let runtime = &runtime;
            scope.spawn(|| runtime.del("a"));
            let valid = json!({ "cni.dev/valid-attachments": [] });
            scope.spawn(move || assert!(runtime.call("GC", "", &valid).0));
            for verb in ["ADD", "CHECK"] {
                scope.spawn(move || {
                    let (code, why) = runtime.refused(verb, "c", &json!({}));
                    assert!(code == 11 && why.contains("does not answer"), "{verb}: {code} {why}");
                });
            }
        });
        assert_eq!(count(), 2);
        resume(&cluster.agents[0])?;
        wait_until("the notes are carried out", TIMEOUT, || count() == 0);
        // Requests whose runtime no longer waits are not carried out either.
        assert_eq!(pods(&mut cluster.agents[0]), 0);
        wait_until("no interface is left", TIMEOUT, || veths(&cluster.hosts[0]) == 0);
        Ok(())
    });
}

#[test]
fn note_written_while_the_agent_runs_is_executed_and_spares_later_pods() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a"])?;
        let notes = format!("{}.pending", cluster.agents[0].socket().display());
        let find = || {
            let mut notes = std::fs::read_dir(&notes).into_iter().flatten().flatten();
            notes.next().map(|entry| entry.path())
        };
        cluster.agents[0].end(Signal::SIGTERM)?;
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.del("a");
        let note = find().expect("a note");
        let text = std::fs::read(&note)?;
        cluster.agents[0] = Agent::start(program(), &cluster.hosts[0], &[])?;
        cluster.converge()?;
        wait_until("the note is carried out", TIMEOUT, || find().is_none());
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        // Simulates an agent that hung while the plugin wrote the note.
        std::fs::write(&note, &text)?;
        wait_until("the pod is gone", TIMEOUT, || pods(&mut cluster.agents[0]) == 0);
        wait_until("the note is gone", TIMEOUT, || find().is_none());
        // The runtime has noted the end of the previous pod, and adds the next one at once.
        let runtime = Runtime::new(&cluster.agents[0]);
        runtime.add("a");
        std::fs::write(&note, &text)?;
        runtime.add("a");
        wait_until("the note is gone", TIMEOUT, || find().is_none());
        assert_eq!(pods(&mut cluster.agents[0]), 1);
        assert_eq!(veths(&cluster.hosts[0]), 1);
        Ok(())
    });
}
