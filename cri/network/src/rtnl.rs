//! Links, addresses and routes by rtnetlink: one request, its answer, no background.
//!
//! A socket belongs to the network namespace of the thread that opened it, whatever becomes of that thread.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use coracle_kernel::epoll::{Interest, wait_one};
use coracle_kernel::{Errno, Error, Result, fd};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage, State,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::netlink::{RECEIVE_BYTES, ended, messages, open_socket, receive, send};

/// Links, addresses or routes that one dump tells of at most.
const ANSWERS_MAX: usize = 1 << 16;
/// `RTNLGRP_LINK` and `RTNLGRP_IPV6_IFADDR`.
const EVENT_GROUPS: [u32; 2] = [1, 9];
/// The loopback device's index in every namespace.
const LOOPBACK: u32 = 1;

/// A blocking rtnetlink socket.
pub(crate) struct Rtnl {
    socket: netlink_sys::Socket,
    sequence: u32,
}

/// A route of the main table.
pub(crate) struct Route {
    /// Where it leads; none for a default route.
    pub(crate) destination: Option<IpAddr>,
    pub(crate) prefix: u8,
    pub(crate) link: Option<u32>,
    pub(crate) metric: u32,
}

/// Wakes whenever a link of its namespace changes, or an IPv6 address.
pub(crate) struct LinkEvents(netlink_sys::Socket);

/// A veth pair to be made: one end here, the other one in another namespace.
pub(crate) struct Pair<'a> {
    pub(crate) name: &'a str,
    pub(crate) alias: String,
    pub(crate) mtu: u32,
    pub(crate) peer: &'a str,
    pub(crate) peer_namespace: BorrowedFd<'a>,
}

impl Rtnl {
    pub(crate) fn open() -> Result<Rtnl> {
        Ok(Rtnl {
            socket: open_socket(NETLINK_ROUTE)?,
            sequence: 0,
        })
    }

    /// Waits until a link can send: until its carrier, which the kernel notices in the background, has been taken
    /// account of. What is sent before is lost, and comes again a second later.
    pub(crate) fn wait_operational(
        &mut self,
        index: u32,
        events: &LinkEvents,
        timeout: Duration,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let what = || format!("RTM_GETLINK {index}");
        loop {
            let mut message = LinkMessage::default();
            message.header.index = index;
            let links = self.request(RouteNetlinkMessage::GetLink(message), 0, what)?;
            let up = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::OperState(State::Up));
            if links.iter().any(|link| match link {
                RouteNetlinkMessage::NewLink(link) => link.attributes.iter().any(up),
                _ => false,
            }) {
                return Ok(());
            }
            // A change between the answer and here is waiting in the events' socket already.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    "netlink",
                    format!("{}, not up", what()),
                    Errno::ETIMEDOUT,
                ));
            }
            wait_one(&events.0, Interest::READ, Some(left))?;
            events.clear();
        }
    }

    /// Index of the link; none if there is none of that name.
    pub(crate) fn link_index(&mut self, name: &str) -> Result<Option<u32>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answer = self.request(RouteNetlinkMessage::GetLink(message), 0, || {
            format!("RTM_GETLINK {name}")
        });
        match answer {
            Ok(links) => Ok(links.into_iter().find_map(|link| match link {
                RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
                _ => None,
            })),
            Err(error) if error.errno() == Errno::ENODEV => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Name and MTU of the link; none if there is none of that index.
    pub(crate) fn link(&mut self, index: u32) -> Result<Option<(String, u32)>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let what = || format!("RTM_GETLINK {index}");
        let links = match self.request(RouteNetlinkMessage::GetLink(message), 0, what) {
            Err(error) if error.errno() == Errno::ENODEV => return Ok(None),
            other => other?,
        };
        let Some(RouteNetlinkMessage::NewLink(link)) = links.into_iter().next() else {
            return Ok(None);
        };
        let (mut name, mut mtu) = (String::new(), 0);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = text,
                LinkAttribute::Mtu(bytes) => mtu = bytes,
                _ => {}
            }
        }
        Ok(Some((name, mtu)))
    }

    /// Makes a bridge with a hardware address of its own, or the first port's would be the bridge's and change with
    /// it. False if there is a link of that name already.
    pub(crate) fn create_bridge(&mut self, name: &str, hardware: [u8; 6], mtu: u32) -> Result<bool> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Address(hardware.into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        match self.create(RouteNetlinkMessage::NewLink(message), || {
            format!("RTM_NEWLINK {name} bridge")
        }) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Errno::EEXIST => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a pair.
    pub(crate) fn create_pair(&mut self, pair: &Pair<'_>) -> Result<()> {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(pair.peer.to_owned()),
            LinkAttribute::Mtu(pair.mtu),
            LinkAttribute::NetNsFd(fd::number(pair.peer_namespace)),
        ];
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(pair.name.to_owned()),
            LinkAttribute::Mtu(pair.mtu),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        self.create(RouteNetlinkMessage::NewLink(message), || {
            format!("RTM_NEWLINK {} veth, peer {}", pair.name, pair.peer)
        })?;
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(pair.name.to_owned()),
            LinkAttribute::IfAlias(pair.alias.clone()),
        ];
        self.act(RouteNetlinkMessage::SetLink(message), || {
            format!("RTM_SETLINK {}, alias", pair.name)
        })
    }

    /// Brings the loopback device up, and with it 127.0.0.1 and ::1.
    pub(crate) fn loopback_up(&mut self) -> Result<()> {
        self.up(LOOPBACK)
    }

    /// Brings a link up.
    pub(crate) fn up(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.act(RouteNetlinkMessage::SetLink(message), || {
            format!("RTM_SETLINK {index}, up")
        })
    }

    /// Makes a link a port of a bridge that also sends back through it what came in by it.
    pub(crate) fn set_bridge(&mut self, index: u32, bridge: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Controller(bridge));
        self.act(RouteNetlinkMessage::SetLink(message), || {
            format!("RTM_SETLINK {index}, master {bridge}")
        })?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ]));
        self.act(RouteNetlinkMessage::NewLink(message), || {
            format!("RTM_NEWLINK {index}, hairpin")
        })
    }

    /// Removes a link; false if there was none.
    pub(crate) fn delete_link(&mut self, name: &str) -> Result<bool> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.act(RouteNetlinkMessage::DelLink(message), || {
            format!("RTM_DELLINK {name}")
        }) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Errno::ENODEV => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names of a bridge's ports.
    pub(crate) fn ports(&mut self, bridge: u32) -> Result<Vec<String>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Controller(bridge));
        let links = self.request(RouteNetlinkMessage::GetLink(message), NLM_F_DUMP, || {
            "RTM_GETLINK, all".into()
        })?;
        let mut ports = Vec::new();
        for link in links {
            let RouteNetlinkMessage::NewLink(link) = link else {
                continue;
            };
            // Kernels that do not filter tell of every link.
            let ours = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Controller(index) if *index == bridge);
            if link.attributes.iter().any(ours) {
                ports.extend(link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                }));
            }
        }
        Ok(ports)
    }

    /// Gives a link an address; false if it has it already. Nobody else can have an IPv6 one: it is not asked for.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> Result<bool> {
        let mut message = AddressMessage::default();
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        match address {
            IpAddr::V4(address) => {
                message.header.family = AddressFamily::Inet;
                let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
                let broadcast = (address.to_bits() | host).into();
                message.attributes.push(AddressAttribute::Broadcast(broadcast));
            }
            IpAddr::V6(_) => {
                message.header.family = AddressFamily::Inet6;
                message.header.flags = AddressHeaderFlags::Nodad;
            }
        }
        let what = || format!("RTM_NEWADDR {address}/{prefix} on {index}");
        match self.create(RouteNetlinkMessage::NewAddress(message), what) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Errno::EEXIST => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Every address of every link here.
    pub(crate) fn addresses(&mut self) -> Result<Vec<IpAddr>> {
        let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.request(message, NLM_F_DUMP, || "RTM_GETADDR, all".into())?;
        let attributes = answers.into_iter().flat_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => message.attributes,
            _ => Vec::new(),
        });
        // Where both are there, the local one is this host's and the other one the peer's.
        let address = |attribute| match attribute {
            AddressAttribute::Address(address) | AddressAttribute::Local(address) => Some(address),
            _ => None,
        };
        Ok(attributes.filter_map(address).collect())
    }

    /// The default route through `gateway`.
    pub(crate) fn add_default_route(&mut self, gateway: IpAddr, index: u32) -> Result<()> {
        let (address_family, route) = match gateway {
            IpAddr::V4(gateway) => (AddressFamily::Inet, RouteAddress::Inet(gateway)),
            IpAddr::V6(gateway) => (AddressFamily::Inet6, RouteAddress::Inet6(gateway)),
        };
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes = vec![RouteAttribute::Gateway(route), RouteAttribute::Oif(index)];
        self.create(RouteNetlinkMessage::NewRoute(message), || {
            format!("RTM_NEWROUTE default via {gateway}")
        })
    }

    /// The main table's unicast routes, of both families.
    pub(crate) fn routes(&mut self) -> Result<Vec<Route>> {
        let message = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        let routes = self.request(message, NLM_F_DUMP, || "RTM_GETROUTE, all".into())?;
        let mut found = Vec::new();
        for route in routes {
            let RouteNetlinkMessage::NewRoute(message) = route else {
                continue;
            };
            if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.kind != RouteType::Unicast
            {
                continue;
            }
            let mut route = Route {
                destination: None,
                prefix: message.header.destination_prefix_length,
                link: None,
                metric: 0,
            };
            for attribute in message.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                        route.destination = Some(address.into());
                    }
                    RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                        route.destination = Some(address.into());
                    }
                    RouteAttribute::Oif(index) => route.link = Some(index),
                    RouteAttribute::Priority(metric) => route.metric = metric,
                    _ => {}
                }
            }
            found.push(route);
        }
        Ok(found)
    }

    fn create(&mut self, message: RouteNetlinkMessage, what: impl Fn() -> String) -> Result<()> {
        self.request(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, what)
            .map(drop)
    }

    fn act(&mut self, message: RouteNetlinkMessage, what: impl Fn() -> String) -> Result<()> {
        self.request(message, NLM_F_ACK, what).map(drop)
    }

    /// Sends one request and reads until its answer is complete.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: impl Fn() -> String,
    ) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(&self.socket, &bytes, &what)?;

        let mut answers = Vec::new();
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            receive(&self.socket, &mut buffer, &what)?;
            for message in messages::<RouteNetlinkMessage>(&buffer, &what) {
                let message = match message {
                    // What a newer kernel says of one link or route must not hide the others.
                    Err(_) if flags & NLM_F_DUMP != 0 => continue,
                    other => other?,
                };
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => return ended(error.raw_code(), &what).map(|()| answers),
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    _ => {}
                }
                if answers.len() > ANSWERS_MAX {
                    return Err(Error::new("netlink", what(), Errno::E2BIG));
                }
                // A single answer comes without an end mark unless one was asked for.
                if flags & (NLM_F_DUMP | NLM_F_ACK) == 0 && !answers.is_empty() {
                    return Ok(answers);
                }
            }
        }
    }
}

impl LinkEvents {
    pub(crate) fn open() -> Result<LinkEvents> {
        let failed =
            |call| move |error: std::io::Error| Error::from_io(call, "netlink, RTNLGRP_LINK", &error);
        let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE).map_err(failed("socket"))?;
        socket.bind_auto().map_err(failed("bind"))?;
        socket.set_non_blocking(true).map_err(failed("fcntl"))?;
        for group in EVENT_GROUPS {
            socket.add_membership(group).map_err(failed("setsockopt"))?;
        }
        Ok(LinkEvents(socket))
    }

    /// Waits until an IPv6 address that was just added is heard by its neighbours: the kernel joins the group by which
    /// they ask for it in the background, and tells of the address then. What they send before is lost, and comes again
    /// a second later.
    pub(crate) fn wait_address(&self, address: Ipv6Addr, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let what = || format!("RTM_NEWADDR {address}, not there");
        let is_it = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(found) => *found == IpAddr::V6(address),
            _ => false,
        };
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => {}
                // Overrun: it may have been among what was dropped.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS.raw()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(Error::new("netlink", what(), Errno::ETIMEDOUT));
                    }
                    wait_one(&self.0, Interest::READ, Some(left))?;
                }
                Err(error) => return Err(Error::from_io("recv", what(), &error)),
            }
            let messages = messages::<RouteNetlinkMessage>(&buffer, &what).flatten();
            for message in messages {
                if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(new)) = message.payload
                    && new.attributes.iter().any(is_it)
                {
                    return Ok(());
                }
            }
        }
    }

    /// Takes what has come; what it says is asked again anyway, so one that was dropped is no loss.
    fn clear(&self) {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                // Overrun: the rest is still there.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS.raw()) => {}
                Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}
