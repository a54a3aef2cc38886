//! Connections that the kernel tracks: what it remembers of a UDP or SCTP flow outlives the rule that made it.
//!
//! A flow that goes on keeps its entry, and the entry says where its packets go. So an entry that was made before a
//! host port led to a pod keeps the packets from it, and one that was made while it did sends them to an address that
//! is another pod's by then. TCP connections end by themselves with the pod.

use std::collections::BTreeMap;
use std::net::IpAddr;

use coracle_kernel::{Errno, Result};
use netlink_packet_netfilter::NetfilterSubsystem;

use super::nfnl::{self, Family, Request, bytes, field, nest};
use super::ports::Forward;
use super::table::family_of;
use crate::Protocol;
use crate::rtnl::Rtnl;

// Message types and attributes of linux/netfilter/nfnetlink_conntrack.h.
const GET: u8 = 1;
const DELETE: u8 = 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const FILTER: u16 = 25;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const V4_SOURCE: u16 = 1;
const V4_DESTINATION: u16 = 2;
const V6_SOURCE: u16 = 3;
const V6_DESTINATION: u16 = 4;
const PROTO_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const FILTER_ORIGINAL: u16 = 1;
const FILTER_REPLY: u16 = 2;
/// Bits of `FILTER_*`: which parts of a tuple the kernel looks at. Not at addresses: up to 6.18 at least it leaves out
/// the entries with just that IPv6 address.
const BY_PROTO: u32 = 1 << 3;
const BY_SOURCE_PORT: u32 = 1 << 4;
const BY_DESTINATION_PORT: u32 = 1 << 5;

/// Entries that are remembered before they are deleted.
const ROUND: usize = 1 << 14;
/// A table of the kernel's largest size has fewer rounds of entries.
const ROUNDS_MAX: usize = 256;

/// Forgets flows to the host's side of `forwards` that do not lead to the pod.
pub(super) fn forget_others(forwards: &[Forward]) -> Result<()> {
    let groups = groups(forwards, |forward| forward.host_port);
    if groups.is_empty() {
        return Ok(());
    }
    // Flows that pass through this host to the same port of others are none of ours.
    let own = Rtnl::open()?.addresses()?;
    let own = |address: &IpAddr| own.contains(address) || address.is_loopback();
    for ((family, protocol), ports) in groups {
        let stale = |entry: &Entry<'_>| {
            let asked = ports.get(&entry.to_port).into_iter().flatten();
            let mut asked = asked.filter(|forward| match forward.at {
                None => own(&entry.to),
                Some(at) => at == entry.to,
            });
            asked.any(|forward| entry.answers_from != forward.to.ip())
        };
        let only = only_port(&ports);
        forget(family, protocol, (TUPLE_ORIGINAL, only), stale)?;
    }
    Ok(())
}

/// Forgets flows that lead to the pod of `forwards`.
pub(super) fn forget_own(forwards: &[Forward]) -> Result<()> {
    for ((family, protocol), ports) in groups(forwards, |forward| forward.to.port()) {
        let stale = |entry: &Entry<'_>| {
            let mut leading = ports.get(&entry.answers_from_port).into_iter().flatten();
            leading.any(|forward| entry.answers_from == forward.to.ip())
        };
        forget(family, protocol, (TUPLE_REPLY, only_port(&ports)), stale)?;
    }
    Ok(())
}

/// Forwards by a port of theirs.
type Ports<'a> = BTreeMap<u16, Vec<&'a Forward>>;

/// The forwards whose flows outlive them. The kernel looks through all of its table for each question, so there is one
/// for all ports of a family and protocol.
fn groups(forwards: &[Forward], port: impl Fn(&Forward) -> u16) -> BTreeMap<(Family, Protocol), Ports<'_>> {
    let mut groups: BTreeMap<_, Ports<'_>> = BTreeMap::new();
    for forward in forwards
        .iter()
        .filter(|forward| forward.protocol != Protocol::Tcp)
    {
        let ports = groups.entry((family_of(forward), forward.protocol)).or_default();
        ports.entry(port(forward)).or_default().push(forward);
    }
    groups
}

fn only_port(ports: &Ports<'_>) -> Option<u16> {
    let mut ports = ports.keys();
    ports.next().copied().filter(|_| ports.next().is_none())
}

/// What an entry says.
struct Entry<'a> {
    /// Where its first packet was sent.
    to: IpAddr,
    /// Where answers come from: the same address, unless it was translated.
    answers_from: IpAddr,
    to_port: u16,
    answers_from_port: u16,
    original: &'a [u8],
    id: &'a [u8],
}

/// Deletes the entries of a family and protocol of which `stale` holds. `only` is the port that all of them have on
/// `side`, if it is one: the kernel tells of no others then.
fn forget(
    family: Family,
    protocol: Protocol,
    (side, only): (u16, Option<u16>),
    stale: impl Fn(&Entry<'_>) -> bool,
) -> Result<()> {
    let (flags, port_kind, by_port) = if side == TUPLE_ORIGINAL {
        (FILTER_ORIGINAL, DESTINATION_PORT, BY_DESTINATION_PORT)
    } else {
        (FILTER_REPLY, SOURCE_PORT, BY_SOURCE_PORT)
    };
    let mut proto = vec![bytes(PROTO_NUMBER, [protocol.number()])];
    let mut parts = BY_PROTO;
    if let Some(port) = only {
        proto.push(bytes(port_kind, port.to_be_bytes()));
        parts |= by_port;
    }
    let tuple = nest(TUPLE_PROTO, &proto);
    for _ in 0..ROUNDS_MAX {
        let query = Request {
            name: "conntrack IPCTNL_MSG_CT_GET",
            subsystem: NetfilterSubsystem::Conntrack,
            kind: GET,
            family,
            flags: 0,
            attributes: vec![
                nest(side, std::slice::from_ref(&tuple)),
                nest(FILTER, &[bytes(flags, parts.to_ne_bytes())]),
            ],
        };
        let mut found = Vec::new();
        nfnl::dump(query, |answer| {
            if let Some(entry) = parse(answer).filter(&stale)
                && found.len() < ROUND
            {
                found.push((entry.original.to_vec(), entry.id.to_vec()));
            }
        })?;
        let more = found.len() == ROUND;
        for (original, id) in found {
            let delete = Request {
                name: "conntrack IPCTNL_MSG_CT_DELETE",
                subsystem: NetfilterSubsystem::Conntrack,
                kind: DELETE,
                family,
                flags: 0,
                attributes: vec![
                    bytes(TUPLE_ORIGINAL | netlink_packet_core::NLA_F_NESTED, original),
                    bytes(ID, id),
                ],
            };
            match nfnl::act(delete) {
                // It ended meanwhile.
                Err(error) if error.errno() != Errno::ENOENT => return Err(error),
                _ => {}
            }
        }
        if !more {
            break;
        }
    }
    Ok(())
}

fn parse(answer: &[u8]) -> Option<Entry<'_>> {
    let original = field(answer, TUPLE_ORIGINAL)?;
    let reply = field(answer, TUPLE_REPLY)?;
    let address = |tuple, (v4, v6)| {
        let ip = field(tuple, TUPLE_IP)?;
        let v4 = field(ip, v4).and_then(|octets| <[u8; 4]>::try_from(octets).ok());
        let v6 = field(ip, v6).and_then(|octets| <[u8; 16]>::try_from(octets).ok());
        v4.map(IpAddr::from).or(v6.map(IpAddr::from))
    };
    let port = |tuple, kind| {
        let octets = field(field(tuple, TUPLE_PROTO)?, kind)?;
        <[u8; 2]>::try_from(octets).ok().map(u16::from_be_bytes)
    };
    Some(Entry {
        to: address(original, (V4_DESTINATION, V6_DESTINATION))?,
        answers_from: address(reply, (V4_SOURCE, V6_SOURCE))?,
        to_port: port(original, DESTINATION_PORT)?,
        answers_from_port: port(reply, SOURCE_PORT)?,
        original,
        id: field(answer, ID)?,
    })
}
