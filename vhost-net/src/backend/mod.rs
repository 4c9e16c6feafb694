//! The network behind the device: a tap, a macvtap, a stream socket, or nothing.
//!
//! Contract: [`Backend::open`] makes every system call that can fail for the operator's reasons, and its errors name the
//! option, the interface and the likely cause. Afterwards a [`Backend`] is, for each queue pair, a descriptor to receive
//! from and one to transmit to, whose numbers never change and which never block; what frames may carry
//! ([`Offloads`]); and a [`Link`]. [`Backend::watch`] keeps the link true, on the main thread.
//!
//! What it deliberately does not do: it moves no frame. Queues name operations on its descriptors, and the engine executes
//! them.

mod descriptor;
mod error;
mod link;
mod macvtap;
mod netlink;
pub(crate) mod null;
#[cfg(test)]
mod simulated;
mod spec;
pub(crate) mod stream;
mod tap;

use std::convert::Infallible;
use std::os::fd::BorrowedFd;

use common::sandbox::{Call, Needs};
use nix::libc;

pub(crate) use error::OpenError;
pub(crate) use link::{Link, LinkEvent};
pub(crate) use null::Null;
#[cfg(test)]
pub(crate) use simulated::Simulated;
pub(crate) use spec::{BackendSpec, InterfaceName};
pub(crate) use stream::{Side, Stream, framing};
pub(crate) use tap::Tap;

/// What a frame may be when it is handed over: without a checksum, or longer than the wire's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads {
    /// The checksum of TCP or UDP is still to be computed. All others need it.
    pub(crate) csum: bool,
    /// TCP over IPv4 is still to be segmented.
    pub(crate) tso4: bool,
    /// TCP over IPv6 is still to be segmented.
    pub(crate) tso6: bool,
    /// What is to be segmented may have ECN set.
    pub(crate) ecn: bool,
    /// UDP is still to be fragmented.
    pub(crate) ufo: bool,
    /// UDP, over IPv4 and over IPv6, is still to be cut into datagrams. The kernel does both or none.
    pub(crate) uso: bool,
}

impl Offloads {
    /// What both have.
    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            csum: self.csum && other.csum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
            ufo: self.ufo && other.ufo,
            uso: self.uso && other.uso,
        }
    }

    /// As the kernel's TUNSETOFFLOAD has it. Without `csum` there is nothing else, and without segmentation no ECN.
    fn flags(self) -> u32 {
        let segments = self.tso4 || self.tso6;
        let pairs = [
            (true, libc::TUN_F_CSUM),
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn && segments, libc::TUN_F_TSO_ECN),
            (self.ufo, libc::TUN_F_UFO),
            (self.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ];
        pairs.iter().filter(|(has, _)| self.csum && *has).fold(0, |flags, (_, flag)| flags | flag)
    }
}

/// How to open a back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Queue pairs.
    pub(crate) pairs: u16,
    /// `--mtu`: what the interface's is to be.
    pub(crate) mtu: Option<u16>,
    /// `--bridge`: of which the interface is to be a port.
    pub(crate) bridge: Option<InterfaceName>,
    /// `--mac`: the address of the guest, which a macvtap is to have.
    pub(crate) address: Option<[u8; 6]>,
}

/// An open back end.
#[derive(Debug)]
pub(crate) enum Backend {
    /// A tap or a macvtap.
    Tap(Tap),
    /// A peer that has the network.
    Stream(Stream),
    /// No network.
    Null(Null),
    /// One that a test plays.
    #[cfg(test)]
    Simulated(Simulated),
}

impl Backend {
    /// Opens, or makes, what the operator named.
    pub(crate) fn open(spec: &BackendSpec, settings: Settings) -> Result<Self, OpenError> {
        match spec {
            BackendSpec::Tap(name) => Tap::open(name, settings).map(Self::Tap),
            BackendSpec::TapFds(fds) => Tap::passed(fds, settings).map(Self::Tap),
            BackendSpec::Macvtap(parent) => Tap::macvtap(parent, settings).map(Self::Tap),
            BackendSpec::Socket { path, server } => {
                no_bridge("socket=PATH", &settings)?;
                Stream::open(path, *server, &settings).map(Self::Stream)
            }
            BackendSpec::Null { frame_bytes } => {
                no_bridge("null", &settings)?;
                Ok(Self::Null(Null::new(*frame_bytes)))
            }
        }
    }

    /// What it does on the main thread once it is open.
    pub(crate) fn needs(&self) -> Needs {
        match self {
            Self::Tap(tap) => tap.needs(),
            Self::Stream(stream) => stream.needs(),
            Self::Null(_) => Needs::default(),
            #[cfg(test)]
            Self::Simulated(_) => Needs::default(),
        }
    }

    /// The system calls of queues, beside reading and writing.
    pub(crate) fn queue_calls(&self) -> &'static [Call] {
        match self {
            Self::Tap(_) => descriptor::CALLS,
            Self::Stream(_) => stream::QUEUE_CALLS,
            Self::Null(_) => &[],
            #[cfg(test)]
            Self::Simulated(_) => &[],
        }
    }

    /// What may be handed over in both directions, at most.
    pub(crate) fn offloads(&self) -> Offloads {
        match self {
            Self::Tap(tap) => tap.offloads(),
            Self::Stream(_) | Self::Null(_) => Offloads::default(),
            #[cfg(test)]
            Self::Simulated(simulated) => simulated.offloads(),
        }
    }

    /// The largest payload of a frame, where something is known of it.
    pub(crate) fn mtu(&self) -> Option<u16> {
        match self {
            Self::Tap(tap) => tap.mtu(),
            Self::Stream(_) | Self::Null(_) => None,
            #[cfg(test)]
            Self::Simulated(_) => None,
        }
    }

    /// The address that the guest must have to be reached, where the back end knows one.
    pub(crate) fn address(&self) -> Option<[u8; 6]> {
        match self {
            Self::Tap(tap) => tap.address(),
            Self::Stream(_) | Self::Null(_) => None,
            #[cfg(test)]
            Self::Simulated(_) => None,
        }
    }

    /// Frames that the host has dropped because the guest did not take them in time, where it tells. Main thread only.
    pub(crate) fn host_drops(&self) -> Option<u64> {
        match self {
            Self::Tap(tap) => tap.host_drops(),
            Self::Stream(_) | Self::Null(_) => None,
            #[cfg(test)]
            Self::Simulated(_) => None,
        }
    }

    /// Whether the descriptors lead anywhere.
    pub(crate) fn link(&self) -> &Link {
        match self {
            Self::Tap(tap) => tap.link(),
            Self::Stream(stream) => stream.link(),
            Self::Null(null) => null.link(),
            #[cfg(test)]
            Self::Simulated(simulated) => simulated.link(),
        }
    }

    /// For each queue pair the descriptor to receive from, then the one to transmit to.
    pub(crate) fn files(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Tap(tap) => tap.files().flatten().collect(),
            Self::Stream(stream) => {
                vec![stream.file(Side::Receive), stream.file(Side::Transmit)]
            }
            Self::Null(_) => Vec::new(),
            #[cfg(test)]
            Self::Simulated(_) => Vec::new(),
        }
    }

    /// What the driver has acknowledged: from now on it is handed no more than these `offloads`, and where frames have a
    /// virtio header on the descriptors, that has `header_bytes`.
    pub(crate) fn apply(&self, offloads: Offloads, header_bytes: usize) -> rustix::io::Result<()> {
        match self {
            Self::Tap(tap) => tap.apply(offloads, header_bytes),
            Self::Stream(_) | Self::Null(_) => Ok(()),
            #[cfg(test)]
            Self::Simulated(simulated) => simulated.apply(offloads),
        }
    }

    /// Whether the queue of this pair takes part in traffic.
    pub(crate) fn attach_queue(&self, pair: u16, attached: bool) -> rustix::io::Result<()> {
        match self {
            Self::Tap(tap) => tap.attach_queue(pair, attached),
            Self::Stream(_) | Self::Null(_) => Ok(()),
            #[cfg(test)]
            Self::Simulated(simulated) => simulated.attach_queue(pair, attached),
        }
    }

    /// Readies the descriptor of one side for the newest opening of the back end, and says of which generation that is. A
    /// queue calls it, on its own thread, when the link has another generation than it knows.
    pub(crate) fn adopt(&self, side: Side) -> rustix::io::Result<u32> {
        match self {
            Self::Stream(stream) => stream.adopt(side),
            // What the main thread has put under the descriptors is good for any frame.
            Self::Tap(_) | Self::Null(_) => Ok(self.link().generation()),
            #[cfg(test)]
            Self::Simulated(_) => Ok(self.link().generation()),
        }
    }

    /// Ends the connection over which something came that cannot be understood.
    pub(crate) fn give_up(&self, side: Side) {
        if let Self::Stream(stream) = self {
            stream.give_up(side);
        }
    }

    /// Keeps the link true, and tells of each change in order.
    pub(crate) async fn watch(&self, on_change: impl FnMut(LinkEvent)) -> Infallible {
        match self {
            Self::Tap(tap) => tap.watch(on_change).await,
            Self::Stream(stream) => stream.watch(on_change).await,
            Self::Null(_) => std::future::pending().await,
            #[cfg(test)]
            Self::Simulated(simulated) => simulated.watch(on_change).await,
        }
    }
}

/// `--bridge` is for back ends that have an interface.
fn no_bridge(option: &'static str, settings: &Settings) -> Result<(), OpenError> {
    match &settings.bridge {
        None => Ok(()),
        Some(bridge) => Err(OpenError::NoInterface { option, bridge: bridge.to_string() }),
    }
}
