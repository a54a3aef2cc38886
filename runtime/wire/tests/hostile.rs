//! Bytes that no honest peer sends: whatever comes, there is an error or a message, and never a panic.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests")]

use coracle_wire::{
    Body, Client, Create, Exec, Failed, Frame, Hello, Incoming, MAX_FRAME, Server, SetupSandbox, Sysctl,
    Taken, VERSION, Welcome, WireError, decode, encode,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Ten times as many with `CORACLE_TEST_LONG` set.
fn runner(seed: u8) -> TestRunner {
    let cases = if std::env::var_os("CORACLE_TEST_LONG").is_some() {
        200_000
    } else {
        20_000
    };
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]))
}

/// Frames of every shape: strings, lists, nested messages, descriptors.
fn seeds() -> Vec<Vec<u8>> {
    let sysctl = Sysctl {
        name: "net.core.somaxconn".into(),
        value: "1".into(),
    };
    let bodies: [Body; 7] = [
        Hello { min: 1, max: VERSION }.into(),
        SetupSandbox {
            pod_id: "p".into(),
            sysctls: vec![sysctl; 3],
            shm_bytes: 1 << 40,
            ..Default::default()
        }
        .into(),
        Create {
            container_id: "c".repeat(64),
            bundle: "/run/x".into(),
            tty: true,
            ..Default::default()
        }
        .into(),
        Exec {
            exec_id: "e".into(),
            deadline_ms: u64::MAX,
            ..Default::default()
        }
        .into(),
        Welcome {
            version: VERSION,
            sandbox: Some(Default::default()),
            ..Default::default()
        }
        .into(),
        Failed {
            kind: -1,
            errno: i32::MIN,
            step: "s".into(),
            message: "m".into(),
        }
        .into(),
        coracle_wire::Exited {
            container_id: "c".into(),
            exit: Default::default(),
        }
        .into(),
    ];
    let frame = |(id, body): (usize, Body)| {
        encode(&Frame {
            id: id as u64 + 1,
            fds: u32::try_from(body.fds()).unwrap(),
            body: Some(body),
        })
        .unwrap()
    };
    bodies.into_iter().enumerate().map(frame).collect()
}

/// Feeds both sides; whatever they accept they must be able to send on.
fn feed(bytes: &[u8], fds: usize) {
    if let Ok(frame) = decode(bytes, fds) {
        let again = encode(&frame).expect("what was decoded fits a frame");
        assert_eq!(decode(&again, fds), Ok(frame));
    }
    for open in [false, true] {
        let mut server = Server::resume(if open { VERSION } else { 0 }, 0, 0);
        match server.receive(bytes, fds) {
            Ok(Taken::Serve(id, body)) => assert!(id > 0 && body.is_request() && body.fds() == fds),
            Ok(Taken::Refuse(id, failed)) => assert!(!server.answer(id, failed.into()).is_empty()),
            Err(_) => {}
        }
    }
    let (mut client, _) = Client::begin().unwrap();
    match client.receive(bytes, fds) {
        Ok(Incoming::Answer { id, body }) => {
            assert!(id == 1 && matches!(body, Body::Welcome(_) | Body::Failed(_)));
        }
        Ok(Incoming::Event(_)) => panic!("an event before the greeting"),
        Ok(Incoming::Ignored) | Err(_) => {}
    }
}

#[test]
fn any_bytes() {
    runner(1)
        .run(
            &(proptest::collection::vec(any::<u8>(), 0..300), 0..10usize),
            |(bytes, fds)| {
                feed(&bytes, fds);
                Ok(())
            },
        )
        .unwrap();
}

#[test]
fn broken_frames() {
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 1..8);
    let seed = prop::sample::select(seeds());
    runner(2)
        .run(&(seed, edits, 0..4usize), |(mut bytes, edits, fds)| {
            for (index, kind, value) in edits {
                let at = index.index(bytes.len().max(1)).min(bytes.len().saturating_sub(1));
                match kind {
                    _ if bytes.is_empty() => bytes.push(value),
                    0 => bytes[at] = value,
                    1 => bytes.truncate(at),
                    2 => bytes.insert(at, value),
                    _ => bytes[at] ^= 1 << (value % 8),
                }
            }
            feed(&bytes, fds);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_long_frame_is_refused_before_it_is_parsed() {
    assert_eq!(
        decode(&vec![0xff; MAX_FRAME + 1], 0),
        Err(WireError::TooLong(MAX_FRAME + 1))
    );
    let create = Create {
        bundle: "x".repeat(MAX_FRAME),
        ..Default::default()
    };
    let long = Frame {
        id: 1,
        fds: 0,
        body: Some(create.into()),
    };
    assert!(matches!(encode(&long), Err(WireError::TooLong(_))));
}

#[test]
fn descriptors_that_do_not_fit_are_refused() {
    let create = Body::from(Create {
        rootfs: true,
        ..Default::default()
    });
    for (declared, received, good) in [
        (1, 1, true),
        (1, 0, false),
        (0, 1, false),
        (0, 0, false),
        (2, 2, false),
    ] {
        let frame = Frame {
            id: 1,
            fds: declared,
            body: Some(create.clone()),
        };
        let decoded = decode(&encode(&frame).unwrap(), received);
        assert_eq!(
            decoded.is_ok(),
            good,
            "{declared} declared, {received} received: {decoded:?}"
        );
    }
    // A body of a later version may carry what it likes, as long as the count is honest.
    let unknown = encode(&Frame {
        id: 1,
        fds: 3,
        body: None,
    })
    .unwrap();
    decode(&unknown, 3).unwrap();
    decode(&unknown, 2).unwrap_err();
}
