//! Messages that are well formed and come before their time, after it, twice, or in an order that
//! no front end has.
//!
//! What the text leaves open may be served or refused. In either case the process lives, and a
//! connection that goes on can still be set up as it should have been.

use crate::aftermath::{Attacker, Reaction, Session, reaction};
use crate::subject::{Subject, is_ours_to_promise, is_peer, promise};
use frontend::block::BlockDriver;
use frontend::front_end::FrontEnd;
use frontend::guest::{Guest, Options};
use frontend::memory::{GuestMemory, Region, Shape};
use frontend::message::{
    Descriptors, RingAddresses, Row, TABLE, VHOST_USER_ADD_MEM_REG, VHOST_USER_GET_CONFIG,
    VHOST_USER_GET_VRING_BASE, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_REM_MEM_REG,
    VHOST_USER_SET_BACKEND_REQ_FD, VHOST_USER_SET_CONFIG, VHOST_USER_SET_FEATURES,
    VHOST_USER_SET_MEM_TABLE, VHOST_USER_SET_PROTOCOL_FEATURES, VHOST_USER_SET_VRING_ADDR,
    VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ENABLE, VHOST_USER_SET_VRING_ERR,
    VHOST_USER_SET_VRING_KICK, VHOST_USER_SET_VRING_NUM, config_access, memory_table,
    single_region, vring_state, words,
};
use frontend::notifier::Notifier;
use load::Random;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// Sequences of random messages, and the messages of each.
const SEQUENCES: u64 = 150;
const SEQUENCE_MESSAGES: usize = 30;
/// Orders of a ring's set-up that are tried, of the 5,040 that there are.
const ORDERS: u64 = 200;

/// One message of a ring's set-up.
type Step = fn(&Guest) -> Result<(), frontend::Error>;

/// What well-formed messages are made of.
struct Parts {
    memory: GuestMemory,
    event: Notifier,
    socket: UnixStream,
    _peer: UnixStream,
    features: u64,
    protocol_features: u64,
    addresses: RingAddresses,
    queue_size: u32,
}

impl Parts {
    /// For a connection on which nothing has been said.
    fn fresh(subject: &Subject) -> Self {
        let guest = subject.driver(&Options::default()).guest;
        Parts::new(&guest)
    }

    fn new(guest: &Guest) -> Self {
        // Away from the guest's own memory.
        let far = Shape { guest: 1 << 32, size_bytes: 1 << 16, file_offset_bytes: 0 };
        let memory = GuestMemory::new(&[far]).expect("memfds can be made");
        let (socket, peer) = UnixStream::pair().expect("sockets");
        Parts {
            memory,
            event: Notifier::eventfd().expect("eventfds"),
            socket,
            _peer: peer,
            features: guest.features,
            protocol_features: guest.protocol_features,
            addresses: guest.ring_addresses(0),
            queue_size: u32::from(guest.queues[0].ring().size()),
        }
    }

    fn region(&self) -> &Region {
        &self.memory.regions()[0]
    }

    /// A payload that makes sense, about ring 0 where it is about a ring.
    fn payload(&self, row: &Row, table: &[&Region]) -> Vec<u8> {
        match row.request {
            VHOST_USER_SET_FEATURES => words(&[self.features]),
            VHOST_USER_SET_PROTOCOL_FEATURES => words(&[self.protocol_features]),
            VHOST_USER_SET_MEM_TABLE => {
                let regions: Vec<_> = table.iter().map(|region| region.description()).collect();
                memory_table(&regions)
            }
            VHOST_USER_ADD_MEM_REG | VHOST_USER_REM_MEM_REG => {
                single_region(&self.region().description())
            }
            VHOST_USER_SET_VRING_NUM => vring_state(0, self.queue_size),
            VHOST_USER_SET_VRING_ENABLE => vring_state(0, 1),
            VHOST_USER_SET_VRING_ADDR => self.addresses.encode(),
            VHOST_USER_GET_CONFIG | VHOST_USER_SET_CONFIG => config_access(0, 0, &[0; 8]),
            _ => vec![0; row.size_bytes],
        }
    }

    fn fds<'a>(&'a self, row: &Row, table: &[&'a Region]) -> Vec<BorrowedFd<'a>> {
        match (row.descriptors, row.request) {
            (Descriptors::None | Descriptors::Optional, _) => Vec::new(),
            (Descriptors::OnePerRegion, _) => table.iter().map(|region| region.file()).collect(),
            (_, VHOST_USER_SET_BACKEND_REQ_FD) => vec![self.socket.as_fd()],
            (
                _,
                VHOST_USER_SET_VRING_KICK | VHOST_USER_SET_VRING_CALL | VHOST_USER_SET_VRING_ERR,
            ) => {
                vec![self.event.back_end_fd()]
            }
            _ => vec![self.region().file()],
        }
    }
}

#[test]
fn every_pair_of_messages_before_anything_else() {
    for mut subject in Subject::each() {
        let parts = Parts::fresh(&subject);
        let table = [parts.region()];
        for first in TABLE {
            for second in TABLE {
                let wire = subject.connect().into_wire();
                let goes_on = [first, second].into_iter().all(|row| {
                    let (payload, fds) = (parts.payload(row, &table), parts.fds(row, &table));
                    reaction(&wire, (row.request, 0), &payload, &fds) != Reaction::HungUp
                });
                // Of another program, only what comes after the connection is asked.
                if goes_on && !is_peer() {
                    let what = format!("{}, {}", first.name, second.name);
                    let driver = BlockDriver::start_on(wire, &Options::default());
                    let mut driver = driver.unwrap_or_else(|error| panic!("{what}: {error}"));
                    subject.must_work(&mut driver, 0);
                }
            }
            subject.must_serve_the_next();
        }
    }
}

#[test]
fn every_request_alone_asking_for_what_was_not_negotiated() {
    for mut subject in Subject::each() {
        let parts = Parts::fresh(&subject);
        let table = [parts.region()];
        for row in TABLE {
            let wire = subject.connect().into_wire();
            let (payload, fds) = (parts.payload(row, &table), parts.fds(row, &table));
            let reaction =
                reaction(&wire, (row.request, VHOST_USER_NEED_REPLY_MASK), &payload, &fds);
            // vhost-user, "REPLY_ACK": without it only some requests have replies. Whoever offers the
            // feature and negotiates it with this very message may answer.
            let kept = row.answered
                || row.request == VHOST_USER_SET_PROTOCOL_FEATURES
                || matches!(reaction, Reaction::HungUp | Reaction::Ignored);
            promise(kept, || format!("{} was answered: {reaction:?}", row.name));
            drop(wire);
            subject.must_serve_the_next();
        }
    }
}

/// What is about rings, memory or features, and does not stop them all.
fn is_about_a_ring(row: &&Row) -> bool {
    const OTHERS: [u32; 5] = [
        VHOST_USER_SET_FEATURES,
        VHOST_USER_SET_PROTOCOL_FEATURES,
        VHOST_USER_SET_MEM_TABLE,
        VHOST_USER_ADD_MEM_REG,
        VHOST_USER_REM_MEM_REG,
    ];
    row.name.contains("_VRING_") && row.feature == 0 || OTHERS.contains(&row.request)
}

/// Sends one message about ring 0 to a running session.
fn send(attacker: &Attacker, parts: &Parts, row: &Row) -> Reaction {
    let table = [&attacker.driver.guest.memory.regions()[0]];
    let (payload, fds) = (parts.payload(row, &table), parts.fds(row, &table));
    attacker.send((row.request, VHOST_USER_NEED_REPLY_MASK), &payload, &fds)
}

/// Ring 0 can be set up again, whatever was said about it.
fn must_start_over(subject: &Subject, attacker: &mut Attacker, what: &str) {
    // No specification demands it.
    if is_peer() {
        return;
    }
    let driver = &mut attacker.driver;
    let restarted = driver.guest.front_end.get_vring_base(0).and_then(|_| {
        let base = driver.guest.queues[0].ring().used_index();
        driver.guest.start_queue(0, u32::from(base))?;
        driver.guest.enable(0)
    });
    assert!(restarted.is_ok(), "{what}: the ring does not start over: {restarted:?}");
    subject.must_work(driver, 0);
}

#[test]
fn every_pair_of_messages_about_a_running_ring() {
    for mut subject in Subject::each() {
        for first in TABLE.iter().filter(is_about_a_ring) {
            for second in TABLE.iter().filter(is_about_a_ring) {
                let what = format!("{}, {}", first.name, second.name);
                let mut attacker = Attacker::begin(&subject, &Options::default());
                let parts = Parts::new(&attacker.driver.guest);
                let goes_on = [first, second]
                    .into_iter()
                    .all(|row| send(&attacker, &parts, row) != Reaction::HungUp);
                if goes_on {
                    must_start_over(&subject, &mut attacker, &what);
                }
                attacker.after(
                    &mut subject,
                    if goes_on { Session::Lives } else { Session::Over },
                    &what,
                );
            }
        }
    }
}

#[test]
fn messages_at_random() {
    // What is about ring 0, in any order, with now and then a number that is wrong.
    for mut subject in Subject::each() {
        let rows: Vec<_> = TABLE.iter().filter(is_about_a_ring).collect();
        for seed in 0..SEQUENCES {
            let mut random = Random::new(seed);
            let mut attacker = Attacker::begin(&subject, &Options::default());
            let parts = Parts::new(&attacker.driver.guest);
            let table = [&attacker.driver.guest.memory.regions()[0]];
            let mut goes_on = true;
            for _ in 0..SEQUENCE_MESSAGES {
                let row = rows[random.below(rows.len() as u64) as usize];
                let (mut payload, fds) = (parts.payload(row, &table), parts.fds(row, &table));
                // Not the index of the ring, which comes first, nor the guest's memory.
                if row.name.contains("_VRING_") && random.below(4) == 0 {
                    let at = 4 + random.below(payload.len() as u64 - 4) as usize;
                    payload[at] = random.bits() as u8;
                }
                let flags = VHOST_USER_NEED_REPLY_MASK * (random.below(8) != 0) as u32;
                if attacker.send((row.request, flags), &payload, &fds) == Reaction::HungUp {
                    goes_on = false;
                    break;
                }
            }
            let what = format!("seed {seed}");
            if goes_on {
                must_start_over(&subject, &mut attacker, &what);
            }
            attacker.after(
                &mut subject,
                if goes_on { Session::Lives } else { Session::Over },
                &what,
            );
        }
    }
}

#[test]
fn ring_is_set_up_in_any_order() {
    // vhost-user has an order in mind, and front ends have others: memory after the rings, enabling
    // before anything else.
    if !is_ours_to_promise() {
        return;
    }
    for subject in Subject::each() {
        for seed in 0..ORDERS {
            let mut random = Random::new(seed);
            let mut driver = subject.driver(&Options::default());
            let guest = &driver.guest;
            let front_end = &guest.front_end;
            front_end.reset_device().expect("the device can be reset");
            front_end.set_mem_table([]).expect("memory can be taken away");
            front_end.set_features(guest.features).expect("features can be set again");
            let mut steps: Vec<Step> = vec![
                |guest| guest.front_end.set_mem_table(guest.memory.regions()),
                |guest| guest.front_end.set_vring_num(0, u32::from(guest.queues[0].ring().size())),
                |guest| guest.front_end.set_vring_addr(&guest.ring_addresses(0)),
                |guest| set_fd(guest, VHOST_USER_SET_VRING_KICK),
                |guest| set_fd(guest, VHOST_USER_SET_VRING_CALL),
                |guest| set_fd(guest, VHOST_USER_SET_VRING_ERR),
                |guest| guest.enable(0),
            ];
            random.shuffle(&mut steps);
            for step in steps {
                step(guest).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            }
            subject.must_work(&mut driver, 0);
        }
    }
}

fn set_fd(guest: &Guest, request: u32) -> Result<(), frontend::Error> {
    let fd = match request {
        VHOST_USER_SET_VRING_KICK => guest.queues[0].kick_notifier(),
        VHOST_USER_SET_VRING_CALL => guest.queues[0].call_notifier(),
        _ => Some(&guest.errs[0]),
    };
    guest.front_end.set_vring_fd(request, 0, fd.map(Notifier::back_end_fd))
}

#[test]
fn ring_is_stopped_and_started_over_and_over() {
    // Stopped twice, started twice, without anything in between.
    for mut subject in Subject::each() {
        let mut attacker = Attacker::begin(&subject, &Options::default());
        for round in 0..100 {
            let guest = &attacker.driver.guest;
            for _ in 0..round % 3 {
                let reaction =
                    attacker.send((VHOST_USER_GET_VRING_BASE, 0), &vring_state(0, 0), &[]);
                assert_eq!(reaction, Reaction::Answered, "round {round}");
            }
            for _ in 0..round % 4 {
                set_fd(guest, VHOST_USER_SET_VRING_KICK).expect("a kick can be set");
                guest.enable(0).expect("a ring can be enabled");
            }
        }
        must_start_over(&subject, &mut attacker, "starts and stops");
        attacker.after(&mut subject, Session::Lives, "starts and stops");
    }
}

/// Only the connection, and nothing said.
#[test]
fn silent_front_end_leaves_when_it_likes() {
    for mut subject in Subject::each() {
        for _ in 0..50 {
            drop(FrontEnd::connect(subject.socket()));
        }
        subject.must_serve_the_next();
    }
}
