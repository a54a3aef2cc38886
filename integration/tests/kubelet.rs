//! A stock kubelet drives coracled: one pod's whole life with crashes in between, a reboot, and twenty pods for
//! six minutes. Needs `KUBELET` (the program), `CORACLED` and root; told so loudly otherwise.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use coracle_integration::cell::{Cell, wait_for};
use coracle_integration::daemon::{Daemon, program};
use coracle_integration::image::busybox_layout;
use coracle_integration::kubelet::{Kubelet, Options, container_status, is_ready};
use coracle_integration::leaks;
use coracle_integration::registry::Registry;
use serde_json::{Value, json};

const MINUTE: Duration = Duration::from_secs(60);

/// Points (a), (b), (c) and (f): pulled with credentials, lived, survived both crashes, gone without a trace.
#[test]
fn a_pod_lives_through_crashes_and_goes() -> Result<()> {
    let Some(kubelet_program) = program("KUBELET") else {
        return Ok(());
    };
    let cell = Cell::new("kubelet-life")?;
    let before = leaks::snapshot(&cell)?;
    let registry = Registry::start(&cell)?;
    let layout = busybox_layout(cell.dir(), "app", "app:1")?;
    let image = registry.push(&cell, &layout, "test/app:1")?;
    let mut daemon = Daemon::start(&cell, Some(&registry.authority()))?;
    let socket = daemon.socket();
    let options = Options {
        socket: &socket,
        config: json!({}),
        by_flag: false,
        kubeconfig: None,
    };
    let mut kubelet = Kubelet::start(&cell, &kubelet_program, &options)?;

    let host = cell.subdir("host")?;
    kubelet.apply(&life_pod(&image, &host))?;
    let pod = kubelet.wait_pod("life", "to be ready, crash seen", 4 * MINUTE, |pod| {
        is_ready_but(pod, "crash") && container_status(pod, "crash")["restartCount"].as_u64() >= Some(1)
    })?;
    check_life(&cell, &kubelet, &pod, &host).with_context(|| format!("status: {:#}", pod["status"]))?;

    // (c) neither crash is noticed by the pod
    let identity = stable_identity(&pod);
    daemon.kill_and_restart(&cell)?;
    let pod = kubelet.wait_pod("life", "to be ready after the daemon's crash", MINUTE, |pod| {
        is_ready_but(pod, "crash")
    })?;
    ensure!(
        stable_identity(&pod) == identity,
        "changed by the daemon's crash: {identity:#} -> {:#}",
        stable_identity(&pod)
    );
    kubelet.kill()?;
    kubelet = Kubelet::start(&cell, &kubelet_program, &options)?;
    let probes = count_lines(&host.join("probes"))?;
    let pod = kubelet.wait_pod(
        "life",
        "to be ready after the kubelet's crash",
        2 * MINUTE,
        |pod| is_ready_but(pod, "crash"),
    )?;
    ensure!(
        stable_identity(&pod) == identity,
        "changed by the kubelet's crash: {identity:#} -> {:#}",
        stable_identity(&pod)
    );
    wait_for("the liveness probe to go on", MINUTE, || {
        Ok((count_lines(&host.join("probes"))? > probes + 1).then_some(()))
    })?;

    // (f) while the pod lives each leak check must see it: the control that the check can fail
    let alive = leaks::snapshot(&cell)?;
    for (what, found) in leaks::difference(&before, &alive) {
        ensure!(
            !found.is_empty(),
            "the leak check is blind: it sees no {what} of a living pod"
        );
    }
    kubelet.delete("life")?;
    wait_for("the pod to be gone", 2 * MINUTE, || {
        Ok(kubelet.pod("life")?.is_none().then_some(()))
    })?;
    // The kubelet lists a static pod no more as soon as its manifest is gone, before it stops it.
    wait_for("the preStop hook to run", MINUTE, || {
        Ok(host.join("prestop").exists().then_some(()))
    })?;
    wait_for("the sandbox to be removed", 3 * MINUTE, || {
        Ok(daemon.sandboxes(&cell)?.is_empty().then_some(()))
    })?;
    kubelet.terminate()?;
    daemon.terminate()?;
    registry.stop()?;
    leaks::remove_kubelet_cgroups(&cell)?;
    cell.sh(&format!("umount {} || true", host.join("late").display()))?;
    leaks::check(&before, &leaks::snapshot(&cell)?)?;
    cell.check_host_sysctls()
}

/// Point (d): after a reboot a pod runs in a new sandbox, a finished one is not run again.
#[test]
fn a_reboot_gives_new_sandboxes_and_repeats_nothing() -> Result<()> {
    let Some(kubelet_program) = program("KUBELET") else {
        return Ok(());
    };
    let cell = Cell::new("kubelet-reboot")?;
    let layout = busybox_layout(cell.dir(), "app", "app:1")?;
    let mut daemon = Daemon::start(&cell, None)?;
    let image = daemon.import(&cell, &layout, "test.example/app:1")?;
    let socket = daemon.socket();
    let options = Options {
        socket: &socket,
        config: json!({}),
        by_flag: true,
        kubeconfig: None,
    };
    let mut kubelet = Kubelet::start(&cell, &kubelet_program, &options)?;
    let host = cell.subdir("host")?;
    kubelet.apply(&simple_pod("steady", &image, "Always", "exec sleep 3600", &host))?;
    kubelet.apply(&simple_pod(
        "once",
        &image,
        "Never",
        "echo ran >>/host/once",
        &host,
    ))?;
    let old = kubelet.wait_pod("steady", "to be ready", 2 * MINUTE, is_ready)?;
    kubelet.wait_pod("once", "to be done", 2 * MINUTE, |pod| {
        pod["status"]["phase"] == "Succeeded"
    })?;
    let old_netns = netns_names(&cell)?;
    let old_sandboxes = daemon.sandboxes(&cell)?;

    kubelet.kill()?;
    daemon.reboot(&cell)?;
    kubelet = Kubelet::start(&cell, &kubelet_program, &options)?;
    let new = kubelet.wait_pod("steady", "to be ready in a new sandbox", 3 * MINUTE, |pod| {
        is_ready(pod)
            && container_status(pod, "main")["containerID"] != container_status(&old, "main")["containerID"]
    })?;
    ensure!(
        container_status(&new, "main")["restartCount"].as_u64() >= Some(1),
        "no restart counted: {:#}",
        new["status"]
    );
    let attempts: BTreeSet<u32> = daemon
        .sandboxes(&cell)?
        .iter()
        .filter(|s| s.name.starts_with("steady"))
        .map(|s| s.attempt)
        .collect();
    ensure!(
        attempts.contains(&1),
        "no sandbox with attempt 1: {attempts:?} (before: {old_sandboxes:?})"
    );
    kubelet.wait_pod("once", "to stay done", MINUTE, |pod| {
        pod["status"]["phase"] == "Succeeded"
    })?;
    ensure!(
        count_lines(&host.join("once"))? == 1,
        "the pod with restartPolicy Never ran again"
    );
    let left: Vec<_> = netns_names(&cell)?.intersection(&old_netns).cloned().collect();
    ensure!(
        left.is_empty(),
        "network namespaces of before the reboot are still there: {left:?}"
    );
    for pod in ["steady", "once"] {
        kubelet.delete(pod)?;
        wait_for("the pod to be gone", 2 * MINUTE, || {
            Ok(kubelet.pod(pod)?.is_none().then_some(()))
        })?;
    }
    wait_for("the sandboxes to be removed", 3 * MINUTE, || {
        Ok(daemon.sandboxes(&cell)?.is_empty().then_some(()))
    })?;
    kubelet.terminate()?;
    daemon.terminate()?;
    leaks::remove_kubelet_cgroups(&cell)?;
    cell.check_host_sysctls()
}

/// Point (e): twenty pods, six minutes; garbage collected, logs rotated without a lost line, plausible statistics.
#[test]
fn twenty_pods_for_six_minutes() -> Result<()> {
    let Some(kubelet_program) = program("KUBELET") else {
        return Ok(());
    };
    let cell = Cell::new("kubelet-twenty")?;
    let before = leaks::snapshot(&cell)?;
    let layout = busybox_layout(cell.dir(), "app", "app:1")?;
    let unused = busybox_layout(cell.dir(), "unused", "unused:1")?;
    let daemon = Daemon::start(&cell, None)?;
    let image = daemon.import(&cell, &layout, "test.example/app:1")?;
    daemon.import(&cell, &unused, "test.example/unused:1")?;
    let socket = daemon.socket();
    let config = json!({
        "imageMinimumGCAge": "1s", "imageMaximumGCAge": "1m",
        "containerLogMaxSize": "1Mi", "containerLogMaxFiles": 5, "containerLogMonitorInterval": "3s",
        "maxPods": 40,
    });
    let kubelet = Kubelet::start(
        &cell,
        &kubelet_program,
        &Options {
            socket: &socket,
            config,
            by_flag: false,
            kubeconfig: None,
        },
    )?;
    let host = cell.subdir("host")?;
    // One writes numbered lines as fast as 60 KiB/s, one restarts all the time (dead containers to collect).
    let writer = "i=0; while :; do n=0; while [ $n -lt 1000 ]; do echo line-$i-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; i=$((i+1)); n=$((n+1)); done; sleep 1; done";
    kubelet.apply(&simple_pod("writer", &image, "Always", writer, &host))?;
    kubelet.apply(&simple_pod("crasher", &image, "Always", "sleep 5; exit 3", &host))?;
    for n in 0..18 {
        kubelet.apply(&simple_pod(
            &format!("idle{n}"),
            &image,
            "Always",
            "exec sleep 3600",
            &host,
        ))?;
    }
    for n in 0..18 {
        kubelet.wait_pod(&format!("idle{n}"), "to be ready", 4 * MINUTE, is_ready)?;
    }
    wait_for("the unused image to be collected", 7 * MINUTE, || {
        Ok((!daemon.images(&cell)?.iter().any(|name| name.contains("unused"))).then_some(()))
    })?;
    ensure!(
        daemon.images(&cell)?.iter().any(|name| name.contains("app")),
        "an image in use was collected"
    );
    let crashed = daemon
        .containers(&cell)?
        .into_iter()
        .filter(|c| c.pod.starts_with("crasher"))
        .count();
    let restarts = kubelet
        .pod("crasher")?
        .map(|pod| container_status(&pod, "main")["restartCount"].as_u64());
    ensure!(
        restarts.flatten() >= Some(3),
        "the crasher restarted only {restarts:?} times"
    );
    ensure!(
        crashed <= 4,
        "{crashed} dead containers of the crasher are still there"
    );
    check_rotated_log(&cell)?;
    check_summary(&serde_json::from_str(&kubelet.get("/stats/summary")?)?)?;
    for n in 0..18 {
        kubelet.delete(&format!("idle{n}"))?;
    }
    kubelet.delete("writer")?;
    kubelet.delete("crasher")?;
    wait_for("all sandboxes to be removed", 4 * MINUTE, || {
        Ok(daemon.sandboxes(&cell)?.is_empty().then_some(()))
    })?;
    kubelet.terminate()?;
    daemon.terminate()?;
    leaks::remove_kubelet_cgroups(&cell)?;
    leaks::check(&before, &leaks::snapshot(&cell)?)?;
    cell.check_host_sysctls()
}

/// What point (b) lists, in one static pod.
fn life_pod(image: &str, host: &Path) -> Value {
    let sh = |script: &str| json!(["sh", "-c", script]);
    let host_mount = json!({"name": "host", "mountPath": "/host", "mountPropagation": "HostToContainer"});
    let shared = json!({"name": "shared", "mountPath": "/shared"});
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "life", "namespace": "default"},
        "spec": {
            "restartPolicy": "Always", "terminationGracePeriodSeconds": 5,
            "initContainers": [
                {"name": "init", "image": image, "imagePullPolicy": "Always", "command": sh("mkdir -p /shared/sub; echo from-init >/shared/sub/file"), "volumeMounts": [shared]},
                {"name": "sidecar", "image": image, "imagePullPolicy": "Always", "restartPolicy": "Always",
                 "command": sh("echo $(readlink /proc/self/ns/ipc) >/shared/ipc-sidecar; exec sleep 3600"), "volumeMounts": [shared]},
            ],
            "containers": [
                {"name": "server", "image": image, "imagePullPolicy": "Always",
                 "command": sh("mkdir /tmp/www; echo over-localhost >/tmp/www/index.html; readlink /proc/self/ns/ipc >/shared/ipc-server; echo via-shm >/dev/shm/note; exec httpd -f -p 8080 -h /tmp/www"),
                 "lifecycle": {
                    "postStart": {"exec": {"command": sh("echo started >/host/poststart")}},
                    "preStop": {"exec": {"command": sh("echo stopping >/host/prestop")}},
                 },
                 "livenessProbe": {"exec": {"command": sh("echo probe >>/host/probes")}, "periodSeconds": 1, "timeoutSeconds": 10},
                 "volumeMounts": [shared, host_mount]},
                {"name": "client", "image": image, "imagePullPolicy": "Always",
                 "command": sh("until wget -q -O /shared/answer http://127.0.0.1:8080/; do sleep 0.2; done; cat /dev/shm/note >/shared/shm; cat /sub/file >/shared/subpath; exec sleep 3600"),
                 "volumeMounts": [shared, {"name": "shared", "mountPath": "/sub", "subPath": "sub"}]},
                {"name": "crash", "image": image, "imagePullPolicy": "Always",
                 "command": sh("echo last words >/dev/termination-log; exit 42")},
            ],
            "volumes": [{"name": "shared", "emptyDir": {}}, {"name": "host", "hostPath": {"path": host}}],
        },
    })
}

fn check_life(cell: &Cell, kubelet: &Kubelet<'_>, pod: &Value, host: &Path) -> Result<()> {
    let init = &container_status(pod, "init")["state"]["terminated"];
    ensure!(init["exitCode"] == 0, "init container: {init}");
    ensure!(
        container_status(pod, "sidecar")["ready"] == true,
        "the sidecar is not ready"
    );
    let read = |file: &str| kubelet.run("life", "server", &format!("cat%20{file}"));
    ensure!(
        read("/shared/answer")?.trim() == "over-localhost",
        "containers do not share localhost"
    );
    ensure!(
        read("/shared/shm")?.trim() == "via-shm",
        "containers do not share /dev/shm"
    );
    ensure!(
        read("/shared/subpath")?.trim() == "from-init",
        "subPath shows other content"
    );
    ensure!(
        read("/shared/ipc-server")? == read("/shared/ipc-sidecar")?,
        "containers do not share the ipc namespace"
    );
    ensure!(host.join("poststart").exists(), "the postStart hook did not run");
    wait_for("the liveness probe to run", MINUTE, || {
        Ok((count_lines(&host.join("probes"))? > 1).then_some(()))
    })?;
    let crash = container_status(pod, "crash");
    let last = if crash["state"]["terminated"].is_object() {
        &crash["state"]["terminated"]
    } else {
        &crash["lastState"]["terminated"]
    };
    ensure!(
        last["exitCode"] == 42 && last["message"] == "last words\n",
        "the crash is told otherwise: {crash:#}"
    );
    // A mount made on the host after the start shows inside.
    let late = host.join("late");
    cell.sh(&format!(
        "mkdir -p {0}; mount -t tmpfs tmpfs {0}; echo late >{0}/file",
        late.display()
    ))?;
    ensure!(
        read("/host/late/file")?.trim() == "late",
        "a mount made after the start does not reach the container"
    );
    Ok(())
}

/// What must not change when a daemon crashes: address, container ids, restart counts (the crasher's excepted).
fn stable_identity(pod: &Value) -> Value {
    let of = |name: &str| {
        let status = container_status(pod, name);
        json!({"name": name, "id": status["containerID"], "restarts": status["restartCount"]})
    };
    let containers = ["sidecar", "server", "client"].map(of);
    json!({"address": pod["status"]["podIP"], "containers": containers})
}

fn is_ready_but(pod: &Value, except: &str) -> bool {
    pod["status"]["containerStatuses"]
        .as_array()
        .is_some_and(|list| list.len() > 1 && list.iter().all(|s| s["name"] == except || s["ready"] == true))
}

fn simple_pod(name: &str, image: &str, restart: &str, script: &str, host: &Path) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "restartPolicy": restart, "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "main", "image": image, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "host", "mountPath": "/host"}],
            }],
            "volumes": [{"name": "host", "hostPath": {"path": host}}],
        },
    })
}

/// All lines of the writer's log files, oldest first, must be consecutive.
fn check_rotated_log(cell: &Cell) -> Result<()> {
    let dir = cell.sh(&format!(
        "echo {}/pods/default_writer-node1_*/main",
        cell.dir().display()
    ))?;
    let script = format!(
        "cd {}; for f in $(ls | grep -v '^0.log$' | sort) 0.log; do case $f in *.gz) zcat $f;; *) cat $f;; esac; done",
        dir.trim()
    );
    let text = cell.sh(&script)?;
    let files = cell.sh(&format!("ls {} | wc -l", dir.trim()))?;
    ensure!(
        files.trim().parse::<u32>()? >= 2,
        "the log was not rotated: {files} file(s)"
    );
    let mut expected: Option<u64> = None;
    for line in text.lines() {
        let number: u64 = line
            .split_once("line-")
            .and_then(|(_, rest)| rest.split('-').next())
            .and_then(|n| n.parse().ok())
            .with_context(|| format!("a log line is broken: {line:?}"))?;
        ensure!(
            expected.is_none_or(|e| e == number),
            "log line {expected:?} is lost, next is {number}"
        );
        expected = Some(number + 1);
    }
    ensure!(expected > Some(5000), "only {expected:?} lines");
    Ok(())
}

fn check_summary(summary: &Value) -> Result<()> {
    let pods = summary["pods"].as_array().context("the summary lists pods")?;
    ensure!(pods.len() >= 19, "the summary lists {} pods", pods.len());
    for pod in pods {
        for container in pod["containers"].as_array().into_iter().flatten() {
            let memory = container["memory"]["workingSetBytes"].as_u64().unwrap_or(0);
            let cpu = container["cpu"]["usageCoreNanoSeconds"].as_u64().unwrap_or(0);
            let disk = container["rootfs"]["usedBytes"].as_u64();
            let running = pod["podRef"]["name"]
                .as_str()
                .is_some_and(|name| name.starts_with("idle"));
            if running {
                ensure!(
                    (4096..100 << 20).contains(&memory),
                    "implausible memory: {container:#}"
                );
                ensure!(cpu > 100_000, "implausible cpu: {container:#}");
                ensure!(disk.is_some(), "no disk usage: {container:#}");
            }
        }
    }
    let fs = &summary["node"]["runtime"]["imageFs"];
    ensure!(
        fs["usedBytes"].as_u64() > Some(100_000),
        "implausible image file system: {fs:#}"
    );
    Ok(())
}

fn netns_names(cell: &Cell) -> Result<BTreeSet<String>> {
    Ok(cell.sh("ls /run/netns")?.lines().map(str::to_owned).collect())
}

fn count_lines(path: &Path) -> Result<usize> {
    Ok(std::fs::read_to_string(path).unwrap_or_default().lines().count())
}
