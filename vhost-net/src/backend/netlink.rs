//! Network interfaces by rtnetlink: one looked at, changed, made and removed; and word that any has changed.
//!
//! Contract: a [`Netlink`] belongs to the network namespace of the thread that opened it. Each request is answered
//! before the function returns, because the kernel answers while it is asked. It is used by one thread at a time: two
//! would take each other's answers.
//!
//! What it deliberately does not do: it does not read what a notice says. Notices can be lost when many interfaces
//! change at once, and the kernel then says only that some were; who is told of a change looks at the interface anew,
//! which is right in both cases.
//!
//! No crate: `rtnetlink` and `neli` bring some thirty others for what are five requests of one layout, and
//! `rustix` already has the sockets.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use nix::libc;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{bind, recv, send, socket_with};

/// Room for an answer: the kernel's own largest is a page or 8 KiB, an interface's 1 to 2 KiB.
const ANSWER_BYTES: usize = 32 << 10;
/// Answers to others' requests that are passed over before a socket is taken to be of no use.
const STRAY_ANSWERS_MAX: usize = 64;

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `struct ifinfomsg`.
const LINK_BYTES: usize = 16;
/// `struct rtattr`.
const ATTRIBUTE_BYTES: usize = 4;

const NLMSG_ERROR: u16 = 2;

// From the kernel's if_link.h, with its names; the C library's bindings have a part of them only.
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
// tidy(words): IFLA_MASTER to the kernel.
const IFLA_PORT_OF: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_MACVLAN_MODE: u16 = 1;
const MACVLAN_MODE_BRIDGE: u32 = 4;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;

/// An interface as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    /// `IFF_UP` and the like.
    pub(super) flags: u32,
    pub(super) mtu: u32,
    /// Six bytes, for an Ethernet.
    pub(super) address: Option<[u8; 6]>,
    /// The bridge (or the like) that it is a port of.
    pub(super) bridge_index: Option<u32>,
    /// `tun`, `macvtap`, `bridge`, `veth`; none for hardware.
    pub(super) kind: Option<String>,
    pub(super) tun: TunDetails,
    pub(super) dropped: Dropped,
}

/// Frames that found no room, since the interface was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Dropped {
    /// On their way from the interface to the host's network, or to its macvtap.
    pub(super) received: u64,
    /// On their way from the host's network to the interface: to who holds the tap.
    pub(super) transmitted: u64,
}

/// What is known of an interface of the kind `tun` only, and of a kernel from 4.17 on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TunDetails {
    /// `IFF_TUN` or `IFF_TAP`.
    pub(super) mode: Option<u8>,
    pub(super) is_multi_queue: Option<bool>,
    /// Queues that some process holds.
    pub(super) queue_count: Option<u32>,
}

impl Interface {
    /// Set up by the administrator.
    pub(super) fn is_up(&self) -> bool {
        self.has(libc::IFF_UP)
    }

    /// With a carrier.
    pub(super) fn has_carrier(&self) -> bool {
        self.has(libc::IFF_LOWER_UP)
    }

    fn has(&self, flag: i32) -> bool {
        self.flags & flag.unsigned_abs() != 0
    }
}

/// Which interface.
#[derive(Clone, Copy, Debug)]
pub(super) enum Which<'a> {
    Name(&'a str),
    Index(u32),
}

/// A change to an interface.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Up,
    Mtu(u16),
    /// A port of the bridge with this index.
    Bridge(u32),
}

/// A macvtap interface to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewMacvtap<'a> {
    pub(super) name: &'a str,
    pub(super) parent_index: u32,
    pub(super) queue_count: u16,
    pub(super) address: Option<[u8; 6]>,
}

/// A socket for requests.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: AtomicU32,
}

impl Netlink {
    pub(super) fn open() -> rustix::io::Result<Self> {
        Ok(Self { socket: route_socket(SocketFlags::CLOEXEC, 0)?, sequence: AtomicU32::new(1) })
    }

    /// The interface, or none that is in this network namespace.
    pub(super) fn find(&self, which: Which<'_>) -> rustix::io::Result<Option<Interface>> {
        let request = match which {
            Which::Name(name) => {
                let mut request = Message::new(libc::RTM_GETLINK, 0, Link::default());
                request.name(name);
                request
            }
            Which::Index(index) => {
                Message::new(libc::RTM_GETLINK, 0, Link { index, ..Link::default() })
            }
        };
        match self.ask(request) {
            Ok(answer) => Ok(parse_interface(&answer)),
            Err(Errno::NODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn change(&self, index: u32, change: Change) -> rustix::io::Result<()> {
        let up = libc::IFF_UP.unsigned_abs();
        let link = match change {
            Change::Up => Link { index, flags: up, changed: up },
            _ => Link { index, ..Link::default() },
        };
        let mut request = Message::new(libc::RTM_NEWLINK, libc::NLM_F_ACK, link);
        match change {
            Change::Up => {}
            Change::Mtu(mtu) => request.number(IFLA_MTU, mtu.into()),
            Change::Bridge(bridge_index) => request.number(IFLA_PORT_OF, bridge_index),
        }
        self.ask(request).map(drop)
    }

    /// Makes a macvtap interface in bridge mode. EEXIST where the name is taken.
    pub(super) fn create(&self, new: NewMacvtap<'_>) -> rustix::io::Result<()> {
        let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut request = Message::new(libc::RTM_NEWLINK, flags, Link::default());
        request.name(new.name);
        request.number(IFLA_LINK, new.parent_index);
        request.number(IFLA_NUM_TX_QUEUES, new.queue_count.into());
        request.number(IFLA_NUM_RX_QUEUES, new.queue_count.into());
        if let Some(address) = new.address {
            request.attribute(IFLA_ADDRESS, &address);
        }
        request.nest(IFLA_LINKINFO, |info| {
            info.attribute(IFLA_INFO_KIND, b"macvtap");
            info.nest(IFLA_INFO_DATA, |data| data.number(IFLA_MACVLAN_MODE, MACVLAN_MODE_BRIDGE));
        });
        self.ask(request).map(drop)
    }

    pub(super) fn remove(&self, index: u32) -> rustix::io::Result<()> {
        let link = Link { index, ..Link::default() };
        self.ask(Message::new(libc::RTM_DELLINK, libc::NLM_F_ACK, link)).map(drop)
    }

    /// What follows the header of the answer to `request`.
    fn ask(&self, request: Message) -> rustix::io::Result<Vec<u8>> {
        let sequence = self.sequence.fetch_add(1, Relaxed);
        send(&self.socket, &request.finished(sequence), SendFlags::empty())?;
        let mut datagram = vec![0; ANSWER_BYTES];
        for _ in 0..STRAY_ANSWERS_MAX {
            let (_, len_bytes) = recv(&self.socket, &mut *datagram, RecvFlags::TRUNC)?;
            let answer = datagram.get(..len_bytes).ok_or(Errno::MSGSIZE)?;
            if let Some(answer) = parse_answer(answer, sequence) {
                return answer.map(<[u8]>::to_vec);
            }
        }
        Err(Errno::PROTO)
    }
}

/// A socket that becomes readable when an interface of this network namespace appears, changes or goes.
#[derive(Debug)]
pub(super) struct Notices {
    socket: OwnedFd,
}

impl Notices {
    pub(super) fn open() -> rustix::io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Ok(Self { socket: route_socket(flags, libc::RTMGRP_LINK.unsigned_abs())? })
    }

    /// Takes all that have come; EAGAIN where none has. That some were lost (ENOBUFS) is a notice like another.
    pub(super) fn take(&self) -> rustix::io::Result<()> {
        // What does not fit is cut off by the kernel: nobody reads it.
        let mut any = false;
        loop {
            match recv(&self.socket, &mut [0; HEADER_BYTES], RecvFlags::empty()) {
                Ok(_) | Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if any => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn route_socket(flags: SocketFlags, groups: u32) -> rustix::io::Result<OwnedFd> {
    // No protocol: NETLINK_ROUTE is zero.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// `struct ifinfomsg`, as far as it is used.
#[derive(Clone, Copy, Default)]
struct Link {
    index: u32,
    flags: u32,
    /// Which of the flags are to become what `flags` says.
    changed: u32,
}

/// A request that is being put together.
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: i32, link: Link) -> Self {
        let mut bytes = vec![0; 4];
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or_default();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([0; 4]);
        for number in [link.index, link.flags, link.changed] {
            bytes.extend(number.to_ne_bytes());
        }
        Self { bytes }
    }

    /// With its length and its number.
    fn finished(mut self, sequence: u32) -> Vec<u8> {
        let len_bytes = u32::try_from(self.bytes.len()).unwrap_or_default();
        self.put(0, &len_bytes.to_ne_bytes());
        self.put(8, &sequence.to_ne_bytes());
        self.bytes
    }

    fn name(&mut self, name: &str) {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(IFLA_IFNAME, &bytes);
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nest(kind, |message| message.bytes.extend(value));
    }

    /// An attribute whose value `fill` adds.
    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend(kind.to_ne_bytes());
        fill(self);
        let len_bytes = self.bytes.len().saturating_sub(start);
        // Without what is filled up behind it.
        self.put(start, &u16::try_from(len_bytes).unwrap_or_default().to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        for (into, from) in self.bytes.iter_mut().skip(at).zip(value) {
            *into = *from;
        }
    }
}

/// What answers the request with this number: what follows its header, or what the kernel refused it with. None where
/// the datagram answers another.
fn parse_answer(datagram: &[u8], sequence: u32) -> Option<rustix::io::Result<&[u8]>> {
    let len_bytes = usize::try_from(u32::from_ne_bytes(array(datagram, 0)?)).ok()?;
    let kind = u16::from_ne_bytes(array(datagram, 4)?);
    if u32::from_ne_bytes(array(datagram, 8)?) != sequence {
        return None;
    }
    let Some(payload) = datagram.get(HEADER_BYTES..len_bytes) else {
        return Some(Err(Errno::PROTO));
    };
    if kind != NLMSG_ERROR {
        return Some(Ok(payload));
    }
    Some(match array(payload, 0).map(i32::from_ne_bytes) {
        Some(0) => Ok(&[]),
        Some(refused) => Err(Errno::from_raw_os_error(refused.saturating_neg())),
        None => Err(Errno::PROTO),
    })
}

/// The interface of an RTM_NEWLINK message, without its header.
fn parse_interface(payload: &[u8]) -> Option<Interface> {
    let mut interface = Interface {
        index: u32::from_ne_bytes(array(payload, 4)?),
        flags: u32::from_ne_bytes(array(payload, 8)?),
        ..Interface::default()
    };
    for (kind, value) in attributes(payload.get(LINK_BYTES..)?) {
        match kind {
            IFLA_IFNAME => interface.name = text(value),
            IFLA_MTU => interface.mtu = number(value)?,
            IFLA_ADDRESS => interface.address = value.try_into().ok(),
            IFLA_PORT_OF => interface.bridge_index = number(value),
            IFLA_LINKINFO => parse_kind(value, &mut interface),
            // `struct rtnl_link_stats64`: packets, bytes and errors of both ways come before.
            IFLA_STATS64 => {
                let count = |at| array(value, at).map_or(0, u64::from_ne_bytes);
                interface.dropped = Dropped { received: count(48), transmitted: count(56) };
            }
            _ => {}
        }
    }
    Some(interface)
}

fn parse_kind(info: &[u8], interface: &mut Interface) {
    for (kind, value) in attributes(info) {
        match kind {
            IFLA_INFO_KIND => interface.kind = Some(text(value)),
            // The kind comes first, and its data is in words of its own.
            IFLA_INFO_DATA if interface.kind.as_deref() == Some("tun") => {
                for (kind, value) in attributes(value) {
                    let byte = value.first().copied();
                    match kind {
                        IFLA_TUN_TYPE => interface.tun.mode = byte,
                        IFLA_TUN_MULTI_QUEUE => interface.tun.is_multi_queue = byte.map(|b| b != 0),
                        IFLA_TUN_NUM_QUEUES => interface.tun.queue_count = number(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

/// Kind and value of each attribute, as far as they are whole.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len_bytes = usize::from(u16::from_ne_bytes(array(bytes, 0)?));
        // The two highest bits say that it is a nest, or in network order.
        let kind = u16::from_ne_bytes(array(bytes, 2)?) & 0x3fff;
        let value = bytes.get(ATTRIBUTE_BYTES..len_bytes)?;
        bytes = bytes.get(len_bytes.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn array<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn number(value: &[u8]) -> Option<u32> {
    array(value, 0).map(u32::from_ne_bytes)
}

fn text(value: &[u8]) -> String {
    let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}
