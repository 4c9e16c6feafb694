//! A front end that breaks the protocol: wrong sizes, wrong numbers, wrong flags, descriptors too
//! many or too few; each for every row of the message table.
//!
//! The reaction (vhost-user, "REPLY_ACK"): an acknowledgement that says no where one was asked for
//! and the protocol has one, else the connection closes. Either way the process lives and the next
//! front end is served; rings of a connection that goes on run on.

use crate::aftermath::{Attacker, Reaction, Session};
use crate::subject::{Subject, is_peer, promise};
use frontend::Error;
use frontend::guest::Options;
use frontend::message::{
    Descriptors, Row, TABLE, VHOST_USER_GET_CONFIG, VHOST_USER_GET_FEATURES,
    VHOST_USER_NEED_REPLY_MASK, VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_REPLY_MASK,
    VHOST_USER_SET_CONFIG, VHOST_USER_SET_FEATURES, VHOST_USER_SET_PROTOCOL_FEATURES,
    VHOST_USER_SET_VRING_ADDR, VHOST_USER_SET_VRING_BASE, VHOST_USER_SET_VRING_ENABLE,
    VHOST_USER_SET_VRING_NUM, VHOST_USER_VERSION, halves, header, vring_state, words,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;

/// Descriptors that a message can have: those of the longest memory table. Who sends more may have
/// lost some on the way, and is in step no more.
const MOST_DESCRIPTORS: usize = 32;

/// Everything that is offered, as all of it can be attacked.
fn everything() -> Options {
    Options { protocol_features: u64::MAX, ..Options::default() }
}

/// A front end that can be told nothing but by a hang-up.
fn without_reply_ack() -> Options {
    let protocol_features = Options::default().protocol_features & !VHOST_USER_PROTOCOL_F_REPLY_ACK;
    Options { protocol_features, ..Options::default() }
}

/// Whether a message asks for an acknowledgement, or could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// It does.
    Yes,
    /// It could, and does not.
    No,
    /// It must not, and does not.
    Cannot,
    /// It must not, and does.
    InVain,
}

impl Asks {
    const ALL: [Asks; 4] = [Asks::Yes, Asks::No, Asks::Cannot, Asks::InVain];

    fn options(self) -> Options {
        match self {
            Asks::Yes | Asks::No => everything(),
            Asks::Cannot | Asks::InVain => without_reply_ack(),
        }
    }

    fn flags(self) -> u32 {
        match self {
            Asks::Yes | Asks::InVain => VHOST_USER_NEED_REPLY_MASK,
            Asks::No | Asks::Cannot => 0,
        }
    }
}

/// A front end under which a table of bad messages is sent, one session as long as it lasts.
struct Sender<'a> {
    subject: &'a mut Subject,
    asks: Asks,
    attacker: Option<Attacker>,
}

impl<'a> Sender<'a> {
    fn new(subject: &'a mut Subject, asks: Asks) -> Self {
        Sender { subject, asks, attacker: None }
    }

    /// Sends a message that must be refused. Whoever is not told so loses the connection.
    #[track_caller]
    fn must_refuse(&mut self, row: (u32, &str), payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let (request, name) = row;
        let what = || {
            let (size, count) = (payload.len(), fds.len());
            format!("{name} ({request}), {size} bytes, {count} descriptors, asks: {:?}", self.asks)
        };
        let mut attacker = match self.attacker.take() {
            Some(attacker) => attacker,
            None => Attacker::begin(self.subject, &self.asks.options()),
        };
        let reaction = attacker.send((request, self.asks.flags()), payload, fds);
        let is_answered = TABLE.iter().any(|row| row.request == request && row.answered);
        // The answer to GET_CONFIG has a form that says no: one without data.
        let can_be_told =
            request == VHOST_USER_GET_CONFIG || self.asks == Asks::Yes && !is_answered;
        let is_told = can_be_told && fds.len() <= MOST_DESCRIPTORS;
        let due = if is_told { Reaction::Refused } else { Reaction::HungUp };
        let refused = reaction == due;
        promise(refused, || format!("{}: {reaction:?}", what()));
        if reaction == Reaction::HungUp {
            attacker.after(self.subject, Session::Over, &what());
        } else {
            attacker.neighbour_must_work(&what());
            self.attacker = Some(attacker);
        }
    }

    /// The end of a table: the session that is left, if any, goes on.
    fn end(self) {
        match self.attacker {
            Some(attacker) => attacker.after(self.subject, Session::Lives, "the last message"),
            None => self.subject.must_serve_the_next(),
        }
    }
}

/// Runs a table of bad messages under each kind of front end, against each kind of device.
fn under_all(table: impl Fn(&mut Sender<'_>)) {
    for mut subject in Subject::each() {
        for asks in Asks::ALL {
            let mut sender = Sender::new(&mut subject, asks);
            table(&mut sender);
            sender.end();
        }
    }
}

/// Sends raw bytes after which the connection must be closed.
#[track_caller]
fn must_close(subject: &mut Subject, bytes: &[u8], what: &str) {
    let attacker = Attacker::begin(subject, &everything());
    let wire = attacker.driver.guest.front_end.wire();
    match wire.send_bytes(bytes, &[]) {
        Ok(()) if is_peer() => {
            // No text forbids to wait for a payload of any length.
            wire.stream().shutdown(Shutdown::Write).expect("a socket can be shut down");
        }
        Ok(()) => wire.wait_for_hang_up(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}")),
        Err(error) => assert!(matches!(error, Error::HangUp), "{what}: {error}"),
    }
    attacker.after(subject, Session::Over, what);
}

#[test]
fn payload_that_is_announced_longer_than_any() {
    for mut subject in Subject::each() {
        let requests = TABLE.iter().map(|row| (row.request, row.name)).chain([(9999, "none")]);
        for (request, name) in requests {
            let sizes: &[u32] = match request {
                VHOST_USER_GET_FEATURES => &[4097, 1 << 20, 1 << 31, u32::MAX - 11, u32::MAX],
                _ => &[4097, u32::MAX],
            };
            for size in sizes {
                let bytes = header(request, VHOST_USER_VERSION, *size);
                must_close(&mut subject, &bytes, &format!("{name} of {size} bytes"));
            }
        }
    }
}

#[test]
fn unknown_requests() {
    under_all(|sender| {
        for request in [0, 45, 46, 99, 1000, 0x7fff_ffff, u32::MAX] {
            for payload in [vec![], words(&[1]), vec![0; 40], vec![0xff; 4096]] {
                sender.must_refuse((request, "none"), &payload, &[]);
            }
        }
    });
}

#[test]
fn header_flags_that_no_front_end_sends() {
    for mut subject in Subject::each() {
        for row in TABLE {
            for flags in [0, 2, 3, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK] {
                let mut bytes =
                    header(row.request, flags, u32::try_from(row.size_bytes).unwrap_or(0));
                bytes.resize(bytes.len() + row.size_bytes, 0);
                must_close(&mut subject, &bytes, &format!("{}, flags {flags:#x}", row.name));
            }
        }
    }
}

#[test]
fn header_flags_that_have_no_meaning_yet() {
    // The text says nothing of them: they may be ignored, or cost the connection.
    let mut subject = Subject::start();
    for bit in 4..32 {
        let attacker = Attacker::begin(&subject, &everything());
        attacker.send((VHOST_USER_GET_FEATURES, 1 << bit), &[], &[]);
        attacker.after(&mut subject, Session::Either, &format!("flag bit {bit}"));
    }
}

/// The descriptors that a row with a payload of zeroes needs.
fn descriptors_of(row: &Row) -> usize {
    usize::from(matches!(
        row.descriptors,
        Descriptors::One | Descriptors::OneUnlessFlagged | Descriptors::OnePerRegion
    ))
}

#[test]
fn every_request_with_a_wrong_size() {
    let file = Notifier::eventfd().expect("eventfds");
    under_all(|sender| {
        for row in TABLE {
            let fds = vec![file.back_end_fd(); descriptors_of(row)];
            let shorter = [0, row.size_bytes / 2, row.size_bytes.saturating_sub(1)];
            let longer = [row.size_bytes + 1, row.size_bytes + 8, 4096];
            let mut sizes: Vec<usize> =
                shorter.into_iter().filter(|size| *size < row.size_bytes).collect();
            sizes.extend(longer.iter().filter(|_| !row.varies));
            sizes.dedup();
            for size in sizes {
                sender.must_refuse((row.request, row.name), &vec![0; size], &fds);
            }
        }
    });
}

#[test]
fn every_request_with_surplus_descriptors_leaks_none() {
    for mut subject in Subject::each() {
        let file = Notifier::eventfd().expect("eventfds");
        subject.must_serve_the_next();
        let before = idle_descriptors(&subject);
        for asks in [Asks::Yes, Asks::Cannot] {
            let mut sender = Sender::new(&mut subject, asks);
            for row in TABLE {
                // REM_MEM_REG may come with a descriptor, which means nothing.
                let due =
                    descriptors_of(row) + usize::from(row.descriptors == Descriptors::Optional);
                // All that is too much costs the connection, so those counts are few.
                for surplus in (due + 1..=32).chain([33, 40, 253]) {
                    let is_sample = surplus == due + 1 || surplus == 32;
                    if is_sample || asks == Asks::Yes && !row.answered {
                        let fds = vec![file.back_end_fd(); surplus];
                        sender.must_refuse((row.request, row.name), &vec![0; row.size_bytes], &fds);
                    }
                }
            }
            sender.end();
        }
        let after = idle_descriptors(&subject);
        assert_eq!(after, before, "descriptors of the back end");
    }
}

#[test]
fn no_descriptor_may_come_where_the_payload_says_that_there_is_none() {
    let file = Notifier::eventfd().expect("eventfds");
    under_all(|sender| {
        for row in TABLE.iter().filter(|row| row.descriptors == Descriptors::OneUnlessFlagged) {
            for count in [1, 2, 32] {
                let fds = vec![file.back_end_fd(); count];
                sender.must_refuse((row.request, row.name), &words(&[0x100]), &fds);
            }
        }
    });
}

/// Open descriptors of the back end while it serves one front end that has done nothing.
fn idle_descriptors(subject: &Subject) -> usize {
    let _served = subject.driver(&Options { queue_count: 0, ..Options::default() });
    subject.count("fd")
}

#[test]
fn every_request_that_needs_a_descriptor_without_one() {
    under_all(|sender| {
        for row in TABLE.iter().filter(|row| descriptors_of(row) > 0) {
            let mut payload = vec![0; row.size_bytes];
            if row.descriptors == Descriptors::OnePerRegion {
                // A table without regions needs no descriptor.
                payload[..4].copy_from_slice(&1_u32.to_ne_bytes());
            }
            sender.must_refuse((row.request, row.name), &payload, &[]);
        }
    });
}

#[test]
fn ring_indexes_out_of_range() {
    let file = Notifier::eventfd().expect("eventfds");
    under_all(|sender| {
        let count = u32::from(sender.subject.queue_count());
        for index in [count, 63, 255, 256, 0x8000_0000, u32::MAX] {
            for row in TABLE.iter().filter(|row| row.name.contains("_VRING_") && row.feature == 0) {
                let carries_fd = row.descriptors != Descriptors::None;
                // Kick, call and err messages have eight bits for the index.
                if carries_fd && index > 0xff {
                    continue;
                }
                let mut payload =
                    if carries_fd { words(&[u64::from(index)]) } else { vring_state(index, 0) };
                payload.resize(row.size_bytes, 0);
                let fds = vec![file.back_end_fd(); descriptors_of(row)];
                sender.must_refuse((row.request, row.name), &payload, &fds);
            }
        }
    });
}

#[test]
fn odd_queue_sizes() {
    under_all(|sender| {
        for size in [0, 3, 100, 1023, 1025, 32_769, 65_536, 1 << 31, u32::MAX] {
            let row = (VHOST_USER_SET_VRING_NUM, "SET_VRING_NUM");
            sender.must_refuse(row, &vring_state(0, size), &[]);
        }
    });
}

#[test]
fn numbers_that_a_field_cannot_hold() {
    under_all(|sender| {
        for base in [1 << 16, 1 << 31, u32::MAX] {
            let row = (VHOST_USER_SET_VRING_BASE, "SET_VRING_BASE");
            sender.must_refuse(row, &vring_state(0, base), &[]);
        }
        for state in [2, 0xff, 1 << 31, u32::MAX] {
            let row = (VHOST_USER_SET_VRING_ENABLE, "SET_VRING_ENABLE");
            sender.must_refuse(row, &vring_state(0, state), &[]);
        }
        for (descriptors, used, available) in [(1, 0, 0), (8, 0, 0), (0, 2, 0), (0, 0, 1)] {
            let mut payload = halves(&[0, 0]);
            payload.extend(words(&[descriptors, used, available, 0]));
            sender.must_refuse((VHOST_USER_SET_VRING_ADDR, "SET_VRING_ADDR"), &payload, &[]);
        }
    });
}

#[test]
fn running_ring_cannot_be_moved_or_resized() {
    // The front end that wants that stops the ring first.
    let far = 1 << 20;
    under_all(|sender| {
        sender.must_refuse((VHOST_USER_SET_VRING_NUM, "NUM"), &vring_state(0, 64), &[]);
        sender.must_refuse((VHOST_USER_SET_VRING_BASE, "BASE"), &vring_state(0, 7), &[]);
        let mut payload = halves(&[0, 0]);
        payload.extend(words(&[far, 2 * far, 3 * far, 0]));
        sender.must_refuse((VHOST_USER_SET_VRING_ADDR, "ADDR"), &payload, &[]);
        sender.must_refuse((VHOST_USER_SET_FEATURES, "FEATURES"), &words(&[0]), &[]);
    });
}

#[test]
fn features_that_were_never_offered() {
    under_all(|sender| {
        let front_end = sender.subject.connect();
        let features = front_end.get_features().expect("features are told");
        let protocol_features = front_end.get_protocol_features().expect("they are told");
        drop(front_end);
        for bit in (0..64).filter(|bit| features >> bit & 1 == 0) {
            let row = (VHOST_USER_SET_FEATURES, "SET_FEATURES");
            sender.must_refuse(row, &words(&[features | 1 << bit]), &[]);
        }
        for bit in (0..64).filter(|bit| protocol_features >> bit & 1 == 0) {
            let row = (VHOST_USER_SET_PROTOCOL_FEATURES, "SET_PROTOCOL_FEATURES");
            sender.must_refuse(row, &words(&[protocol_features | 1 << bit]), &[]);
        }
    });
}

#[test]
fn configuration_space_that_is_not_there() {
    under_all(|sender| {
        for row in [(VHOST_USER_GET_CONFIG, "GET_CONFIG"), (VHOST_USER_SET_CONFIG, "SET_CONFIG")] {
            // Offset, size and the data that comes with them.
            for (offset, size, data_bytes) in [
                (0, 8, 0),
                (0, 8, 4),
                (0, 8, 12),
                (0, 0xffff_fff0, 8),
                (257, 1, 1),
                (256, 1, 1),
                (u32::MAX, 1, 1),
                (u32::MAX - 7, 8, 8),
                (0, 257, 257),
                (0, 4000, 4000),
            ] {
                let mut payload = halves(&[offset, size, 0]);
                payload.resize(payload.len() + data_bytes, 0);
                sender.must_refuse(row, &payload, &[]);
            }
        }
    });
}

#[test]
fn front_end_that_never_reads_its_replies() {
    // Its socket fills up; whoever waits for room in it is stuck with it until it hangs up. Its
    // rings run on.
    for mut subject in Subject::each() {
        for asks in Asks::ALL {
            let mut attacker = Attacker::begin(&subject, &asks.options());
            let wire = attacker.driver.guest.front_end.wire();
            wire.stream().set_nonblocking(true).expect("a socket can be made non-blocking");
            let burst = header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION | asks.flags(), 0);
            let burst = burst.repeat(1000);
            // As long as the back end still reads, there is room again after the neighbour's turn.
            let mut full = 0;
            while full < 3 {
                while attacker.driver.guest.front_end.wire().send_bytes(&burst, &[]).is_ok() {
                    full = 0;
                }
                full += 1;
                attacker.neighbour_must_work("replies are not read");
            }
            drop(attacker);
            subject.must_serve_the_next();
        }
    }
}
