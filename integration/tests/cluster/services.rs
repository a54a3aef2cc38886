//! Services: reached by name while everything behind them is replaced; probes decide who is behind them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use coracle_integration::cell::wait_for;
use coracle_integration::kubelet::{container_status, is_ready};
use serde_json::{Value, json};

use crate::{Case, Scene};

pub(crate) const ALL: &[Case] = &[
    (
        "a_service_is_reached_through_a_rollout",
        a_service_is_reached_through_a_rollout,
    ),
    ("probes_decide", probes_decide),
    (
        "a_port_of_the_node_leads_to_a_pod",
        a_port_of_the_node_leads_to_a_pod,
    ),
];

const MINUTE: Duration = Duration::from_secs(60);

/// A client asks a Service by its name, without pause, while a rolling update replaces every pod: no request fails.
fn a_service_is_reached_through_a_rollout(scene: &mut Scene<'_>) -> Result<()> {
    let web = |version: &str| deployment(&scene.image, version);
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    scene.cluster.apply(&[web("one"), service])?;
    let rollout = ["rollout", "status", "deployment/web", "--timeout=180s"];
    scene.cluster.run(&rollout)?;
    // The name, each time anew: that is the name server's part. A static program cannot ask it by
    // itself.
    let script = "n=0; while :; do n=$((n+1)); \
                  ip=$(nslookup web.default.svc.cluster.local | awk '/^Address/ {a=$NF} END {print a}'); \
                  if wget -q -O /tmp/answer http://$ip/; then echo \"ok $(cat /tmp/answer)\"; \
                  else echo \"FAILED $n $ip\"; fi; done";
    scene.cluster.apply(&[pod("client", &scene.image, script)])?;
    scene.cluster.wait_pod("client", "to run", is_ready)?;
    let answers = |wanted: &str| -> Result<usize> {
        let log = scene.cluster.run(&["logs", "client"])?;
        Ok(log.lines().filter(|line| line.contains(wanted)).count())
    };
    wait_for("answers of the first version", MINUTE, || {
        Ok((answers("ok one-")? > 50).then_some(()))
    })
    .with_context(|| format!("{:?}", scene.cluster.run(&["logs", "client", "--tail=5"])))?;
    scene.cluster.apply(&[web("two")])?;
    scene.cluster.run(&rollout)?;
    wait_for("answers of the second version alone", MINUTE, || {
        let log = scene.cluster.run(&["logs", "client", "--tail=50"])?;
        Ok((log.lines().count() == 50 && log.lines().all(|line| line.contains("two-"))).then_some(()))
    })?;
    let failures = answers("FAILED")?;
    let total = answers("ok ")?;
    println!("    {total} requests through the rolling update, {failures} failed");
    ensure!(failures == 0, "{failures} requests of {total} failed");
    let log = scene.cluster.run(&["logs", "client"])?;
    let pods: std::collections::BTreeSet<&str> =
        log.lines().filter_map(|line| line.strip_prefix("ok ")).collect();
    ensure!(
        pods.len() == 6,
        "three pods of each version were to answer: {pods:?}"
    );
    Ok(())
}

/// A start-up probe holds the others back, a readiness probe decides of the endpoints, a liveness probe restarts.
fn probes_decide(scene: &mut Scene<'_>) -> Result<()> {
    let script = "mkdir -p /www; echo yes >/www/ready; touch /alive; sleep 2; touch /started; exec httpd -f -p 8080 -h /www";
    let mut probed = pod("probed", &scene.image, script);
    let container = &mut probed["spec"]["containers"][0];
    container["startupProbe"] =
        json!({"exec": {"command": ["cat", "/started"]}, "periodSeconds": 1, "failureThreshold": 60});
    container["readinessProbe"] =
        json!({"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1});
    container["livenessProbe"] = json!({"exec": {"command": ["cat", "/alive"]}, "periodSeconds": 1, "failureThreshold": 2, "timeoutSeconds": 10});
    let mut dialled = pod("dialled", &scene.image, "exec httpd -f -p 8080 -h /");
    dialled["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
    scene.cluster.apply(&[probed, dialled])?;
    let is_started = |pod: &Value| container_status(pod, "main")["started"] == true;
    scene
        .cluster
        .wait_pod("probed", "to run and not be started", |pod| {
            container_status(pod, "main")["state"]["running"].is_object() && !is_started(pod)
        })?;
    scene.cluster.wait_pod("probed", "to be ready", is_ready)?;
    scene.cluster.wait_pod("dialled", "to be ready", is_ready)?;
    scene.cluster.run(&["annotate", "pod", "probed", "seen=ready"])?;

    exec_sync(scene, "probed", "rm%20/www/ready")?;
    scene
        .cluster
        .wait_pod("probed", "to be unready", |pod| !is_ready(pod) && is_started(pod))?;
    exec_sync(scene, "probed", "touch%20/www/ready")?;
    scene.cluster.wait_pod("probed", "to be ready again", is_ready)?;
    exec_sync(scene, "probed", "rm%20/alive")?;
    let pod = scene.cluster.wait_pod("probed", "to be restarted", |pod| {
        container_status(pod, "main")["restartCount"] == 1 && is_ready(pod)
    })?;
    let last = &container_status(&pod, "main")["lastState"]["terminated"];
    ensure!(last["exitCode"] == 137 || last["exitCode"] == 143, "{last}");
    Ok(())
}

/// `hostPort`: reached at the node's address and at its loopback address, and gone with the pod.
fn a_port_of_the_node_leads_to_a_pod(scene: &mut Scene<'_>) -> Result<()> {
    let script = "mkdir /tmp/www; echo from-the-pod >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";
    let mut web = pod("ported", &scene.image, script);
    web["spec"]["containers"][0]["ports"] = json!([{"containerPort": 8080, "hostPort": 18080}]);
    web["spec"]["containers"][0]["readinessProbe"] = json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
    scene.cluster.apply(&[web])?;
    scene.cluster.wait_pod("ported", "to be ready", is_ready)?;
    for address in ["192.0.2.10", "127.0.0.1"] {
        let answer = scene
            .cell
            .sh(&format!("curl -sf -m 10 http://{address}:18080/"))?;
        ensure!(answer == "from-the-pod\n", "{address}: {answer:?}");
    }
    scene
        .cluster
        .run(&["delete", "pod", "ported", "--grace-period=1"])?;
    wait_for("the port to be closed", MINUTE, || {
        let open = scene.cell.sh("curl -sf -m 5 http://192.0.2.10:18080/").is_ok();
        Ok((!open).then_some(()))
    })
}

/// A command in the pod's container, by the kubelet's own door.
fn exec_sync(scene: &Scene<'_>, pod: &str, command: &str) -> Result<()> {
    let url = format!("https://127.0.0.1:20250/run/default/{pod}/main?cmd={command}");
    scene
        .cell
        .sh(&format!("curl -sfk -X POST '{url}'"))
        .map(drop)
        .with_context(|| format!("in {pod}"))
}

fn pod(name: &str, image: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
            }],
        },
    })
}

/// Three web servers that answer with the version and their own name. One that is to end serves on for as long as the
/// proxy may need to learn of it.
fn deployment(image: &str, version: &str) -> Value {
    let script = format!(
        "mkdir /tmp/www; echo {version}-$HOSTNAME >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www"
    );
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {
                    "terminationGracePeriodSeconds": 20,
                    "containers": [{
                        "name": "web", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
                        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
                    }],
                },
            },
        },
    })
}
