//! Masquerading by nf_tables: one table an instance, put in place and removed by one batch each.

use coracle_kernel::{Errno, Error, Result};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, InetHookNumber,
    NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::pool::Subnet;
use crate::rtnl;

const CHAIN: &str = "postrouting";
/// `NF_IP_PRI_NAT_SRC`.
const PRIORITY_SOURCE_NAT: u32 = 100;
/// `NFNL_SUBSYS_NFTABLES`, in the resource field of a batch's first and last message.
const SUBSYSTEM: u16 = 10;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
const NETWORK_HEADER: u32 = 1;
/// Offsets of an IPv4 header's addresses.
const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;

/// What leaves `subnet` gets the address of the interface that it leaves by. In place of a table of an earlier life.
pub(super) fn install(table: &str, subnet: Subnet) -> Result<()> {
    let name = || TableMessage {
        attributes: vec![TableAttribute::Name(table.to_owned())],
    };
    let chain = ChainMessage {
        attributes: vec![
            ChainAttribute::Table(table.to_owned()),
            ChainAttribute::Name(CHAIN.to_owned()),
            ChainAttribute::Hook(vec![
                Hook::Number(InetHookNumber::PostRouting.into()),
                Hook::Priority(PRIORITY_SOURCE_NAT),
            ]),
            ChainAttribute::Type("nat".to_owned()),
        ],
    };
    let mut expressions = Vec::new();
    expressions.extend(address(SOURCE, subnet, Operator::Equal));
    expressions.extend(address(DESTINATION, subnet, Operator::NotEqual));
    expressions.push(Expressions::Other {
        expression_type: "masq".to_owned(),
        attributes: Vec::new(),
    });
    let rule = RuleMessage {
        attributes: vec![
            RuleAttribute::Table(table.to_owned()),
            RuleAttribute::Chain(CHAIN.to_owned()),
            RuleAttribute::Expressions(expressions.into_iter().map(Into::into).collect()),
        ],
    };
    // Made, removed and made again: so an old one is replaced in the same transaction.
    batch(vec![
        (NfTablesMessage::NewTable(name()), NLM_F_CREATE),
        (NfTablesMessage::DeleteTable(name()), 0),
        (NfTablesMessage::NewTable(name()), NLM_F_CREATE),
        (NfTablesMessage::NewChain(chain), NLM_F_CREATE),
        (NfTablesMessage::NewRule(rule), NLM_F_CREATE),
    ])
}

/// Removes the table; none there is no error.
pub(super) fn remove(table: &str) -> Result<()> {
    let name = TableMessage {
        attributes: vec![TableAttribute::Name(table.to_owned())],
    };
    match batch(vec![(NfTablesMessage::DeleteTable(name), 0)]) {
        Err(error) if error.errno() != Errno::ENOENT => Err(error),
        _ => Ok(()),
    }
}

/// The address at `offset` of the packet, compared with the subnet.
fn address(offset: u32, subnet: Subnet, operator: Operator) -> [Expressions; 3] {
    let register = Register::Reg1;
    let value = |address: std::net::Ipv4Addr| DataAttribute::Value(address.octets().into());
    [
        Expressions::Payload(vec![
            Payload::DestinationRegister(register),
            Payload::Base(NETWORK_HEADER),
            Payload::Offset(offset),
            Payload::Len(4),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(register),
            Bitwise::DestinationRegister(register),
            Bitwise::Length(4),
            Bitwise::Mask(value(subnet.mask())),
            Bitwise::Xor(value(std::net::Ipv4Addr::UNSPECIFIED)),
        ]),
        Expressions::Cmp(vec![
            Cmp::SourceRegister(register),
            Cmp::Op(operator),
            Cmp::Data(value(subnet.network())),
        ]),
    ]
}

/// One transaction: all of it or nothing.
fn batch(messages: Vec<(NfTablesMessage, u16)>) -> Result<()> {
    let what = || "nf_tables batch".to_owned();
    let socket = rtnl::open_socket(NETLINK_NETFILTER)?;
    let mut bytes = Vec::new();
    let mut append = |message: NetfilterMessageInner, family, resource, flags, sequence| {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = sequence;
        let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, resource), message);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    };
    append(
        ControlMessage::BatchBegin.into(),
        NetfilterProtoFamily::Unspec,
        SUBSYSTEM,
        0,
        0,
    );
    let mut expected = 0;
    for (message, flags) in messages {
        expected += 1;
        append(
            message.into(),
            NetfilterProtoFamily::IPv4,
            0,
            flags | NLM_F_ACK,
            expected,
        );
    }
    append(
        ControlMessage::BatchEnd.into(),
        NetfilterProtoFamily::Unspec,
        SUBSYSTEM,
        0,
        0,
    );
    rtnl::send(&socket, &bytes, &what)?;

    // Every message is answered, also when the transaction fails; the first refusal is its reason. A refusal of the
    // batch as a whole (no nf_tables in this kernel) is answered once, for its first message.
    let mut outcome = Ok(());
    let mut answered = 0;
    let mut buffer = Vec::with_capacity(rtnl::RECEIVE_BYTES);
    while answered < expected {
        rtnl::receive(&socket, &mut buffer, &what)?;
        for message in rtnl::messages::<NetfilterMessage>(&buffer, &what) {
            let message = message?;
            if let NetlinkPayload::Error(error) = message.payload {
                let ended = rtnl::ended(error.raw_code(), &what);
                if message.header.sequence_number == 0 {
                    return ended.and_then(|()| Err(Error::new("netlink", what(), Errno::EBADMSG)));
                }
                answered += 1;
                outcome = outcome.and(ended);
            }
        }
    }
    outcome
}
