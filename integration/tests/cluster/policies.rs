//! Network policies: pods that `coracled` connects are who a controller takes them for.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use coracle_integration::cell::wait_for;
use coracle_integration::daemon::program;
use coracle_integration::kubelet::is_ready;
use coracle_integration::skipped;
use serde_json::{Value, json};

use crate::{Case, Scene};

/// The last ones: the controller runs, and its rules stay, until the cluster ends.
pub(crate) const ALL: &[Case] = &[(
    "a_policy_decides_who_gets_through",
    a_policy_decides_who_gets_through,
)];

const MINUTE: Duration = Duration::from_secs(60);

/// Of two clients the one that a policy does not name is shut out for as long as there is the policy. One that comes
/// while there is one is judged by its labels too.
fn a_policy_decides_who_gets_through(scene: &mut Scene<'_>) -> Result<()> {
    let Some(kube_router) = program("KUBE_ROUTER") else {
        return Ok(());
    };
    for tool in ["iptables", "ipset"] {
        if !Path::new("/usr/sbin").join(tool).exists() {
            skipped(&format!(
                "policies: the controller wants {tool}, which is not installed"
            ));
            return Ok(());
        }
    }
    scene.cluster.start_policies(&kube_router)?;
    let script =
        "mkdir /tmp/www; echo from-the-server >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";
    let mut server = pod("server", &scene.image, "server", script);
    server["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
    scene.cluster.apply(&[
        server,
        client(scene, "friend", "friend"),
        client(scene, "stranger", "stranger"),
    ])?;
    let server = scene.cluster.wait_pod("server", "to be ready", is_ready)?;
    let address = server["status"]["podIP"]
        .as_str()
        .context("the server has an address")?;
    for name in ["friend", "stranger"] {
        scene.cluster.wait_pod(name, "to run", is_ready)?;
        wait_until_reached(scene, name, address)?;
    }

    scene.cluster.apply(&[json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "friends-only"},
        "spec": {
            "podSelector": {"matchLabels": {"role": "server"}}, "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"role": "friend"}}}],
                "ports": [{"protocol": "TCP", "port": 8080}],
            }],
        },
    })])?;
    wait_for("the stranger to be shut out", MINUTE, || {
        Ok((!reaches(scene, "stranger", address)?).then_some(()))
    })
    .with_context(|| scene.cluster.tail("kube-router"))?;
    wait_until_reached(scene, "friend", address)?;
    scene.cluster.apply(&[
        client(scene, "late-friend", "friend"),
        client(scene, "late-stranger", "stranger"),
    ])?;
    for name in ["late-friend", "late-stranger"] {
        scene.cluster.wait_pod(name, "to run", is_ready)?;
    }
    wait_until_reached(scene, "late-friend", address)?;
    for name in ["stranger", "late-stranger"] {
        ensure!(!reaches(scene, name, address)?, "{name} got through");
    }

    scene.cluster.run(&["delete", "networkpolicy", "friends-only"])?;
    for name in ["friend", "stranger", "late-friend", "late-stranger"] {
        wait_until_reached(scene, name, address)?;
    }
    Ok(())
}

fn wait_until_reached(scene: &Scene<'_>, client: &str, address: &str) -> Result<()> {
    wait_for(&format!("{client} to get through"), MINUTE, || {
        Ok(reaches(scene, client, address)?.then_some(()))
    })
    .with_context(|| scene.cluster.tail("kube-router"))
}

/// Whether the client gets the server's answer; an error where it could not even ask.
fn reaches(scene: &Scene<'_>, client: &str, address: &str) -> Result<bool> {
    // Not wget's own time-out: Debian's static busybox falls over it.
    let ask = format!("timeout 5 wget -q -O - http://{address}:8080/; echo status $?");
    let answer = scene.cluster.run(&["exec", client, "--", "sh", "-c", &ask])?;
    match answer.as_str() {
        "from-the-server\nstatus 0\n" => Ok(true),
        // Refused, or ended by SIGTERM.
        "status 1\n" | "status 143\n" => Ok(false),
        _ => bail!("{client}: {answer:?}"),
    }
}

fn client(scene: &Scene<'_>, name: &str, role: &str) -> Value {
    pod(name, &scene.image, role, "exec sleep 3600")
}

fn pod(name: &str, image: &str, role: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"role": role}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
            }],
        },
    })
}
