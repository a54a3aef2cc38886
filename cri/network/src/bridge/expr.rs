//! Expressions of nf_tables: what a rule looks at, and what it does then.
//!
//! They load what they look at into registers of four bytes each, `R0` and those behind it.

use netlink_packet_core::DefaultNla;

use super::nfnl::{Family, be32, bytes, nest, text};

/// `NFT_REG32_00`.
const R0: u32 = 8;
/// Behind what a lookup may find.
const SPARE: u32 = R0 + 8;
const LIST_ITEM: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
/// The bytes of a value, or a verdict.
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const META_KEY: u16 = 2;
const META_SOURCE: u16 = 3;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_L4PROTO: u32 = 16;
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
const RTN_LOCAL: u32 = 2;
const NAT_DESTINATION: u32 = 1;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const NF_DROP: u32 = 0;
/// `NFT_JUMP`, which is −3.
const JUMP: u32 = 0xffff_fffd;
const NAME_BYTES: usize = 16;
/// The loopback device's index in every namespace.
const LOOPBACK: u32 = 1;

/// Marks packets of pods to the host's ports for the bridge's address. It is the bit that CNI's portmap plugin uses for
/// just this; where that one's rules are too, they come to the same.
const MARK: u32 = 0x2000;

/// The expressions of a rule, in order: the first that does not hold ends it.
pub(super) struct Expressions(Vec<DefaultNla>);

/// Where an address is in an IP header: offset and length.
pub(super) type Place = (u32, u32);

/// A rule for everything.
pub(super) fn nothing() -> Expressions {
    Expressions(Vec::new())
}

/// Came in by the device.
pub(super) fn from_device(name: &str) -> Expressions {
    nothing().meta(META_IIFNAME, R0).compare(EQUAL, &padded(name))
}

/// Came in by any device but loopback.
pub(super) fn from_elsewhere() -> Expressions {
    nothing()
        .meta(META_IIF, R0)
        .compare(NOT_EQUAL, &LOOPBACK.to_ne_bytes())
}

/// Leaves by the device.
pub(super) fn to_device(name: &str) -> Expressions {
    nothing().meta(META_OIFNAME, R0).compare(EQUAL, &padded(name))
}

/// Protocol and destination port, behind the address at `place` if there is one, are in the map: what it says takes the
/// place of what was loaded.
pub(super) fn in_map(map: &str, place: Option<Place>) -> Expressions {
    let (rule, behind) = match place {
        Some(place) => (nothing().payload(NETWORK_HEADER, place, R0), R0 + place.1 / 4),
        None => (nothing(), R0),
    };
    rule.meta(META_L4PROTO, behind)
        .payload(TRANSPORT_HEADER, (2, 2), behind + 1)
        .then("lookup", &[text(1, map), be32(2, R0), be32(3, R0)])
}

pub(super) fn source(family: Family) -> Place {
    match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    }
}

pub(super) fn destination(family: Family) -> Place {
    match family {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    }
}

pub(super) fn address_length(family: Family) -> u32 {
    source(family).1
}

impl Expressions {
    pub(super) fn as_slice(&self) -> &[DefaultNla] {
        &self.0
    }

    /// The address at `place` is in the subnet, or is not.
    pub(super) fn address(self, place: Place, network: &[u8], mask: &[u8], is: bool) -> Expressions {
        let operator = if is { EQUAL } else { NOT_EQUAL };
        self.payload(NETWORK_HEADER, place, R0)
            .bitwise_in(R0, place.1, mask, &vec![0; mask.len()])
            .compare(operator, network)
    }

    /// The destination is an address of this host.
    pub(super) fn for_this_host(self) -> Expressions {
        let fib = [be32(1, R0), be32(2, FIB_ADDRESS_TYPE), be32(3, FIB_DESTINATION)];
        self.then("fib", &fib).compare(EQUAL, &RTN_LOCAL.to_ne_bytes())
    }

    /// Marks the packet, see [`Expressions::marked`].
    pub(super) fn mark(self) -> Expressions {
        let bit = MARK.to_ne_bytes();
        self.meta(META_MARK, SPARE)
            .bitwise_in(SPARE, 4, &(!MARK).to_ne_bytes(), &bit)
            .then("meta", &[be32(META_KEY, META_MARK), be32(META_SOURCE, SPARE)])
    }

    /// A pod sent it to a port of the host.
    pub(super) fn marked(self) -> Expressions {
        let bit = MARK.to_ne_bytes();
        self.meta(META_MARK, R0)
            .bitwise_in(R0, 4, &bit, &[0; 4])
            .compare(EQUAL, &bit)
    }

    /// The address and the port that were looked up become the destination.
    pub(super) fn translate(self, family: Family) -> Expressions {
        let port = R0 + address_length(family) / 4;
        let nat = [
            be32(1, NAT_DESTINATION),
            be32(2, family.number().into()),
            be32(3, R0),
            be32(5, port),
        ];
        self.then("nat", &nat)
    }

    /// The address of the device that it leaves by becomes the source.
    pub(super) fn masquerade(self) -> Expressions {
        self.then("masq", &[])
    }

    pub(super) fn drop(self) -> Expressions {
        self.verdict(&[be32(1, NF_DROP)])
    }

    /// Goes on in another chain, and here if that one has nothing to say.
    pub(super) fn jump(self, chain: &str) -> Expressions {
        self.verdict(&[be32(1, JUMP), text(2, chain)])
    }

    fn verdict(self, verdict: &[DefaultNla]) -> Expressions {
        // Register 0 is the verdict.
        self.then("immediate", &[be32(1, 0), nest(2, &[nest(VERDICT, verdict)])])
    }

    fn meta(self, key: u32, register: u32) -> Expressions {
        self.then("meta", &[be32(1, register), be32(META_KEY, key)])
    }

    fn payload(self, base: u32, (offset, length): Place, register: u32) -> Expressions {
        let payload = [be32(1, register), be32(2, base), be32(3, offset), be32(4, length)];
        self.then("payload", &payload)
    }

    fn bitwise_in(self, register: u32, length: u32, mask: &[u8], xor: &[u8]) -> Expressions {
        let bitwise = [
            be32(1, register),
            be32(2, register),
            be32(3, length),
            nest(4, &[bytes(VALUE, mask)]),
            nest(5, &[bytes(VALUE, xor)]),
        ];
        self.then("bitwise", &bitwise)
    }

    fn compare(self, operator: u32, value: &[u8]) -> Expressions {
        let compare = [be32(1, R0), be32(2, operator), nest(3, &[bytes(VALUE, value)])];
        self.then("cmp", &compare)
    }

    fn then(mut self, name: &str, attributes: &[DefaultNla]) -> Expressions {
        self.0
            .push(nest(LIST_ITEM, &[text(NAME, name), nest(DATA, attributes)]));
        self
    }
}

fn padded(name: &str) -> [u8; NAME_BYTES] {
    let mut padded = [0; NAME_BYTES];
    for (to, from) in padded.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    padded
}
