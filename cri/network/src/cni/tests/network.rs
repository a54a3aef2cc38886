//! The network in force: configurations that come and go, what its plugins are asked, what a request may say.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::json;

use super::*;
use crate::tests::isolated;

#[test]
fn the_status_names_file_and_cure_and_follows_the_directories() {
    isolated(|| {
        let host = Host::new();
        std::fs::remove_dir_all(host.path("net.d")).unwrap();
        let network = host.network();
        let mut watch = network.watch().unwrap().unwrap();
        let mut not_ready = || {
            network.refresh(&mut watch).unwrap();
            network.status().not_ready.unwrap_or_default()
        };
        let nothing = not_ready();
        assert!(
            nothing.contains("no CNI configuration in") && nothing.contains("net.d: put one there"),
            "{nothing}"
        );
        let error = failure(network.attach("pod", &options()));
        assert!(error.contains(&nothing), "{error}");
        host.nothing_is_left();

        std::fs::create_dir(host.path("net.d")).unwrap();
        host.write("net.d/05-bad.conf", r#"{"name":"x","type":"../../bin/sh"}"#);
        let bad = not_ready();
        assert!(
            bad.contains("05-bad.conf: type \"../../bin/sh\" is not the name of a plugin"),
            "{bad}"
        );
        host.conf("1.0.0");
        assert_eq!(not_ready(), "");
        assert!(format!("{:?}", network.status().findings).contains("05-bad.conf"));

        std::fs::remove_file(host.path("bin/two")).unwrap();
        let missing = not_ready();
        assert!(
            missing.contains("10-net.conflist: CNI plugin \"two\" is not in"),
            "{missing}"
        );
        let error = failure(network.attach("pod", &options()));
        assert!(error.contains("CNI plugin \"two\" is not in"), "{error}");
        assert_eq!(
            host.calls(),
            [""; 0],
            "the first plugin is not begun without the second"
        );
        host.nothing_is_left();
        host.install("two");
        assert_eq!(not_ready(), "");
        std::fs::set_permissions(host.path("bin/two"), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(not_ready().contains("CNI plugin \"two\" is not in"));
        std::fs::set_permissions(host.path("bin/two"), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(not_ready(), "");

        // The directory is replaced as a whole.
        std::fs::rename(host.path("net.d"), host.path("old")).unwrap();
        std::fs::create_dir(host.path("net.d")).unwrap();
        assert_eq!(not_ready(), nothing);
        host.conf("1.0.0");
        assert_eq!(not_ready(), "");
        network.attach("pod", &options()).unwrap();
        network.detach("pod").unwrap();
    });
}

#[test]
fn plugins_are_asked_for_their_status_and_told_which_pods_there_are() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        let mut watch = network.watch().unwrap().unwrap();
        let mut refresh = || {
            host.calls();
            network.refresh(&mut watch).unwrap();
            host.calls()
        };
        assert_eq!(refresh(), [""; 0], "1.0.0 knows of neither");
        host.conf("1.1.0");
        assert_eq!(refresh(), ["one STATUS", "two STATUS", "one GC", "two GC"]);
        assert_eq!(
            host.request("two", "GC")["cni.dev/valid-attachments"],
            json!([{"containerID": "pod", "ifname": "eth0"}])
        );
        assert_eq!(host.variable("two", "GC", "CNI_CONTAINERID"), None);
        assert_eq!(refresh(), [""; 0], "nothing has changed");

        host.tell("two", "STATUS", "refuse");
        host.write("net.d/zz.conf", "");
        assert_eq!(
            refresh(),
            ["one STATUS", "two STATUS"],
            "the same network is not collected twice"
        );
        let why = network.status().not_ready.unwrap();
        assert!(
            why.contains("10-net.conflist is not ready: CNI plugin two refused STATUS with code 11"),
            "{why}"
        );
        host.calls();
        network.attach("other", &options()).unwrap();
        assert_eq!(
            host.calls(),
            ["one ADD", "two ADD"],
            "who asks all the same is served"
        );
        host.heal("two", "STATUS");
        host.write("net.d/zz.conf", " ");
        refresh();
        assert_eq!(network.status().not_ready, None);

        host.tell("one", "GC", "die");
        let conf =
            json!({"cniVersion": "1.1.0", "name": "other", "plugins": [{"type": "one"}, {"type": "two"}]});
        host.write("net.d/10-net.conflist", &conf.to_string());
        assert_eq!(
            refresh(),
            ["one STATUS", "two STATUS", "one GC", "two GC"],
            "one that fails keeps none"
        );
        assert_eq!(host.request("two", "GC")["cni.dev/valid-attachments"], json!([]));
        let conf =
            json!({"cniVersion": "1.1.0", "name": "third", "disableGC": true, "plugins": [{"type": "one"}]});
        host.write("net.d/10-net.conflist", &conf.to_string());
        assert_eq!(refresh(), ["one STATUS"]);
        for pod in ["pod", "other"] {
            network.detach(pod).unwrap();
        }
        host.nothing_is_left();
    });
}

#[test]
fn checks_and_results_keep_to_the_version() {
    isolated(|| {
        let host = Host::new();
        host.conf("0.3.1");
        let network = host.network();
        let attached = network.attach("pod", &options()).unwrap();
        assert_eq!(attached.result.unwrap()["cniVersion"], "0.3.1");
        host.calls();
        network.check("pod").unwrap();
        assert_eq!(host.calls(), [""; 0], "there is no CHECK before 0.4.0");
        network.detach("pod").unwrap();
        assert_eq!(host.request("one", "DEL")["prevResult"], Value::Null);

        host.conf("0.4.0");
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        host.tell("two", "CHECK", "refuse");
        let error = failure(network.check("pod"));
        assert!(error.contains("refused CHECK"), "{error}");
        network.detach("pod").unwrap();
        host.nothing_is_left();
    });
}

#[test]
fn names_that_break_out_are_refused_before_anything_is_done() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        let mut evil = options();
        evil.identity.name = "web;IP=10.0.0.1".to_owned();
        let error = failure(network.attach("pod", &evil));
        assert!(error.starts_with("K8S_POD_NAME"), "{error}");
        let mut evil = options();
        evil.annotations = [("kubernetes.io/ingress-bandwidth".to_owned(), "much".to_owned())].into();
        let error = failure(network.attach("pod", &evil));
        assert!(error.contains("ingress-bandwidth"), "{error}");
        assert_eq!(host.calls(), [""; 0]);
        host.nothing_is_left();
    });
}

#[test]
fn the_kubelets_addresses_become_a_network_where_there_is_none() {
    isolated(|| {
        let host = Host::new();
        let network = host.network();
        host.write(
            "template",
            r#"{"cniVersion":"1.0.0","name":"rendered","plugins":[{"type":"one","capabilities":{"ipRanges":true},
                "ipam":{"ranges":[{{range $i, $range := .PodCIDRRanges}}
                    {{- if $i}}, {{end}}[{"subnet":"{{$range}}"}]{{end}}]}}]}"#,
        );
        let rendered = host.path("net.d/10-coracle-net.conflist");
        network.set_pod_cidr("10.7.0.0/24").unwrap();
        assert!(!rendered.exists(), "somebody else has brought one");
        std::fs::remove_file(host.path("net.d/10-net.conflist")).unwrap();
        for cidrs in ["10.7.0.0/24,fd07::/64", "10.8.0.0/24"] {
            network.set_pod_cidr(cidrs).unwrap();
            let text = std::fs::read_to_string(&rendered).unwrap();
            assert!(cidrs.split(',').all(|cidr| text.contains(cidr)), "{text}");
        }
        // The node's addresses are told once, and known to later daemons.
        let network = host.network();
        network.attach("pod", &options()).unwrap();
        let ranges = &host.request("one", "ADD")["runtimeConfig"]["ipRanges"];
        assert_eq!(ranges, &json!([[{"subnet": "10.8.0.0/24"}]]));
        network.detach("pod").unwrap();
        std::fs::remove_file(&rendered).unwrap();

        failure(network.set_pod_cidr("10.8.0.0"));
        host.write("template", "{{.Nothing}}");
        let error = failure(network.set_pod_cidr("10.7.0.0/24"));
        assert!(
            error.contains("template: {{.Nothing}} is not understood"),
            "{error}"
        );
        host.write("template", "{}");
        let error = failure(network.set_pod_cidr("10.7.0.0/24"));
        assert!(error.contains("what it makes has no name"), "{error}");
        assert!(!rendered.exists());
    });
}
