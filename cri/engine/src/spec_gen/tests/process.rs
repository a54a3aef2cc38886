//! Program, environment, user.

use coracle_proto::cri::{KeyValue, SupplementalGroupsPolicy};
use coracle_spec::NamespaceKind;
use serde_json::json;

use super::super::exec_process;
use super::{Request, number, words};

#[test]
fn command_and_arguments_replace_the_images_halves() {
    let args = |command: &[&str], args: &[&str]| {
        let request = Request::with(|request| {
            request.image.entrypoint = words(&["entry"]);
            request.image.cmd = words(&["default"]);
            request.container.command = words(command);
            request.container.args = words(args);
        });
        request.config().process.args
    };
    assert_eq!(args(&[], &[]), ["entry", "default"]);
    assert_eq!(args(&[], &["a"]), ["entry", "a"]);
    assert_eq!(args(&["c"], &[]), ["c"]);
    assert_eq!(args(&["c"], &["a"]), ["c", "a"]);
    let none = Request::with(|request| request.image.cmd = Vec::new());
    assert!(none.error().starts_with("config.command: is empty"));
}

#[test]
fn the_environment_is_the_images_then_the_requests_each_name_once() {
    let pair = |key: &str, value: &[u8]| KeyValue {
        key: key.to_owned(),
        value: value.to_vec(),
    };
    let request = Request::with(|request| {
        request.image.env = words(&["PATH=/image", "A=1", "EMPTY="]);
        request.container.envs = vec![pair("A", b"2"), pair("B", b"x=y\nz")];
        request.container.tty = true;
    });
    let env = request.config().process.env;
    assert_eq!(
        env,
        [
            "PATH=/image",
            "TERM=xterm",
            "HOSTNAME=pod-0",
            "A=2",
            "EMPTY=",
            "B=x=y\nz"
        ]
    );

    for bad in ["LONELY", "=x", ""] {
        let request = Request::with(|request| request.image.env = words(&[bad]));
        assert!(request.error().starts_with("image.config.env[0]"), "{bad}");
    }
    for (key, value) in [("", &b"x"[..]), ("A=B", b"x"), ("A", b"\0"), ("A", b"\xff")] {
        let request = Request::with(|request| request.container.envs = vec![pair(key, value)]);
        assert!(request.error().starts_with("config.envs[0]"), "{key:?}");
    }
}

#[test]
fn host_network_pods_have_the_hosts_name() {
    let request = Request::with(|request| {
        request.namespaces.network = None;
        request.namespaces.uts = None;
    });
    let config = request.config();
    assert!(config.process.env.contains(&"HOSTNAME=node".to_owned()));
    assert!(!config.namespaces.contains(NamespaceKind::Network));
    assert!(!config.namespaces.contains(NamespaceKind::Uts));
}

#[test]
fn users_are_looked_up_in_the_image() {
    let run = |edit: &dyn Fn(&mut Request)| {
        let generated = Request::with(|request| edit(request)).generate().unwrap();
        (generated.uid, generated.gid, generated.groups)
    };
    let image = |user: &'static str| run(&move |request| request.image.user = user.into());
    assert_eq!(image(""), (0, 0, vec![0]));
    assert_eq!(image("app"), (1000, 1001, vec![1001, 50, 44]));
    assert_eq!(image("1000"), (1000, 1001, vec![1001, 50, 44]));
    assert_eq!(image("1000:7"), (1000, 7, vec![7, 50, 44]));
    assert_eq!(image("app:staff"), (1000, 50, vec![50, 44]));
    assert_eq!(image("77"), (77, 0, vec![0]));
    assert_eq!(image(":50"), (0, 50, vec![50]));
    let by_number = run(&|request| {
        request.image.user = "app".into();
        request.context.run_as_user = number(5);
        request.context.run_as_group = number(6);
    });
    assert_eq!(by_number, (5, 6, vec![6]));
    let merged = run(&|request| {
        request.context.run_as_username = "app".into();
        request.context.supplemental_groups = vec![9, 50];
    });
    assert_eq!(merged, (1000, 1001, vec![1001, 9, 50, 44]));
    let strict = run(&|request| {
        request.context.run_as_username = "app".into();
        request.context.supplemental_groups = vec![9];
        request.context.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
    });
    assert_eq!(strict, (1000, 1001, vec![1001, 9]));
}

/// Each of these has a line in the image that would make it root.
#[test]
fn a_user_that_is_no_number_and_no_name_is_refused() {
    let hostile = [
        "4294967296",
        "2147483648000:0",
        "4294967295",
        "-1",
        "0x0",
        "١",
        "+1",
        " 1",
        "99999999999999999999",
        "a b",
        "1:-1",
    ];
    let lines: String = hostile
        .iter()
        .map(|name| format!("{name}:x:0:0::/:/bin/sh\n"))
        .collect();
    for user in hostile {
        let mut request = Request::with(|request| {
            request.users.passwd.extend(lines.as_bytes());
            request.image.user = user.to_owned();
        });
        assert!(request.error().starts_with("image.config.user: "), "{user}");
        request.context.run_as_username = user.to_owned();
        assert!(request.error().contains("run_as_username"), "{user}");
    }
    let missing = Request::with(|request| request.context.run_as_username = "nobody".into());
    assert!(missing.error().contains("the image has no user \"nobody\""));
    let alone = Request::with(|request| request.context.run_as_group = number(5));
    assert!(alone.error().contains("run_as_group: needs run_as_user"));
    let negative = Request::with(|request| request.context.run_as_user = number(-1));
    assert!(negative.error().contains("run_as_user: -1 is not a valid id"));
    let group = Request::with(|request| request.context.supplemental_groups = vec![1 << 32]);
    assert!(group.error().contains("supplemental_groups[0]"));
}

#[test]
fn an_exec_runs_with_the_stored_privileges() {
    let request = Request::with(|request| {
        request.container.tty = true;
        request.context.run_as_user = number(7);
        request.context.no_new_privs = true;
    });
    let stored = request.generate().unwrap().config;
    let process = exec_process(&stored, &words(&["ls", "-l"]), false).unwrap();
    let (process, warnings) = coracle_spec::load_process(process.to_string().as_bytes()).unwrap();
    assert_eq!(warnings, []);
    assert_eq!(process.args, ["ls", "-l"]);
    assert!(!process.terminal && process.no_new_privileges);
    assert_eq!(process.user.uid, 7);
    assert_eq!(process.capabilities, request.config().process.capabilities);
    exec_process(&json!({}), &[], false).unwrap_err();
}
