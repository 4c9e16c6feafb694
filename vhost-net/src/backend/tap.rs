//! A tap or macvtap interface: opened or made, its queues, its offloads, and its return after it was gone.
//!
//! Contract: [`Tap::open`] makes every system call that can fail for the operator's reasons. Afterwards a queue pair is
//! two descriptors of one queue of the interface, which never block; a read gives one frame behind its virtio header, a
//! write takes one. Their numbers never change. Where the interface goes, reads and writes fail (EBADFD), the link is
//! down, and [`Tap::watch`] opens it again when it is back: under the same numbers, with the offloads and the header that
//! were applied last. Frames that are written while the interface is set down are refused (EIO).
//!
//! Of several queue pairs only the first takes part in traffic at first, as a driver expects that knows of one
//! ([`Tap::attach_queue`]).
//!
//! What it deliberately does not do: it makes no interface that lasts. One that was made here goes with the process;
//! one that was there is left as it is found, but for what was asked for (`--mtu`, `--bridge`). A tap that lacks its
//! interface is not made anew: whoever removed it had a reason.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::daemon::{listener, predecessor};
use common::sandbox::{CapabilitySet, Needs};
use nix::libc;
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use tracing::{info, warn};

use super::error::OpenError;
use super::link::{self, Link, LinkEvent, Look};
use super::macvtap::Macvtap;
use super::netlink::{Change, Interface, Netlink, Notices, Which};
use super::spec::InterfaceName;
use super::{Offloads, Settings, descriptor};

const TUN_DEVICE: &str = "/dev/net/tun";

/// What each queue is opened with: Ethernet frames, without the kernel's own header and with virtio's before them.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The length of the header until a driver has said which it wants. VIRTIO 1.3, 5.1.6.1: with num_buffers.
const HEADER_BYTES: usize = 12;

/// A tap or macvtap interface that is open.
#[derive(Debug)]
pub(crate) struct Tap {
    queues: Vec<Queue>,
    source: Source,
    settings: Settings,
    netlink: Netlink,
    notices: Notices,
    /// Of the interface, while it is there and in this network namespace; else zero.
    index: AtomicU32,
    offloads: Offloads,
    mtu: Option<u16>,
    address: Option<[u8; 6]>,
    link: Link,
    /// The interface was opened to the end.
    is_open: AtomicBool,
    /// Locked for as long as the interface is changed, by the main thread and by the one of the control queue.
    in_force: Mutex<InForce>,
}

/// What the interface is, and is to be again when it has come back.
#[derive(Debug)]
struct InForce {
    /// Nothing before it was applied once.
    applied: Option<Applied>,
    /// By pair: whether its queue takes part.
    attached: Vec<bool>,
}

/// What is applied to the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Applied {
    offload_flags: u32,
    header_bytes: i32,
}

/// One queue of the interface under two numbers, because one may be watched for readiness by two who know nothing of each
/// other, and an epoll instance takes a number once.
#[derive(Debug)]
struct Queue {
    receive: OwnedFd,
    transmit: OwnedFd,
}

/// Where the interface is from, and returns to.
#[derive(Debug)]
enum Source {
    /// `tap=NAME` and `--tap-fd`: a tap of this name.
    Tap { name: String },
    /// `macvtap=PARENT`: made here.
    Macvtap(Macvtap),
}

impl Source {
    fn name(&self) -> &str {
        match self {
            Source::Tap { name } => name,
            Source::Macvtap(macvtap) => macvtap.name(),
        }
    }
}

impl Tap {
    /// Opens the tap, or makes it where there is none. One that is in use is waited for, if not for long.
    pub(super) fn open(name: &InterfaceName, settings: Settings) -> Result<Self, OpenError> {
        let is_busy = |error: &OpenError| matches!(error, OpenError::Busy { .. });
        predecessor::outlast(is_busy, || Self::open_now(name, settings.clone()))
    }

    fn open_now(name: &InterfaceName, settings: Settings) -> Result<Self, OpenError> {
        let (netlink, notices) = netlink()?;
        let before = find(&netlink, name.as_str())?;
        let flags = flags(name.as_str(), before.as_ref(), settings.pairs)?;
        let mut files = Vec::new();
        for _ in 0..settings.pairs {
            let file = open_device(name.as_str())?;
            attach(file.as_fd(), name.as_str(), flags, settings.pairs, before.is_some())?;
            files.push(file);
        }
        let source = Source::Tap { name: name.to_string() };
        let tap = Self::with(files, source, settings, (netlink, notices))?;
        if before.is_none() {
            info!("made the tap {name}");
            tap.set("the state", Change::Up)?;
        }
        tap.ready()
    }

    /// Takes over queues that somebody else has opened.
    pub(super) fn passed(fds: &[RawFd], settings: Settings) -> Result<Self, OpenError> {
        if fds.len() != usize::from(settings.pairs) {
            return Err(OpenError::PassedQueues { passed: fds.len(), pairs: settings.pairs });
        }
        let (mut files, mut first) = (Vec::new(), None::<descriptor::Tap>);
        for fd in fds.iter().copied() {
            let (file, tap) = passed_queue(fd)?;
            let first = first.get_or_insert(tap.clone());
            if first.name != tap.name {
                let other = first.name.clone();
                return Err(OpenError::OtherTap { fd, name: tap.name, other });
            }
            files.push(file);
        }
        let name = first.map_or_else(String::new, |tap| tap.name);
        let tap = Self::with(files, Source::Tap { name }, settings, netlink()?)?;
        // Closed last, when all of them are known to be what the operator thinks.
        for fd in fds.iter().copied() {
            listener::release(fd).map_err(|source| OpenError::Passed { fd, source })?;
        }
        tap.ready()
    }

    /// Makes a macvtap interface on `parent`, and opens it.
    pub(super) fn macvtap(parent: &InterfaceName, settings: Settings) -> Result<Self, OpenError> {
        let (netlink, notices) = netlink()?;
        let macvtap = Macvtap::create(parent, &netlink, settings.pairs, settings.address)?;
        let files = macvtap.open(&netlink, settings.pairs, FLAGS)?;
        let tap = Self::with(files, Source::Macvtap(macvtap), settings, (netlink, notices))?;
        tap.set("the state", Change::Up)?;
        tap.ready()
    }

    fn with(
        files: Vec<OwnedFd>,
        source: Source,
        settings: Settings,
        (netlink, notices): (Netlink, Notices),
    ) -> Result<Self, OpenError> {
        let queues: Result<Vec<Queue>, OpenError> = files.into_iter().map(Queue::new).collect();
        let queues = queues?;
        let index = find(&netlink, source.name())?.map_or(0, |interface| interface.index);
        let offloads =
            queues.first().map_or(Offloads::default(), |queue| probe(queue.receive.as_fd()));
        let in_force = InForce { applied: None, attached: vec![true; queues.len()] };
        Ok(Self {
            queues,
            source,
            settings,
            netlink,
            notices,
            index: AtomicU32::new(index),
            offloads,
            mtu: None,
            address: None,
            link: Link::default(),
            is_open: AtomicBool::new(true),
            in_force: Mutex::new(in_force),
        })
    }

    /// Applies the settings, and takes the interface for open.
    fn ready(mut self) -> Result<Self, OpenError> {
        self.configure()?;
        let applied = self.apply(Offloads::default(), HEADER_BYTES);
        applied.map_err(|errno| self.failed("the offloads", errno))?;
        for pair in 1..self.settings.pairs {
            let detached = self.attach_queue(pair, false);
            detached.map_err(|errno| self.failed("a queue", errno))?;
        }
        let interface = self.interface()?;
        self.mtu = interface.as_ref().and_then(|interface| u16::try_from(interface.mtu).ok());
        let macvtap = interface.as_ref().filter(|found| found.kind.as_deref() == Some("macvtap"));
        self.address = macvtap.and_then(|found| found.address);
        self.link.set_up(self.carries(interface.as_ref()));
        Ok(self)
    }

    /// What of the interface was asked for.
    fn configure(&self) -> Result<(), OpenError> {
        let interface = self.interface()?;
        if let Some(mtu) = self.settings.mtu
            && interface.as_ref().is_none_or(|interface| interface.mtu != u32::from(mtu))
        {
            self.set("the MTU (--mtu)", Change::Mtu(mtu))?;
        }
        let Some(bridge) = &self.settings.bridge else { return Ok(()) };
        let bridge = find(&self.netlink, bridge.as_str())?
            .ok_or_else(|| OpenError::NoBridge { bridge: bridge.to_string() })?;
        if bridge.kind.as_deref() != Some("bridge") {
            let kind = bridge.kind.unwrap_or_else(|| "hardware".to_owned());
            return Err(OpenError::NotABridge { bridge: bridge.name, kind });
        }
        if interface.is_none_or(|interface| interface.bridge_index != Some(bridge.index)) {
            self.set("the bridge (--bridge)", Change::Bridge(bridge.index))?;
        }
        Ok(())
    }

    fn set(&self, what: &'static str, change: Change) -> Result<(), OpenError> {
        match self.index.load(Relaxed) {
            0 => Err(self.failed(what, Errno::NODEV)),
            index => {
                let changed = self.netlink.change(index, change);
                changed.map_err(|errno| self.failed(what, errno))
            }
        }
    }

    fn failed(&self, what: &'static str, errno: Errno) -> OpenError {
        OpenError::Set { what, name: self.source.name().to_owned(), source: errno.into() }
    }

    /// The interface is looked at and set up again whenever it comes back. A file outlives its interface, so nothing is opened
    /// but for a macvtap.
    pub(super) fn needs(&self) -> Needs {
        let mut calls = descriptor::CALLS.to_vec();
        calls.push(descriptor::ATTACH);
        let mut needs = Needs { calls, capabilities: CapabilitySet::NET_ADMIN, ..Needs::default() };
        if let Source::Macvtap(_) = self.source {
            Macvtap::add_needs(&mut needs);
        }
        needs
    }

    /// What the interface can take and give, whatever has been applied.
    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// The largest frame without its Ethernet header, if the interface is in this network namespace.
    pub(crate) fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// The address that frames have to be sent to, to come in here: a macvtap's.
    pub(crate) fn address(&self) -> Option<[u8; 6]> {
        self.address
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Receive and transmit descriptor of each pair.
    pub(crate) fn files(&self) -> impl Iterator<Item = [BorrowedFd<'_>; 2]> {
        self.queues.iter().map(|queue| [queue.receive.as_fd(), queue.transmit.as_fd()])
    }

    /// From now on frames come with no more than these `offloads`, and in both directions behind a header of
    /// `header_bytes`, 10 or 12. Offloads that the interface does not have are not asked for. What is refused changes
    /// nothing; an interface that is gone has it when it is back.
    pub(crate) fn apply(&self, offloads: Offloads, header_bytes: usize) -> rustix::io::Result<()> {
        let header_bytes = i32::try_from(header_bytes).ok().ok_or(Errno::INVAL)?;
        let offload_flags = offloads.and(self.offloads).flags();
        let wanted = Applied { offload_flags, header_bytes };
        let mut in_force = self.in_force();
        let before = in_force.applied;
        match self.apply_now(wanted, before, &in_force.attached) {
            Err(errno) if !self.is_gone() => {
                if let Some(before) = before {
                    // Who is told of the first refusal need not hear of a second one.
                    let _ = self.apply_now(before, None, &in_force.attached);
                }
                return Err(errno);
            }
            _ => in_force.applied = Some(wanted),
        }
        Ok(())
    }

    /// Applies what differs from what was applied `before`: each call waits for the lock of the host's network
    /// configuration.
    fn apply_now(
        &self,
        wanted: Applied,
        before: Option<Applied>,
        attached: &[bool],
    ) -> rustix::io::Result<()> {
        // A tap has one length of the header, which a queue that takes no part cannot be asked for (EBADFD); a macvtap has
        // one for each queue.
        if before.is_none_or(|before| before.header_bytes != wanted.header_bytes) {
            for (queue, attached) in self.queues.iter().zip(attached) {
                match descriptor::set_header_bytes(queue.receive.as_fd(), wanted.header_bytes) {
                    Err(Errno::BADFD) if !attached => {}
                    applied => applied?,
                }
            }
        }
        // Both have one set of offloads, and their first queue always takes part.
        match self.queues.first() {
            Some(first)
                if before.is_none_or(|before| before.offload_flags != wanted.offload_flags) =>
            {
                descriptor::set_offloads(first.receive.as_fd(), wanted.offload_flags)
            }
            _ => Ok(()),
        }
    }

    /// Whether the queue of this pair takes part in traffic. The first always does. What is refused changes nothing; an
    /// interface that is gone has it so when it is back.
    pub(crate) fn attach_queue(&self, pair: u16, attached: bool) -> rustix::io::Result<()> {
        let queue = self.queues.get(usize::from(pair)).ok_or(Errno::INVAL)?;
        let mut in_force = self.in_force();
        let place = in_force.attached.get_mut(usize::from(pair)).ok_or(Errno::INVAL)?;
        if pair == 0 || *place == attached {
            return Ok(());
        }
        match descriptor::attach_queue(queue.receive.as_fd(), attached) {
            Err(errno) if !self.is_gone() => return Err(errno),
            _ => *place = attached,
        }
        Ok(())
    }

    fn in_force(&self) -> MutexGuard<'_, InForce> {
        // A panic elsewhere leaves it as whole as it was.
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the interface is yet to come back, with all that is in force.
    fn is_gone(&self) -> bool {
        !self.is_open.load(Relaxed) || !self.is_attached()
    }

    /// Follows the interface: goes, comes back, is set up and down.
    pub(crate) async fn watch(&self, on_change: impl FnMut(LinkEvent)) -> Infallible {
        let mut complaint = None;
        let look = |step: &mut dyn FnMut()| self.look(step, &mut complaint);
        link::follow(&self.link, &self.notices, look, on_change).await
    }

    fn look(&self, step: &mut dyn FnMut(), complaint: &mut Option<String>) -> Look {
        if self.is_gone() {
            self.is_open.store(false, Relaxed);
            self.link.set_up(false);
            step();
            match self.reopen() {
                Ok(true) => {
                    *complaint = None;
                    self.link.renew();
                }
                Ok(false) => return Look::Settled,
                Err(error) => {
                    // Told once, however often it is tried.
                    let told = complaint.replace(error.to_string());
                    if told != *complaint {
                        warn!("the interface {} is back: {error}", self.source.name());
                    }
                    return Look::Again;
                }
            }
        }
        match self.interface() {
            Ok(interface) => self.link.set_up(self.carries(interface.as_ref())),
            Err(_unknown) => return Look::Again,
        }
        step();
        Look::Settled
    }

    /// Whether the descriptors lead to an interface: those of the first pair, as that always takes part.
    fn is_attached(&self) -> bool {
        let first = self.queues.first();
        first.is_some_and(|queue| descriptor::interface(queue.receive.as_fd()).is_ok())
    }

    /// Frames that the kernel has dropped because the guest did not take them in time. Main thread only.
    pub(super) fn host_drops(&self) -> Option<u64> {
        let dropped = find(&self.netlink, self.source.name()).ok()??.dropped;
        Some(match self.source {
            Source::Tap { .. } => dropped.transmitted,
            Source::Macvtap(_) => dropped.received,
        })
    }

    /// Opens the interface again, under the same numbers; false where there is none. Goes on where it failed before.
    fn reopen(&self) -> Result<bool, OpenError> {
        let in_force = self.in_force();
        if !self.attach_again()? {
            return Ok(false);
        }
        let interface = find(&self.netlink, self.source.name())?;
        self.index.store(interface.map_or(0, |interface| interface.index), Relaxed);
        if matches!(self.source, Source::Macvtap(_)) {
            self.set("the state", Change::Up)?;
        }
        self.configure()?;
        let restored = self.restore(&in_force);
        restored.map_err(|errno| self.failed("what the driver asked for", errno))?;
        self.is_open.store(true, Relaxed);
        Ok(true)
    }

    /// Puts queues of an interface that has come back under those descriptors that are none yet; false where it has not.
    fn attach_again(&self) -> Result<bool, OpenError> {
        let pairs = self.settings.pairs;
        let missing: Vec<&Queue> = self.queues.iter().filter(|queue| !queue.takes_part()).collect();
        if missing.is_empty() {
            return Ok(true);
        }
        match &self.source {
            Source::Tap { name } => {
                let Some(mut interface) = find(&self.netlink, name)? else { return Ok(false) };
                // Of the queues that are in use those that were attached before are ours.
                let ours = u32::try_from(self.queues.len() - missing.len()).unwrap_or(u32::MAX);
                let in_use = &mut interface.tun.queue_count;
                *in_use = in_use.map(|count| count.saturating_sub(ours));
                let flags = flags(name, Some(&interface), pairs)?;
                // A file outlives its interface, and takes another.
                for queue in missing {
                    attach(queue.receive.as_fd(), name, flags, pairs, true)?;
                }
            }
            Source::Macvtap(macvtap) => {
                if !macvtap.create_again(&self.netlink, pairs)? {
                    return Ok(false);
                }
                let count = u16::try_from(missing.len()).unwrap_or(pairs);
                let files = macvtap.open(&self.netlink, count, FLAGS)?;
                for (queue, file) in missing.into_iter().zip(files) {
                    queue.replace(&file)?;
                }
            }
        }
        Ok(true)
    }

    /// Gives an interface that was opened anew, and all of whose queues take part, what the one before had.
    fn restore(&self, in_force: &InForce) -> rustix::io::Result<()> {
        if let Some(applied) = in_force.applied {
            self.apply_now(applied, None, &in_force.attached)?;
        }
        for (queue, attached) in self.queues.iter().zip(&in_force.attached).skip(1) {
            if !attached {
                descriptor::attach_queue(queue.receive.as_fd(), false)?;
            }
        }
        Ok(())
    }

    /// The interface as it is now, or none that this network namespace has: it was moved to another one, or passed from
    /// there.
    fn interface(&self) -> Result<Option<Interface>, OpenError> {
        match self.index.load(Relaxed) {
            0 => Ok(None),
            index => self
                .netlink
                .find(Which::Index(index))
                .map_err(|errno| OpenError::Netlink(errno.into())),
        }
    }

    /// Whether frames travel. Of an interface in another namespace nothing is known but that it is open.
    fn carries(&self, interface: Option<&Interface>) -> bool {
        let Some(interface) = interface else { return true };
        match self.source {
            Source::Tap { .. } => interface.is_up(),
            Source::Macvtap(_) => interface.is_up() && interface.has_carrier(),
        }
    }
}

impl Queue {
    fn new(receive: OwnedFd) -> Result<Self, OpenError> {
        let transmit = fcntl_dupfd_cloexec(&receive, 0).map_err(descriptors)?;
        Ok(Self { receive, transmit })
    }

    /// Has the queue take part in its interface's traffic; false where it is of none.
    fn takes_part(&self) -> bool {
        let file = self.receive.as_fd();
        // A tap's queue that takes no part looks like one of no interface; one that takes part is refused here (EINVAL).
        descriptor::attach_queue(file, true).is_ok() || descriptor::interface(file).is_ok()
    }

    fn replace(&self, file: &OwnedFd) -> Result<(), OpenError> {
        for held in [&self.receive, &self.transmit] {
            descriptor::replace(held.as_fd(), file.as_fd()).map_err(descriptors)?;
        }
        Ok(())
    }
}

fn descriptors(errno: Errno) -> OpenError {
    OpenError::Descriptors { option: "the tap", source: errno.into() }
}

fn netlink() -> Result<(Netlink, Notices), OpenError> {
    // Notices first: what changes from here on is noticed.
    let notices = Notices::open().map_err(|errno| OpenError::Netlink(errno.into()))?;
    let netlink = Netlink::open().map_err(|errno| OpenError::Netlink(errno.into()))?;
    Ok((netlink, notices))
}

fn find(netlink: &Netlink, name: &str) -> Result<Option<Interface>, OpenError> {
    netlink.find(Which::Name(name)).map_err(|errno| OpenError::Netlink(errno.into()))
}

/// What to open the queues with, so that they fit the interface that is there.
fn flags(name: &str, there: Option<&Interface>, pairs: u16) -> Result<i32, OpenError> {
    let multi_queue = |wanted| FLAGS | if wanted { libc::IFF_MULTI_QUEUE } else { 0 };
    let Some(there) = there else { return Ok(multi_queue(pairs > 1)) };
    let name = name.to_owned();
    let mode = there.tun.mode.map(i32::from);
    if there.kind.as_deref() != Some("tun") || mode.is_some_and(|mode| mode != libc::IFF_TAP) {
        let kind = there.kind.clone().unwrap_or_else(|| "hardware".to_owned());
        return Err(OpenError::OtherKind { name, kind });
    }
    // Of a tap with many queues the kernel would give others beside those that are in use: two processes would each get
    // a part of the frames.
    if there.tun.queue_count.is_some_and(|count| count > 0) {
        return Err(OpenError::Busy { name });
    }
    match there.tun.is_multi_queue {
        Some(false) if pairs > 1 => Err(OpenError::NotMultiQueue { name, pairs }),
        Some(is_multi_queue) => Ok(multi_queue(is_multi_queue)),
        None => Ok(multi_queue(pairs > 1)),
    }
}

fn open_device(name: &str) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    open(TUN_DEVICE, flags, Mode::empty()).map_err(|errno| {
        let (name, source) = (name.to_owned(), errno.into());
        match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => OpenError::NoTunDevice { name, source },
            _ => OpenError::TunDevice { name, source },
        }
    })
}

/// Makes `file` a queue of the tap.
fn attach(
    file: BorrowedFd<'_>,
    name: &str,
    flags: i32,
    pairs: u16,
    is_there: bool,
) -> Result<(), OpenError> {
    descriptor::set_interface(file, name, flags).map_err(|errno| {
        let name = name.to_owned();
        match errno {
            Errno::PERM | Errno::ACCESS if is_there => OpenError::MayNotOpen { name },
            Errno::PERM | Errno::ACCESS => OpenError::MayNotCreate { name },
            Errno::BUSY => OpenError::Busy { name },
            Errno::TOOBIG => OpenError::TooManyQueues { name, pairs },
            _ => OpenError::Attach { name, source: errno.into() },
        }
    })
}

/// The queue that was passed with this number, which stays open as well.
fn passed_queue(fd: RawFd) -> Result<(OwnedFd, descriptor::Tap), OpenError> {
    let passed = |source| OpenError::Passed { fd, source };
    let file = listener::duplicate(fd).map_err(passed)?;
    let tap = descriptor::interface(file.as_fd())
        .map_err(|errno| OpenError::NotATap { fd, source: errno.into() })?;
    let needed = [
        (libc::IFF_TAP, "IFF_TAP"),
        (libc::IFF_NO_PI, "IFF_NO_PI"),
        (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
    ];
    for (bit, flag) in needed {
        if tap.flags & bit == 0 {
            return Err(OpenError::TapFlags { fd, name: tap.name, flag });
        }
    }
    let flags = fcntl_getfl(&file).map_err(|errno| passed(errno.into()))?;
    fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|errno| passed(errno.into()))?;
    Ok((file, tap))
}

/// Which offloads the kernel takes: each is tried beside those that it needs, and those found so far.
fn probe(file: BorrowedFd<'_>) -> Offloads {
    let none = Offloads::default();
    let takes = |offloads: Offloads| descriptor::set_offloads(file, offloads.flags()).is_ok();
    let mut found = Offloads { csum: true, ..none };
    if !takes(found) {
        return none;
    }
    let candidates: [fn(Offloads) -> Offloads; 5] = [
        |found| Offloads { tso4: true, ..found },
        |found| Offloads { tso6: true, ..found },
        |found| Offloads { ecn: found.tso4 || found.tso6, ..found },
        |found| Offloads { ufo: true, ..found },
        |found| Offloads { uso: true, ..found },
    ];
    for with in candidates {
        if takes(with(found)) {
            found = with(found);
        }
    }
    found
}

#[cfg(test)]
mod tests;
