//! Pods whose plugins fail: what is said, what is left behind, and that it heals.

use serde_json::json;

use super::*;
use crate::Error;
use crate::tests::isolated;

#[test]
fn plugins_are_run_as_the_specification_says() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        assert_eq!((network.mode(), network.status().not_ready), ("cni", None));
        let attached = network.attach("pod", &options()).unwrap();
        let ips: Vec<_> = attached.ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["10.9.0.2", "fd00::2"]);
        assert_eq!(host.calls(), ["one ADD", "two ADD"]);

        let first = host.request("one", "ADD");
        assert_eq!(
            first,
            json!({"cniVersion": "1.0.0", "name": "net", "type": "one", "keep": {"this": [1]}})
        );
        let second = host.request("two", "ADD");
        assert_eq!(second["prevResult"]["ips"][1]["address"], "10.9.0.2/24");
        assert_eq!(
            second["runtimeConfig"],
            json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}]})
        );
        let variable = |name| host.variable("one", "ADD", name);
        for (name, value) in [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "pod"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/coracle-0a1b2c3d-pod"),
        ] {
            assert_eq!(variable(name).as_deref(), Some(value), "{name}");
        }
        let arguments = variable("CNI_ARGS").unwrap();
        assert!(
            arguments.contains(";K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;"),
            "{arguments}"
        );
        let path = format!("{}:{}", host.path("absent").display(), host.path("bin").display());
        assert_eq!(variable("CNI_PATH"), Some(path));
        assert_eq!(
            variable("CARGO_MANIFEST_DIR"),
            None,
            "nothing of our own environment"
        );
        assert_eq!(host.read("one.cwd").trim(), "/");
        // Standard input, output, error, and the directory that ls has open.
        assert_eq!(host.read("one.fds").trim(), "4");

        network.check("pod").unwrap();
        assert_eq!(host.calls(), ["one CHECK", "two CHECK"]);
        assert_eq!(
            host.request("one", "CHECK")["prevResult"],
            attached.result.clone().unwrap()
        );
        assert_eq!(network.result("pod"), attached.result);

        // Everything that a later daemon knows comes from the row.
        drop(network);
        std::fs::remove_file(host.path("net.d/10-net.conflist")).unwrap();
        let network = host.network();
        let found = network.attachment("pod").unwrap().unwrap();
        assert_eq!((found.ips, found.result), (attached.ips, attached.result));
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        assert_eq!(host.request("one", "DEL")["prevResult"], second["prevResult"]);
        assert_eq!(
            host.request("two", "DEL")["runtimeConfig"],
            second["runtimeConfig"]
        );
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), [""; 0]);
        host.nothing_is_left();
    });
}

#[test]
fn what_goes_wrong_at_add_is_said_and_undone() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        for (mode, said) in [
            (
                "refuse",
                "CNI plugin two refused ADD with code 11: not now: the reason",
            ),
            (
                "die",
                "CNI plugin two ended with status 3 at ADD, and said \"oops\"",
            ),
            (
                "complain",
                "CNI plugin two ended with status 3 at ADD, and said \"oops\"",
            ),
            ("kill", "was killed by signal 9 at ADD, and said \"nothing\""),
            ("rubbish", "no result: it is no JSON object"),
            ("empty", "no result: it is empty"),
            ("close", "no result: it is empty"),
            (
                "flood",
                "CNI plugin two answered more than 1 MiB to ADD and was killed",
            ),
            ("homeless", "CNI network net gave the pod no address on eth0"),
            ("late-death", "CNI plugin two ended with status 1"),
        ] {
            host.tell("two", "ADD", mode);
            let error = failure(network.attach("pod", &options()));
            assert!(error.contains(said), "{mode}: {error}");
            assert_eq!(
                host.calls(),
                ["one ADD", "two ADD", "two DEL", "one DEL"],
                "{mode}"
            );
            host.nothing_is_left();
            // By it plugins find what they made before another one failed; `homeless` did answer.
            if mode != "homeless" {
                let first: Value = serde_json::from_str(&host.read("one.answer")).unwrap();
                let previous = &host.request("one", "DEL")["prevResult"];
                assert_eq!(previous["ips"], first["ips"], "{mode}");
            }
        }
        // What is not wrong: much said beside the answer, and something left in the background with our pipes open.
        for mode in ["talk", "background"] {
            host.tell("two", "ADD", mode);
            network.attach("pod", &options()).unwrap();
            network.detach("pod").unwrap();
        }
        assert!(host.sleeper_is_alive());
        let pid: i32 = host.read("sleeper").trim().parse().unwrap();
        coracle_kernel::signal::kill(pid, coracle_kernel::signal::Signal::KILL).unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_plugin_that_hangs_is_killed_with_everything_that_it_started() {
    isolated(|| {
        let host = Host::new();
        let network = host.network_with(CniConfig {
            timeout: Duration::from_secs(1),
            ..host.config()
        });
        host.tell("one", "ADD", "hang");
        let error = failure(network.attach("pod", &options()));
        assert!(
            error.contains("CNI plugin one did not end ADD within 1s and was killed"),
            "{error}"
        );
        assert!(!host.sleeper_is_alive());
        assert_eq!(
            host.calls(),
            ["one ADD", "two DEL", "one DEL"],
            "DEL has a time of its own"
        );
        host.nothing_is_left();
    });
}

#[test]
fn a_pod_that_cannot_be_taken_down_is_tried_again_until_it_can() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        host.calls();
        for mode in ["refuse", "die", "kill", "flood"] {
            host.tell("two", "DEL", mode);
            let error = failure(network.detach("pod"));
            assert!(error.contains("CNI plugin two"), "{mode}: {error}");
            assert_eq!(host.calls(), ["two DEL"], "{mode}");
            assert_eq!((pins().len(), lock(&host.book.rows).len()), (1, 1));
            let again = network.detach("pod");
            assert!(matches!(again, Err(Error::Pending { .. })), "asked again at once");
            assert_eq!(host.calls(), [""; 0], "and not tried again at once");
            let text = format!("{:?}", network.status().findings);
            assert!(text.contains("could not be taken down"), "{text}");
            network.failures.forget("pod");
        }

        failure(network.detach("pod"));
        assert_eq!(retry_due(&network), [""; 0], "not due yet");
        host.calls();
        host.heal("two", "DEL");
        retry_until_done(&network);
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        assert_eq!(network.status().findings, []);
        assert_eq!(network.due(|_| false), crate::Due::default());
        network.detach("pod").unwrap();
        host.nothing_is_left();

        // A plugin that knows nothing of the pod has nothing to take down.
        network.attach("pod", &options()).unwrap();
        host.tell("one", "DEL", "unknown");
        network.detach("pod").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_failed_attach_whose_undoing_fails_stays_on_its_row() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        host.tell("two", "ADD", "refuse");
        host.tell("one", "DEL", "die");
        let error = failure(network.attach("pod", &options()));
        assert!(
            error.contains("not now"),
            "the first failure is the one that is told: {error}"
        );
        assert_eq!(lock(&host.book.rows).len(), 1);
        host.heal("one", "DEL");
        retry_until_done(&network);
        host.nothing_is_left();
    });
}

#[test]
fn after_a_crash_or_a_reboot_del_is_sent_for_what_nobody_knows_and_only_for_that() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        for pod in ["alive", "dead", "rebooted"] {
            network.attach(pod, &options()).unwrap();
        }
        network.pins.remove("rebooted").unwrap();
        host.calls();
        drop(network);

        let network = host.network();
        assert_eq!(network.sweep(|pod| pod == "alive").unwrap(), 2);
        assert_eq!(
            host.calls(),
            [""; 0],
            "the start of the daemon waits for no plugin"
        );
        host.tell("one", "DEL", "die");
        assert_eq!(retry_due(&network), [""; 0]);
        host.heal("one", "DEL");
        retry_until_done(&network);
        assert_eq!(lock(&host.book.rows).keys().collect::<Vec<_>>(), ["alive"]);
        let calls = std::fs::read_to_string(host.path("calls")).unwrap();
        assert!(calls.contains("one DEL rebooted \n"), "no namespace: {calls}");
        assert!(
            calls.contains("one DEL dead /run/netns/coracle-0a1b2c3d-dead\n"),
            "{calls}"
        );
        assert!(!calls.contains("alive"), "{calls}");
        network.detach("alive").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn a_daemon_without_cni_takes_pods_down_by_their_records() {
    isolated(|| {
        let host = Host::new();
        host.network().attach("pod", &options()).unwrap();
        host.calls();
        let bridge = crate::Bridge {
            subnet: "10.123.0.0/24".parse().unwrap(),
            subnet_v6: None,
            mtu: 1500,
            masquerade: false,
        };
        let book: Arc<dyn crate::Book> = host.book.clone();
        let network = Network::new(INSTANCE, Mode::Bridge(bridge), book).unwrap();
        assert_eq!(network.attachment("pod").unwrap().unwrap().ips.len(), 2);
        network.detach("pod").unwrap();
        assert_eq!(host.calls(), ["two DEL", "one DEL"]);
        host.nothing_is_left();
    });
}

#[test]
fn many_pods_at_once_and_one_operation_at_a_time_for_each() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        std::thread::scope(|scope| {
            for number in 0..8 {
                let network = &network;
                scope.spawn(move || {
                    let pod = format!("pod-{}", number % 4);
                    network.attach(&pod, &options()).unwrap();
                    network.detach(&pod).unwrap();
                });
            }
        });
        host.nothing_is_left();
    });
}
