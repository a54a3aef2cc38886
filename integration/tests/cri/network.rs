//! The built-in bridge as a client sees it: two families, ports of the host, and what is left of them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::{Node, Options, request, skipped};
use coracle_proto::cri::{PodSandboxConfig, PortMapping, StatusRequest};

use crate::kill9::steps;
use crate::support::eventually;

crate::tests![
    ports_of_the_host_lead_to_a_pod_also_while_no_daemon_runs,
    a_port_that_is_taken_is_refused_and_told_of,
    a_death_while_ports_come_or_go_leaves_none,
];

fn options() -> Options {
    Options {
        config: "[network]\nsubnet_v6 = \"fd7a:9e3c:41b0::/64\"\n".to_owned(),
        ..Options::default()
    }
}

fn with_port(name: &str, node: &Node, host_port: i32) -> PodSandboxConfig {
    let mut config = request::pod(name, &node.logs);
    config.port_mappings = vec![PortMapping {
        container_port: 80,
        host_port,
        ..Default::default()
    }];
    config
}

/// Asks the web server at `address`.
fn get(address: &str) -> Result<()> {
    let limit = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address.parse()?, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("found it\n"), "{address}: {answer}");
    Ok(())
}

/// The rules of all tables; none without a program to look with.
fn rules() -> Option<String> {
    let output = Command::new("nft").args(["list", "ruleset"]).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn ports_of_the_host_lead_to_a_pod_also_while_no_daemon_runs() -> Result<()> {
    let mut node = Node::with_busybox(options()).await?;
    let config = with_port("web", &node, 8080);
    let pod = node.run_pod(&config).await?;
    let network = node.pod_status(&pod).await?.network.context("no network")?;
    let [v6] = &network.additional_ips[..] else {
        anyhow::bail!("not two addresses: {network:?}");
    };
    ensure!(
        network.ip.starts_with("10.") && v6.ip.starts_with("fd7a:9e3c:41b0::"),
        "{network:?}"
    );
    let script = "mkdir /tmp/www; echo found it > /tmp/www/index.html; exec httpd -f -p 80 -h /tmp/www";
    let mut container = request::container("web", script);
    container.command[1] = "-ec".into();
    node.run_container(&pod, &container, &config).await?;
    let gateway = "[fd7a:9e3c:41b0::1]:8080";
    eventually(async || get(&format!("[{}]:80", v6.ip))).await?;
    for address in ["127.0.0.1:8080", gateway] {
        get(address)?;
    }
    node.kill()?;
    for address in ["127.0.0.1:8080", gateway] {
        get(address).context("while no daemon runs")?;
    }
    node.spawn().await?;
    get("127.0.0.1:8080").context("after a restart")?;
    node.stop_pod(&pod).await?;
    ensure!(get("127.0.0.1:8080").is_err(), "a stopped pod has its port still");
    node.remove_pod(&pod).await?;
    if let Some(rules) = rules() {
        ensure!(!rules.contains("coracle"), "{rules}");
    }
    node.finish().await
}

async fn a_port_that_is_taken_is_refused_and_told_of() -> Result<()> {
    let node = Node::start(options()).await?;
    let first = node.run_pod(&with_port("first", &node, 8080)).await?;
    let second = with_port("second", &node, 8080);
    let refused = node.run_pod(&second).await.unwrap_err();
    let text = format!("host port 8080/tcp is taken by pod {first}");
    ensure!(refused.message().contains(&text), "{refused}");
    ensure!(
        node.pod_ids().await? == [first.clone()],
        "something is left of it"
    );
    node.stop_pod(&first).await?;
    node.run_pod(&second).await?;
    let status = StatusRequest { verbose: true };
    let info = node.runtime().status(status).await?.into_inner().info;
    let said = format!("{info:?}");
    ensure!(!said.contains("nf_tables"), "{said}");
    node.finish().await
}

async fn a_death_while_ports_come_or_go_leaves_none() -> Result<()> {
    let names: Vec<String> = steps().unwrap_or_default();
    let mut names: Vec<&String> = names.iter().filter(|step| step.ends_with(".network")).collect();
    names.sort_unstable();
    if names.is_empty() || rules().is_none() {
        skipped("a_death_while_ports_come_or_go_leaves_none: no failpoints, or no nft to look with");
        return Ok(());
    }
    let mut node = Node::start(options()).await?;
    for step in names {
        node.options.failpoint = Some(format!("{step}=abort"));
        node.restart().await?;
        let config = with_port("dies", &node, 8080);
        let died = match node.run_pod(&config).await {
            Ok(pod) => node.stop_pod(&pod).await.is_err(),
            Err(_) => true,
        };
        ensure!(died, "{step} was not reached");
        node.wait_ended(Duration::from_secs(10)).await?;
        node.options.failpoint = None;
        node.spawn().await?;
        for pod in node.pod_ids().await? {
            node.remove_pod(&pod).await?;
        }
        eventually(async || {
            let rules = rules().unwrap_or_default();
            ensure!(!rules.contains("coracle"), "{step}: {rules}");
            Ok(())
        })
        .await?;
        // The port is free again.
        let pod = node.run_pod(&config).await.context(step.clone())?;
        node.remove_pod(&pod).await?;
    }
    node.finish().await
}
