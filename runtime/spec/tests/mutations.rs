//! Configurations changed at random, always in the same way: an answer each time, and never a panic.

#![allow(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test, in its helpers too"
)]

use coracle_spec::Config;

const GOOD: &str = include_str!("corpus/crio.json");

/// Bytes changed, cut, doubled and spliced at random, always in the same way: an answer, and never a panic.
#[test]
fn mutations_never_panic() {
    let corpus = [
        GOOD,
        include_str!("corpus/docker.json"),
        include_str!("corpus/podman.json"),
    ];
    let rounds = if std::env::var_os("CORACLE_LONG").is_some() {
        200_000
    } else {
        20_000
    };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..rounds {
        let mut bytes = corpus[round % corpus.len()].as_bytes().to_vec();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &mut random);
        }
        match Config::from_slice(&bytes) {
            Ok(_) => accepted += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    // Both ways are taken often, so the mutations are neither too mild nor too wild.
    assert!(
        accepted > rounds / 50 && refused > rounds / 50,
        "{accepted} accepted, {refused} refused"
    );
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const TOKENS: [&str; 14] = [
        "null",
        "-1",
        "[]",
        "{}",
        "\"\"",
        "1e999",
        "18446744073709551616",
        "true",
        "\"\\u0000\"",
        "[[[[",
        "}",
        ",",
        "\"\\ud800\"",
        "4294967296",
    ];
    let at = random.below(bytes.len().max(1));
    match random.below(6) {
        0 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
        1 => bytes.truncate(at),
        2 => {
            let end = (at + random.below(40)).min(bytes.len());
            bytes.drain(at..end);
        }
        3 => {
            let end = (at + random.below(200)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
        4 => bytes[at] ^= 1 << random.below(8),
        // The value after a colon becomes another one.
        _ => {
            let Some(colon) = bytes[at..].iter().position(|byte| *byte == b':') else {
                return;
            };
            let start = at + colon + 1;
            let end = bytes[start..]
                .iter()
                .position(|byte| b",}]".contains(byte))
                .map_or(bytes.len(), |n| start + n);
            let token = TOKENS[random.below(TOKENS.len())];
            bytes.splice(start..end, token.bytes());
        }
    }
    if bytes.is_empty() {
        bytes.push(b'{');
    }
}

/// A small generator, so that every run makes the same changes.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % bound
    }
}
