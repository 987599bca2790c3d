//! The compose files of docs/recipes/compose.md, with a real Docker on two hosts.

use std::{fs, path::Path, process::Command};

use nix::sys::signal::Signal;

use crate::{
    common::{Cluster, TIMEOUT, isolated, skipped, wait_until},
    docker::serve,
    dockerd::{BUSYBOX, DOCKERD, Dockerd},
};

const COMPOSE: &str = "/usr/bin/docker-compose";
const PAGE: &str = include_str!("../../docs/recipes/compose.md");

/// Returns the compose files of the page, with an image that needs no registry.
fn files() -> Vec<String> {
    let blocks = PAGE.split("```yaml\n").skip(1).map(|text| text.split("```").next());
    let with_image = |line: &str| match line.split_once("image: ") {
        Some((indent, _)) => format!("{indent}image: box"),
        None => line.to_owned(),
    };
    let blocks =
        blocks.map(|text| text.expect("a block").lines().map(with_image).collect::<Vec<_>>());
    blocks.map(|lines| lines.join("\n")).collect()
}

/// Returns the commands of the page that create the networks: of the first host, and of the others.
fn networks() -> Vec<&'static str> {
    PAGE.lines().filter_map(|line| line.strip_prefix("docker ")).take(2).collect()
}

#[test]
fn compose_files_of_the_recipe_connect_containers_on_two_hosts() {
    let needed = [DOCKERD, COMPOSE, BUSYBOX, "/usr/sbin/iptables"];
    if let Some(missing) = needed.iter().find(|path| !Path::new(path).exists()) {
        return skipped(
            "compose_files_of_the_recipe_connect_containers_on_two_hosts",
            &format!("{missing} is not installed"),
        );
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        for number in 0..2 {
            serve(&mut cluster, number, Signal::SIGTERM)?;
        }
        let subnet = cluster.agents[0].wait_subnet(TIMEOUT)?.to_string();
        let prefix = subnet.strip_suffix(".0/24").expect("a /24");
        let (files, networks) = (files(), networks());
        assert_eq!((files.len(), networks.len()), (2, 2));

        let mut dockers = Vec::new();
        for (number, file) in files.iter().enumerate() {
            let host = &cluster.hosts[number];
            let docker = Dockerd::start(host, "");
            docker.import(host);
            docker.done(&networks[number].replace("10.42.1.0/24", &subnet));
            let folder = host.dir.join("application");
            fs::create_dir(&folder)?;
            fs::write(
                folder.join("docker-compose.yml"),
                file.replace("10.42.1.", &format!("{prefix}.")),
            )?;
            compose(&docker, &folder, "up -d");
            dockers.push((docker, folder));
        }
        let (docker, folder) = &dockers[1];
        let address = format!("{prefix}.10");
        assert!(compose(docker, folder, "exec -T web busybox cat /etc/hosts").contains(&address));
        wait_until("the database answers", TIMEOUT, || {
            compose(docker, folder, "exec -T web ping -c 1 -w 1 db; true")
                .contains(" 0% packet loss")
        });
        for (docker, folder) in &dockers {
            compose(docker, folder, "down --timeout 0");
        }
        Ok(())
    });
}

fn compose(docker: &Dockerd, folder: &Path, command: &str) -> String {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{COMPOSE} {command}")]).current_dir(folder);
    let output = shell.env("DOCKER_HOST", &docker.socket).output().expect("sh runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "docker-compose {command}: {}", text(&output.stderr));
    text(&output.stdout)
}
