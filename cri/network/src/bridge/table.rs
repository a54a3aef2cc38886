//! The tables of nf_tables: what is in them, as requests.

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::NetfilterSubsystem;

use super::expr::{self, Expressions};
use super::nfnl::{Family, Request, be32, bytes, field, fields, nest, text};
use super::ports::Forward;
use super::subnet::{Subnet, SubnetV6};

// Message types and attributes of linux/netfilter/nf_tables.h.
const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const NEW_RULE: u8 = 6;
const GET_RULE: u8 = 7;
const NEW_SET: u8 = 9;
const NEW_ELEMENT: u8 = 12;
const GET_ELEMENT: u8 = 13;
const DELETE_ELEMENT: u8 = 14;
/// The table's name is the first attribute of everything.
const TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LENGTH: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LENGTH: u16 = 7;
const SET_ID: u16 = 10;
const SET_IS_MAP: u32 = 8;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const LIST_ITEM: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_COMMENT: u16 = 6;
const VALUE: u16 = 1;
const HOOK_PREROUTING: u32 = 0;
const HOOK_OUTPUT: u32 = 3;
const HOOK_POSTROUTING: u32 = 4;
/// `NF_IP_PRI_RAW`, `NF_IP_PRI_NAT_DST` and `NF_IP_PRI_NAT_SRC`.
const PRIORITY_RAW: i32 = -300;
const PRIORITY_DESTINATION: i32 = -100;
const PRIORITY_SOURCE: i32 = 100;

/// Ports of every address of the host, and of one.
pub(super) const MAPS: [&str; 2] = ["ports", "ports-at"];
/// Elements of one message: an attribute is at most 64 KiB long.
const ELEMENTS_MAX: usize = 128;
/// Bytes before a comment: nft's number of comments, and the length.
const COMMENT_HEAD: usize = 2;
/// What comments of elements begin with.
const COMMENT: &str = "pod ";

/// What the chains depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) subnet: Subnet,
    pub(super) subnet_v6: Option<SubnetV6>,
    pub(super) masquerade: bool,
}

/// The tables of one instance, one in each family.
pub(super) struct Table {
    pub(super) name: String,
    pub(super) bridge: String,
}

/// One family's part of the plan.
struct Side {
    family: Family,
    network: Vec<u8>,
    mask: Vec<u8>,
}

struct Chain {
    name: &'static str,
    /// Type, hook and priority.
    hook: Option<(&'static str, u32, i32)>,
    rules: Vec<Expressions>,
}

impl Table {
    /// Everything anew, in place of what was there.
    pub(super) fn replace(&self, plan: Plan, forwards: &[Forward]) -> Vec<Request> {
        let mut requests = Vec::new();
        for side in plan.sides() {
            // Made, removed and made again: so an old one is replaced in the same transaction.
            for kind in [NEW_TABLE, DELETE_TABLE, NEW_TABLE] {
                requests.push(self.table(kind, side.family));
            }
            requests.extend(self.maps(side.family));
            let chains = self.chains(&side, plan.masquerade);
            requests.extend(chains.iter().map(|chain| self.chain(side.family, chain)));
            for chain in &chains {
                let rules = chain.rules.iter();
                requests.extend(rules.map(|rule| self.rule(side.family, chain.name, rule)));
            }
        }
        requests.extend(self.add(forwards));
        requests
    }

    /// Removes one family's table.
    pub(super) fn remove(&self, family: Family) -> Request {
        self.table(DELETE_TABLE, family)
    }

    /// Adds elements.
    pub(super) fn add(&self, forwards: &[Forward]) -> Vec<Request> {
        let mut requests = Vec::new();
        for family in [Family::V4, Family::V6] {
            for map in MAPS {
                let ours = |forward: &&Forward| {
                    family_of(forward) == family && MAPS[usize::from(forward.at.is_some())] == map
                };
                let items: Vec<DefaultNla> = forwards.iter().filter(ours).map(element).collect();
                requests.extend(self.elements(NEW_ELEMENT, family, map, &items));
            }
        }
        requests
    }

    /// Deletes elements by their keys.
    pub(super) fn delete(&self, family: Family, map: &str, keys: Vec<Vec<u8>>) -> Vec<Request> {
        let key = |key| item(&[nest(ELEMENT_KEY, &[bytes(VALUE, key)])]);
        let items: Vec<DefaultNla> = keys.into_iter().map(key).collect();
        self.elements(DELETE_ELEMENT, family, map, &items)
    }

    /// Asks for all rules of one family.
    pub(super) fn ask_rules(&self, family: Family) -> Request {
        Request {
            name: "NFT_MSG_GETRULE",
            subsystem: NetfilterSubsystem::NfTables,
            kind: GET_RULE,
            family,
            flags: 0,
            attributes: vec![text(TABLE, &self.name)],
        }
    }

    /// Asks for all elements of a map.
    pub(super) fn ask_elements(&self, family: Family, map: &str) -> Request {
        Request {
            name: "NFT_MSG_GETSETELEM",
            subsystem: NetfilterSubsystem::NfTables,
            kind: GET_ELEMENT,
            family,
            flags: 0,
            attributes: vec![text(TABLE, &self.name), text(ELEMENTS_SET, map)],
        }
    }

    /// The families of the plan, with the number of rules that each has.
    pub(super) fn expected(&self, plan: Plan) -> impl Iterator<Item = (Family, usize)> {
        plan.sides().into_iter().map(move |side| {
            let chains = self.chains(&side, plan.masquerade);
            (side.family, chains.iter().map(|chain| chain.rules.len()).sum())
        })
    }

    fn chains(&self, side: &Side, masquerade: bool) -> Vec<Chain> {
        let v4 = side.family == Family::V4;
        let bridge = &self.bridge;
        let mut chains = Vec::new();
        if v4 {
            // Packets of these addresses never leave a host, so nobody sends them in good faith. Without this, pods
            // would reach what listens on 127.0.0.1 (the bridge must have route_localnet), and neighbours a port that
            // is for 127.0.0.1 alone (CVE-2020-8558).
            let loopback = [127, 0, 0, 0];
            let no_loopback = |at| {
                expr::from_elsewhere()
                    .address(at, &loopback, &[255, 0, 0, 0], true)
                    .drop()
            };
            chains.push(Chain {
                name: "guard",
                hook: Some(("filter", HOOK_PREROUTING, PRIORITY_RAW)),
                rules: vec![
                    no_loopback(expr::source(side.family)),
                    no_loopback(expr::destination(side.family)),
                ],
            });
        }
        let looked_up = |marked: bool| {
            let [any, at] = MAPS;
            let rule = |found: Expressions| {
                let found = if marked { found.mark() } else { found };
                found.translate(side.family)
            };
            vec![
                rule(expr::in_map(at, Some(expr::destination(side.family)))),
                rule(expr::in_map(any, None)),
            ]
        };
        for (name, marked) in [("ports", false), ("from-pods", true)] {
            chains.push(Chain {
                name,
                hook: None,
                rules: looked_up(marked),
            });
        }
        let for_host = |expressions: Expressions| {
            // The kernel routes nothing from ::1 to a pod: refused at once is better than never answered.
            let local = expressions.for_this_host();
            if v4 {
                local
            } else {
                let mut only = [0; 16];
                only[15] = 1;
                local.address(expr::destination(side.family), &only, &[0xff; 16], false)
            }
        };
        chains.push(Chain {
            name: "prerouting",
            hook: Some(("nat", HOOK_PREROUTING, PRIORITY_DESTINATION)),
            rules: vec![
                for_host(expr::from_device(bridge)).jump("from-pods"),
                for_host(expr::nothing()).jump("ports"),
            ],
        });
        chains.push(Chain {
            name: "output",
            hook: Some(("nat", HOOK_OUTPUT, PRIORITY_DESTINATION)),
            rules: vec![for_host(expr::nothing()).jump("ports")],
        });
        // The pod answers a neighbour on the bridge, and itself, without asking the host, which must translate back.
        let mut rules = vec![expr::to_device(bridge).marked().masquerade()];
        let (source, destination) = (expr::source(side.family), expr::destination(side.family));
        if v4 {
            let from_loopback =
                expr::to_device(bridge).address(source, &[127, 0, 0, 0], &[255, 0, 0, 0], true);
            rules.push(from_loopback.masquerade());
        }
        if masquerade {
            let leaves = expr::nothing()
                .address(source, &side.network, &side.mask, true)
                .address(destination, &side.network, &side.mask, false);
            rules.push(leaves.masquerade());
        }
        chains.push(Chain {
            name: "postrouting",
            hook: Some(("nat", HOOK_POSTROUTING, PRIORITY_SOURCE)),
            rules,
        });
        chains
    }

    fn table(&self, kind: u8, family: Family) -> Request {
        Request {
            name: if kind == NEW_TABLE {
                "NFT_MSG_NEWTABLE"
            } else {
                "NFT_MSG_DELTABLE"
            },
            subsystem: NetfilterSubsystem::NfTables,
            kind,
            family,
            flags: if kind == NEW_TABLE { NLM_F_CREATE } else { 0 },
            attributes: vec![text(TABLE, &self.name)],
        }
    }

    fn chain(&self, family: Family, chain: &Chain) -> Request {
        let mut attributes = vec![text(TABLE, &self.name), text(CHAIN_NAME, chain.name)];
        if let Some((kind, hook, priority)) = chain.hook {
            attributes.push(nest(
                CHAIN_HOOK,
                &[be32(1, hook), bytes(2, priority.to_be_bytes())],
            ));
            attributes.push(text(CHAIN_TYPE, kind));
        }
        self.create("NFT_MSG_NEWCHAIN", NEW_CHAIN, family, attributes)
    }

    fn rule(&self, family: Family, chain: &str, rule: &Expressions) -> Request {
        let attributes = vec![
            text(TABLE, &self.name),
            text(RULE_CHAIN, chain),
            nest(RULE_EXPRESSIONS, rule.as_slice()),
        ];
        self.create("NFT_MSG_NEWRULE", NEW_RULE, family, attributes)
    }

    fn maps(&self, family: Family) -> Vec<Request> {
        // Numbers that tell nft how to show them, six bits each: address, protocol, port.
        let address = if family == Family::V4 { 7 } else { 8 };
        let (protocol, port) = (12, 13);
        let any = (MAPS[0], protocol << 6 | port, 8, 1);
        let at = (
            MAPS[1],
            address << 12 | protocol << 6 | port,
            8 + expr::address_length(family),
            2,
        );
        let request = |(name, key_type, key_length, id)| {
            let attributes = vec![
                text(TABLE, &self.name),
                text(SET_NAME, name),
                be32(SET_FLAGS, SET_IS_MAP),
                be32(SET_KEY_TYPE, key_type),
                be32(SET_KEY_LENGTH, key_length),
                be32(SET_DATA_TYPE, address << 6 | port),
                be32(SET_DATA_LENGTH, expr::address_length(family) + 4),
                be32(SET_ID, id),
            ];
            self.create("NFT_MSG_NEWSET", NEW_SET, family, attributes)
        };
        vec![request(any), request(at)]
    }

    fn elements(&self, kind: u8, family: Family, map: &str, items: &[DefaultNla]) -> Vec<Request> {
        let request = |items: &[DefaultNla]| Request {
            name: if kind == NEW_ELEMENT {
                "NFT_MSG_NEWSETELEM"
            } else {
                "NFT_MSG_DELSETELEM"
            },
            subsystem: NetfilterSubsystem::NfTables,
            kind,
            family,
            flags: if kind == NEW_ELEMENT { NLM_F_CREATE } else { 0 },
            attributes: vec![
                text(TABLE, &self.name),
                text(ELEMENTS_SET, map),
                nest(ELEMENTS, items),
            ],
        };
        items.chunks(ELEMENTS_MAX).map(request).collect()
    }

    fn create(&self, name: &'static str, kind: u8, family: Family, attributes: Vec<DefaultNla>) -> Request {
        Request {
            name,
            subsystem: NetfilterSubsystem::NfTables,
            kind,
            family,
            // Appended: rules would be put first otherwise.
            flags: NLM_F_CREATE | NLM_F_APPEND,
            attributes,
        }
    }
}

impl Plan {
    fn sides(&self) -> Vec<Side> {
        let v4 = Side {
            family: Family::V4,
            network: self.subnet.network().octets().into(),
            mask: self.subnet.mask().octets().into(),
        };
        let v6 = self.subnet_v6.map(|subnet| Side {
            family: Family::V6,
            network: subnet.network().octets().into(),
            mask: subnet.mask().octets().into(),
        });
        [v4].into_iter().chain(v6).collect()
    }

    /// Whether there is a table for it.
    pub(super) fn has(&self, forward: &Forward) -> bool {
        forward.to.is_ipv4() || self.subnet_v6.is_some()
    }
}

/// Pod and key of each element of an answer.
pub(super) fn elements_of(answer: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    fields(field(answer, ELEMENTS).unwrap_or_default()).map(|(_, element)| {
        let key = field(element, ELEMENT_KEY).and_then(|key| field(key, VALUE));
        (pod_of(element), key.unwrap_or_default())
    })
}

pub(super) fn family_of(forward: &Forward) -> Family {
    if forward.to.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    }
}

/// The pod of an element, nothing for one that is none of ours.
fn pod_of(element: &[u8]) -> &str {
    let comment = field(element, ELEMENT_COMMENT).and_then(|comment| comment.get(COMMENT_HEAD..));
    let text = std::str::from_utf8(comment.unwrap_or_default()).unwrap_or_default();
    text.trim_end_matches('\0')
        .strip_prefix(COMMENT)
        .unwrap_or_default()
}

/// The element of a map: parts of four bytes, or of an address.
fn element(forward: &Forward) -> DefaultNla {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let port = |port: u16| {
        let [high, low] = port.to_be_bytes();
        [high, low, 0, 0]
    };
    let mut key = forward.at.map(octets).unwrap_or_default();
    key.extend([forward.protocol.number(), 0, 0, 0]);
    key.extend(port(forward.host_port));
    let mut data = octets(forward.to.ip());
    data.extend(port(forward.to.port()));
    let text = format!("{COMMENT}{}\0", forward.pod);
    // A pod's id has 128 bytes at most.
    let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
    let comment = [&[0, length], text.as_bytes()].concat();
    item(&[
        nest(ELEMENT_KEY, &[bytes(VALUE, key)]),
        nest(ELEMENT_DATA, &[bytes(VALUE, data)]),
        bytes(ELEMENT_COMMENT, comment),
    ])
}

fn item(attributes: &[DefaultNla]) -> DefaultNla {
    nest(LIST_ITEM, attributes)
}
