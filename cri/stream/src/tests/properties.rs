//! The protocol cores under any bytes, cut anywhere.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::client::{control, data};
use crate::spdy::conn::{Connection, Event};
use crate::spdy::header::deflate::Deflater;
use crate::ws::channel;
use crate::ws::frame::{self as ws, masked};
use crate::ws::{Channels, Decoder};

/// A session of frames in their order; each is (kind of frame, stream, payload).
fn session(frames: &[(u8, u8, Vec<u8>)]) -> Vec<u8> {
    let mut deflater = Deflater::new();
    let mut bytes = Vec::new();
    for (kind, stream, payload) in frames {
        let stream = u32::from(*stream);
        let number = stream.to_be_bytes();
        bytes.extend(match kind % 7 {
            0 | 1 => {
                let id = stream.to_string();
                let block = deflater.block(&[("streamtype", "data"), ("port", "80"), ("requestid", &id)]);
                control(1, kind & 1, &[&number[..], &[0; 6], &block].concat())
            }
            2 | 3 if stream > 0 => data(stream, payload, kind & 1 == 1),
            4 if stream > 0 => control(3, 0, &[&number[..], &[0, 0, 0, 5]].concat()),
            5 => control(6, 0, &number),
            _ => control(20, 0, payload),
        });
    }
    bytes
}

/// What comes out, pieces of data joined; and whether it ended in an error.
fn events(parts: &[&[u8]]) -> (Vec<Event>, bool) {
    let (mut connection, mut input, mut all) = (Connection::new(8), BytesMut::new(), Vec::new());
    for part in parts {
        input.extend_from_slice(part);
        loop {
            match connection.next(&mut input) {
                Ok(Some(Event::Data { stream, bytes })) => match all.last_mut() {
                    Some(Event::Data {
                        stream: last,
                        bytes: before,
                    }) if *last == stream => *before = Bytes::from([&before[..], &bytes].concat()),
                    _ => all.push(Event::Data { stream, bytes }),
                },
                Ok(Some(event)) => all.push(event),
                Ok(None) => break,
                Err(_) => return (all, true),
            }
        }
        // nothing is kept but the beginning of one control frame
        assert!(input.len() < 20 << 10);
    }
    (all, false)
}

/// What comes out of a WebSocket, pieces joined; pings and ends are told as channels that there are none of.
fn messages(parts: &[&[u8]], base64: bool) -> (Vec<(u8, Vec<u8>)>, bool) {
    let (mut decoder, mut channels) = (Decoder::default(), Channels::new(base64, true));
    let (mut input, mut all) = (BytesMut::new(), Vec::<(u8, Vec<u8>)>::new());
    for part in parts {
        input.extend_from_slice(part);
        loop {
            let piece = match decoder.next(&mut input) {
                Ok(Some(ws::Event::Piece(piece))) => piece,
                Ok(Some(ws::Event::Ping(bytes))) => {
                    all.push((250, bytes.to_vec()));
                    continue;
                }
                Ok(Some(ws::Event::Close(status))) => {
                    all.push((251, status.unwrap_or(0).to_be_bytes().to_vec()));
                    continue;
                }
                Ok(None) => break,
                Err(_) => return (all, true),
            };
            match channels.piece(piece) {
                Ok(Some(channel::Event::Data { channel, bytes })) => match all.last_mut() {
                    Some((last, before)) if *last == channel => before.extend(bytes),
                    _ => all.push((channel, bytes.to_vec())),
                },
                Ok(Some(channel::Event::Finished { channel })) => all.push((252, vec![channel])),
                Ok(None) => {}
                Err(_) => return (all, true),
            }
        }
        assert!(input.len() < 140);
    }
    (all, false)
}

/// Cuts bytes at places.
fn cut<'a>(bytes: &'a [u8], at: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<_> = at.iter().map(|at| at.index(bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

fn frames() -> impl Strategy<Value = Vec<(u8, u8, Vec<u8>)>> {
    let frame = (any::<u8>(), 1u8..40, prop::collection::vec(any::<u8>(), 0..300));
    prop::collection::vec(frame, 0..30)
}

fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 0..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, rng_seed: prop::test_runner::RngSeed::Fixed(4), ..ProptestConfig::default() })]

    #[test]
    fn spdy_is_the_same_however_it_is_cut(frames in frames(), at in cuts()) {
        let bytes = session(&frames);
        let whole = events(&[&bytes]);
        prop_assert_eq!(&events(&cut(&bytes, &at)), &whole);
        prop_assert!(!whole.1);
    }

    #[test]
    fn spdy_survives_mutations(frames in frames(), at in cuts(), flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = session(&frames);
        for (place, byte) in flips {
            if !bytes.is_empty() {
                let place = place.index(bytes.len());
                bytes[place] ^= byte;
            }
        }
        let whole = events(&[&bytes]);
        prop_assert_eq!(events(&cut(&bytes, &at)).1, whole.1);
        let opened = whole.0.iter().filter(|event| matches!(event, Event::Opened { .. })).count();
        prop_assert!(opened <= 30);
    }

    #[test]
    fn spdy_survives_rubbish(bytes in prop::collection::vec(any::<u8>(), 0..4000), at in cuts()) {
        let whole = events(&[&bytes]);
        prop_assert_eq!(events(&cut(&bytes, &at)), whole);
    }

    #[test]
    fn websocket_is_the_same_however_it_is_cut(
        messages_in in prop::collection::vec((0u8..12, any::<[u8; 4]>(), prop::collection::vec(any::<u8>(), 0..200)), 0..20),
        at in cuts(),
    ) {
        let mut bytes = Vec::new();
        for (kind, mask, payload) in &messages_in {
            bytes.extend(match kind {
                0 => masked(0x89, *mask, &payload[..payload.len().min(125)]),
                1 => masked(0x88, *mask, &[3, 232]),
                2 => masked(0x82, *mask, &[255, 0]),
                3 | 4 => [masked(0x02, *mask, b"\0first"), masked(0x80, *mask, payload)].concat(),
                _ => masked(0x82, *mask, &[&[0][..], payload].concat()),
            });
        }
        let whole = messages(&[&bytes], false);
        prop_assert_eq!(&messages(&cut(&bytes, &at), false), &whole);
        prop_assert!(!whole.1);
    }

    #[test]
    fn websocket_survives_rubbish(bytes in prop::collection::vec(any::<u8>(), 0..4000), at in cuts(), base64: bool) {
        let whole = messages(&[&bytes], base64);
        let parts = messages(&cut(&bytes, &at), base64);
        // an error in base64 may be seen with the first of its characters or with the last
        prop_assert_eq!(parts.1, whole.1);
        if !base64 {
            prop_assert_eq!(parts.0, whole.0);
        }
    }

    #[test]
    fn base64_is_the_same_however_it_is_cut(payload in prop::collection::vec(any::<u8>(), 1..500), at in cuts()) {
        let bytes = masked(0x81, [1, 2, 3, 4], &channel::encode(0, &payload));
        prop_assert_eq!(messages(&cut(&bytes, &at), true), (vec![(0, payload)], false));
    }
}

/// Bytes that are nearly frames: the heads are valid, what they say is not.
#[test]
fn near_frames_of_fixed_seeds_are_survived() {
    let mut seed = 0x5eed_u64;
    let mut next = move || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u32
    };
    for _ in 0..3000 {
        let mut bytes = Vec::new();
        for _ in 0..next() % 20 {
            let body: Vec<u8> = (0..next() % 64).map(|_| next().to_le_bytes()[0]).collect();
            bytes.extend(match next() % 3 {
                0 => data(next() % 20, &body, next() % 2 == 0),
                _ => control(next().to_le_bytes()[0] % 12, next().to_le_bytes()[0] % 4, &body),
            });
        }
        let at = (next() as usize) % (bytes.len() + 1);
        let (first, second) = bytes.split_at(at);
        assert_eq!(events(&[&bytes]), events(&[first, second]));
    }
}
