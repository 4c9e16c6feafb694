//! An attack on ring 0, and the reaction to it.
//!
//! The reaction that is due: the status byte where there is one, else the ring is broken, which its
//! err descriptor says. The neighbour ring runs on, the broken one can be stopped, and the next
//! front end is served.

use crate::aftermath::{Attacker, Session};
use crate::subject::{Subject, is_peer, promise};
use frontend::block::{BlockDriver, Request, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::ring::{
    DESCRIPTOR_BYTES, Descriptor, SplitRing, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT as NEXT,
    VIRTQ_DESC_F_WRITE as WRITE,
};
use frontend::wire::PATIENCE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::{Duration, Instant};

/// Entries of the rings here: few, so that every entry is soon used.
pub(crate) const SIZE: u16 = 16;
/// What the status byte holds before.
pub(crate) const UNWRITTEN: u8 = 0xa5;
/// How long a reaction of another program is waited for, which may be none.
const PEER_PATIENCE: Duration = Duration::from_millis(300);
/// Room for an indirect table, and for data that is too long.
pub(crate) const TABLE_BYTES: usize = 1 << 20;

/// The ring under attack, and a request's parts in valid memory for the attack to use.
pub(crate) struct Attack<'a> {
    pub(crate) ring: &'a SplitRing,
    pub(crate) header: u64,
    pub(crate) data: u64,
    pub(crate) status: u64,
    pub(crate) table: u64,
}

/// One descriptor as the cases below write it.
pub(crate) fn descriptor(address: u64, len_bytes: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len_bytes, flags, next }
}

impl Attack<'_> {
    /// Writes a chain into the first descriptors and makes its head available.
    pub(crate) fn chain(&self, descriptors: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.ring.write_descriptor(index, descriptor);
        }
        self.offer(0);
    }

    /// Writes a chain into the table, and makes a descriptor of `len_bytes` available that refers
    /// to it.
    pub(crate) fn indirect(&self, descriptors: &[Descriptor], len_bytes: u32, flags: u16) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.ring.memory().write(self.table + index * DESCRIPTOR_BYTES, &descriptor.encode());
        }
        self.chain(&[descriptor(self.table, len_bytes, VIRTQ_DESC_F_INDIRECT | flags, 1)]);
    }

    /// Makes any head available.
    pub(crate) fn offer(&self, head: u16) {
        let index = self.ring.available_index();
        self.ring.write_available(index, head);
        self.ring.set_available_index(index.wrapping_add(1));
    }

    /// A read's three descriptors, all of them in order.
    pub(crate) fn good(&self) -> [Descriptor; 3] {
        [
            descriptor(self.header, 16, NEXT, 1),
            descriptor(self.data, 4096, WRITE | NEXT, 2),
            descriptor(self.status, 1, WRITE, 0),
        ]
    }
}

/// What the back end made of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// The err descriptor was signalled; the chain may have come back before, but no sooner than
    /// that.
    Broken,
    /// The chain came back with this status byte.
    Returned(u8),
    /// The connection was closed.
    HungUp,
    Nothing,
}

fn reaction(driver: &BlockDriver, status: u64, used_before: u16) -> Reaction {
    let queue = &driver.guest.queues[0];
    let deadline = Instant::now() + if is_peer() { PEER_PATIENCE } else { PATIENCE };
    loop {
        let returned = queue.ring().used_index() != used_before;
        if driver.guest.errs[0].wait(Duration::ZERO).expect("the err descriptor can be read") > 0 {
            return Reaction::Broken;
        }
        if returned {
            return Reaction::Returned(driver.guest.memory.read(status, 1)[0]);
        }
        let call = queue.call_notifier().expect("the queue has a call descriptor");
        let fds = [driver.guest.errs[0].fd(), call.fd()];
        let mut polled = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN)).to_vec();
        polled.push(PollFd::new(driver.guest.front_end.wire().stream(), PollFlags::IN));
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .expect("patience is short");
        match poll(&mut polled, Some(&left)) {
            Ok(0) => return Reaction::Nothing,
            Ok(_) if !polled[2].revents().is_empty() => return Reaction::HungUp,
            Ok(_) => {
                call.wait(Duration::ZERO).expect("the call descriptor can be read");
            }
            Err(error) => panic!("cannot poll: {error}"),
        }
    }
}

/// Options with rings of [`SIZE`] entries.
pub(crate) fn small_rings() -> Options {
    Options { queue_size: SIZE, ..Options::default() }
}

/// Runs an attack of a fresh front end on queue 0, checks that queue 1 does not suffer, and returns
/// the reaction.
#[track_caller]
pub(crate) fn under(subject: &mut Subject, what: &str, attack: impl Fn(&Attack<'_>)) -> Reaction {
    let mut attacker = Attacker::begin(subject, &small_rings());
    let driver = &mut attacker.driver;
    let [header, data, table, status] =
        [16, 4096, TABLE_BYTES, 1].map(|size_bytes| driver.guest.reserve(size_bytes));
    driver.guest.memory.write(header, &Request::read(0, 0).header());
    driver.guest.memory.write(status, &[UNWRITTEN]);
    let ring = driver.guest.queues[0].ring().clone();
    let used_before = ring.used_index();
    ring.set_used_event(used_before);
    attack(&Attack { ring: &ring, header, data, status, table });
    subject.provoke();
    driver.kick(0).expect("the device can be kicked");
    let reaction = reaction(driver, status, used_before);
    // VIRTIO 1.3, 2.1.2: a device may stop altogether. Ours stops one ring.
    promise(reaction != Reaction::HungUp, || format!("{what}: the connection was closed"));
    if reaction == Reaction::HungUp {
        attacker.after(subject, Session::Over, what);
        return reaction;
    }
    attacker.neighbour_must_work(what);
    let stopped = attacker.driver.guest.front_end.get_vring_base(0);
    promise(stopped.is_ok(), || format!("{what}: the ring cannot be stopped: {stopped:?}"));
    attacker.after(subject, if stopped.is_ok() { Session::Lives } else { Session::Either }, what);
    reaction
}

/// The ring is broken: there is no status byte to answer with.
#[track_caller]
pub(crate) fn breaks(subject: &mut Subject, what: &str, attack: impl Fn(&Attack<'_>)) {
    let reaction = under(subject, what, attack);
    promise(reaction == Reaction::Broken, || format!("{what}: {reaction:?}, not broken"));
}

/// The request fails, or the ring is broken: it must not succeed.
#[track_caller]
pub(crate) fn fails(subject: &mut Subject, what: &str, attack: impl Fn(&Attack<'_>)) {
    let reaction = under(subject, what, attack);
    let refused = match reaction {
        Reaction::Broken => true,
        Reaction::Returned(status) => status != VIRTIO_BLK_S_OK,
        Reaction::HungUp | Reaction::Nothing => false,
    };
    promise(refused, || format!("{what}: {reaction:?}"));
}

/// Whatever it leads to, it leads to something: the request comes back, or the ring is broken.
#[track_caller]
pub(crate) fn ends(subject: &mut Subject, what: &str, attack: impl Fn(&Attack<'_>)) {
    let reaction = under(subject, what, attack);
    promise(reaction != Reaction::Nothing, || format!("{what}: nothing happens"));
}
