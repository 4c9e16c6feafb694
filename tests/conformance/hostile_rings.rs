//! A driver that breaks the rules of the virtqueue, or asks for nonsense in a request.
//!
//! The reaction: the status byte where there is one, else the ring is broken, which its err
//! descriptor says. The neighbour ring runs on, the broken one can be stopped, and the next front
//! end is served.

use crate::subject::{QUEUE_COUNT, Subject, must_work};
use frontend::block::{BlockDriver, Request, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use frontend::guest::Options;
use frontend::ring::{
    DESCRIPTOR_BYTES, Descriptor, SplitRing, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT as NEXT,
    VIRTQ_DESC_F_WRITE as WRITE,
};
use frontend::wire::PATIENCE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::OnceCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Entries of the rings here: few, so that every entry is soon used.
const SIZE: u16 = 16;
/// What the status byte holds before.
const UNWRITTEN: u8 = 0xa5;

/// The ring under attack, and a request's parts in valid memory for the attack to use.
struct Attack<'a> {
    ring: &'a SplitRing,
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

/// One descriptor as the cases below write it.
fn descriptor(address: u64, len_bytes: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len_bytes, flags, next }
}

impl Attack<'_> {
    /// Writes a chain into the first descriptors and makes its head available.
    fn chain(&self, descriptors: &[Descriptor]) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.ring.write_descriptor(index, descriptor);
        }
        self.offer(0);
    }

    /// Writes a chain into the table, and makes a descriptor of `len_bytes` available that refers
    /// to it.
    fn indirect(&self, descriptors: &[Descriptor], len_bytes: u32, flags: u16) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.ring.memory().write(self.table + index * DESCRIPTOR_BYTES, &descriptor.encode());
        }
        self.chain(&[descriptor(self.table, len_bytes, VIRTQ_DESC_F_INDIRECT | flags, 1)]);
    }

    /// Makes any head available.
    fn offer(&self, head: u16) {
        let index = self.ring.available_index();
        self.ring.write_available(index, head);
        self.ring.set_available_index(index.wrapping_add(1));
    }

    /// A read's three descriptors, all of them in order.
    fn good(&self) -> [Descriptor; 3] {
        [
            descriptor(self.header, 16, NEXT, 1),
            descriptor(self.data, 4096, WRITE | NEXT, 2),
            descriptor(self.status, 1, WRITE, 0),
        ]
    }
}

/// What the back end made of it.
#[derive(Debug, PartialEq, Eq)]
enum Reaction {
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
    let deadline = Instant::now() + PATIENCE;
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

/// Runs an attack of a fresh front end on queue 0, checks that queue 1 does not suffer, and returns
/// the reaction.
fn under(subject: &Subject, what: &str, attack: impl Fn(&Attack<'_>)) -> Reaction {
    let mut driver = subject.driver(&Options {
        queue_size: SIZE,
        queue_count: QUEUE_COUNT,
        ..Options::default()
    });
    must_work(&mut driver, 0);
    let [header, data, table, status] =
        [16, 4096, 1 << 20, 1].map(|size_bytes| driver.guest.reserve(size_bytes));
    driver.guest.memory.write(header, &Request::read(0, 0).header());
    driver.guest.memory.write(status, &[UNWRITTEN]);
    let ring = driver.guest.queues[0].ring().clone();
    let used_before = ring.used_index();
    ring.set_used_event(used_before);
    attack(&Attack { ring: &ring, header, data, status, table });
    driver.kick(0).expect("the device can be kicked");
    let reaction = reaction(&driver, status, used_before);
    assert_ne!(reaction, Reaction::HungUp, "{what}: the neighbour lost its connection");
    must_work(&mut driver, 1);
    driver
        .guest
        .front_end
        .get_vring_base(0)
        .unwrap_or_else(|error| panic!("{what}: the ring cannot be stopped: {error}"));
    must_work(&mut driver, 1);
    reaction
}

/// The ring is broken: there is no status byte to answer with.
#[track_caller]
fn breaks(subject: &Subject, what: &str, attack: impl Fn(&Attack<'_>)) {
    assert_eq!(under(subject, what, attack), Reaction::Broken, "{what}");
}

/// The request fails, or the ring is broken: it must not succeed.
#[track_caller]
fn fails(subject: &Subject, what: &str, attack: impl Fn(&Attack<'_>)) {
    let reaction = under(subject, what, attack);
    let refused = match reaction {
        Reaction::Broken => true,
        Reaction::Returned(status) => status != VIRTIO_BLK_S_OK,
        Reaction::HungUp | Reaction::Nothing => false,
    };
    assert!(refused, "{what}: {reaction:?}");
}

#[test]
fn chains_that_loop() {
    let mut subject = Subject::start();
    breaks(&subject, "descriptor that is its own next", |attack| {
        attack.chain(&[descriptor(attack.header, 16, NEXT, 0)]);
    });
    breaks(&subject, "two descriptors in a circle", |attack| {
        attack.chain(&[
            descriptor(attack.header, 16, NEXT, 1),
            descriptor(attack.data, 512, WRITE | NEXT, 0),
        ]);
    });
    breaks(&subject, "circle that the head is not part of", |attack| {
        let [header, ..] = attack.good();
        attack.chain(&[
            header,
            descriptor(attack.data, 512, WRITE | NEXT, 2),
            descriptor(attack.data, 512, WRITE | NEXT, 1),
        ]);
    });
    breaks(&subject, "circle in an indirect table", |attack| {
        let circle =
            [descriptor(attack.header, 16, NEXT, 1), descriptor(attack.data, 512, WRITE | NEXT, 1)];
        attack.indirect(&circle, 32, 0);
    });
    subject.must_serve_the_next();
}

#[test]
fn indexes_out_of_range() {
    let mut subject = Subject::start();
    for index in [SIZE, SIZE + 1, 0x7fff, u16::MAX] {
        breaks(&subject, &format!("head {index}"), |attack| attack.offer(index));
        breaks(&subject, &format!("next {index}"), |attack| {
            attack.chain(&[descriptor(attack.header, 16, NEXT, index)])
        });
        breaks(&subject, &format!("next {index} in an indirect table"), |attack| {
            attack.indirect(&[descriptor(attack.header, 16, NEXT, index)], 16, 0);
        });
    }
    subject.must_serve_the_next();
}

#[test]
fn available_index_that_jumps() {
    let mut subject = Subject::start();
    for ahead in [SIZE + 1, 0x7fff, 0x8000, u16::MAX] {
        breaks(&subject, &format!("{ahead} ahead"), |attack| {
            attack.ring.set_available_index(attack.ring.available_index().wrapping_add(ahead));
        });
    }
    subject.must_serve_the_next();
}

#[test]
fn buffers_outside_the_memory() {
    let mut subject = Subject::start();
    let end = u64::try_from(Options::default().memory[0].size_bytes).unwrap_or(0);
    for address in [end, end - 8, 1 << 40, 1 << 63, u64::MAX - 8, u64::MAX] {
        fails(&subject, &format!("header at {address:#x}"), |attack| {
            let [mut header, data, status] = attack.good();
            header.address = address;
            attack.chain(&[header, data, status]);
        });
        fails(&subject, &format!("data at {address:#x}"), |attack| {
            let [header, mut data, status] = attack.good();
            data.address = address;
            attack.chain(&[header, data, status]);
        });
        fails(&subject, &format!("indirect table at {address:#x}"), |attack| {
            attack.chain(&[descriptor(address, 48, VIRTQ_DESC_F_INDIRECT, 0)]);
        });
    }
    for address in [end, 1 << 40, u64::MAX] {
        breaks(&subject, &format!("status at {address:#x}"), |attack| {
            let [header, data, mut status] = attack.good();
            status.address = address;
            attack.chain(&[header, data, status]);
        });
    }
    fails(&subject, "data of 4 GiB", |attack| {
        let [header, mut data, status] = attack.good();
        data.len_bytes = u32::MAX;
        attack.chain(&[header, data, status]);
    });
    subject.must_serve_the_next();
}

#[test]
fn indirect_tables_that_break_the_rules() {
    let mut subject = Subject::start();
    breaks(&subject, "indirect in indirect", |attack| {
        attack.indirect(&[descriptor(attack.table + 64, 48, VIRTQ_DESC_F_INDIRECT, 0)], 16, 0);
    });
    breaks(&subject, "indirect after a descriptor in an indirect table", |attack| {
        let [header, ..] = attack.good();
        attack.indirect(
            &[header, descriptor(attack.table + 64, 48, VIRTQ_DESC_F_INDIRECT, 0)],
            32,
            0,
        );
    });
    // VIRTIO 1.3, 2.7.5.3.1: the driver MUST NOT set both INDIRECT and NEXT.
    breaks(&subject, "indirect with next", |attack| attack.indirect(&attack.good(), 48, NEXT));
    for len_bytes in [0, 1, 15, 17, 47] {
        breaks(&subject, &format!("table of {len_bytes} bytes"), |attack| {
            attack.indirect(&attack.good(), len_bytes, 0)
        });
    }
    breaks(&subject, "table of 4 GiB", |attack| attack.indirect(&attack.good(), u32::MAX - 15, 0));
    breaks(&subject, "endless table", |attack| {
        let endless: Vec<_> =
            (1..=65_535).map(|next| descriptor(attack.header, 1, NEXT, next)).collect();
        attack.indirect(&endless, 65_535 * 16, 0);
    });
    subject.must_serve_the_next();
}

#[test]
fn requests_without_a_place_for_their_status() {
    let mut subject = Subject::start();
    breaks(&subject, "header alone", |attack| attack.chain(&[descriptor(attack.header, 16, 0, 0)]));
    breaks(&subject, "device-readable status", |attack| {
        let [header, mut data, mut status] = attack.good();
        (data.flags, status.flags) = (NEXT, 0);
        attack.chain(&[header, data, status]);
    });
    breaks(&subject, "status without length", |attack| {
        attack.chain(&[
            descriptor(attack.header, 16, NEXT, 1),
            descriptor(attack.status, 0, WRITE, 0),
        ]);
    });
    subject.must_serve_the_next();
}

#[test]
fn requests_of_a_wrong_form() {
    let mut subject = Subject::start();
    for len_bytes in [0, 1, 8, 15] {
        fails(&subject, &format!("header of {len_bytes} bytes"), |attack| {
            let [mut header, data, status] = attack.good();
            header.len_bytes = len_bytes;
            attack.chain(&[header, data, status]);
        });
    }
    fails(&subject, "device-writable header", |attack| {
        let [mut header, data, status] = attack.good();
        header.flags |= WRITE;
        attack.chain(&[header, data, status]);
    });
    // VIRTIO 1.3, 2.7.4.2: the driver MUST place device-writable descriptors after device-readable
    // ones.
    fails(&subject, "device-writable before device-readable", |attack| {
        let [header, data, mut status] = attack.good();
        (status.flags, status.next) = (WRITE, 0);
        attack.chain(&[header, data, descriptor(attack.data, 512, NEXT, 3), status]);
    });
    subject.must_serve_the_next();
}

#[test]
fn data_in_the_wrong_direction_is_not_moved() {
    // There is no data in the right direction: the request may fail, or have nothing to do.
    const PATTERN: [u8; 4096] = [0x5a; 4096];
    let mut subject = Subject::start();
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let memory = OnceCell::new();
        let reaction = under(&subject, "data in the wrong direction", |attack| {
            attack
                .ring
                .memory()
                .write(attack.header, &Request { kind, ..Request::default() }.header());
            attack.ring.memory().write(attack.data, &PATTERN);
            memory
                .set((Arc::clone(attack.ring.memory()), attack.data))
                .expect("there is one attack");
            let [header, mut data, status] = attack.good();
            data.flags = if kind == VIRTIO_BLK_T_IN { NEXT } else { WRITE | NEXT };
            attack.chain(&[header, data, status]);
        });
        assert_ne!(reaction, Reaction::Nothing);
        let (memory, data) = memory.get().expect("the attack was run");
        assert!(
            memory.read(*data, PATTERN.len()) == PATTERN,
            "request type {kind} wrote into a device-readable buffer"
        );
        assert_eq!(subject.image_bytes(0, 512), [0; 512], "request type {kind} wrote to the disk");
    }
    subject.must_serve_the_next();
}

#[test]
fn buffers_without_length_do_no_harm() {
    let mut subject = Subject::start();
    let reaction = under(&subject, "data without length", |attack| {
        let [header, mut data, status] = attack.good();
        data.len_bytes = 0;
        attack.chain(&[header, data, status]);
    });
    assert_ne!(reaction, Reaction::Nothing);
    subject.must_serve_the_next();
}

#[test]
fn same_head_twice_does_no_harm() {
    // The second may find the first under way, which breaks the ring, or done.
    let mut subject = Subject::start();
    let reaction = under(&subject, "one head twice", |attack| {
        attack.chain(&attack.good());
        attack.offer(0);
    });
    assert_ne!(reaction, Reaction::Nothing);
    subject.must_serve_the_next();
}

#[test]
fn broken_ring_runs_again_once_it_is_set_up_again() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
    let ring = driver.guest.queues[0].ring().clone();
    ring.set_available_index(1000);
    driver.kick(0).expect("the device can be kicked");
    assert_eq!(
        driver.guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read"),
        1,
        "the ring is not broken"
    );
    driver.guest.front_end.get_vring_base(0).expect("a broken ring can be stopped");
    ring.set_available_index(0);
    driver.guest.start_queue(0, 0).expect("the ring can be set up");
    driver.guest.enable(0).expect("the ring can be enabled");
    must_work(&mut driver, 0);
    must_work(&mut driver, 1);
}
