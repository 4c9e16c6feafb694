//! Messages of which only a part comes: followed by a hang-up, by nothing, or by the rest.
//!
//! A back end may wait for the rest as long as the front end stays. Meanwhile the rings run; and
//! when the front end goes, nothing of the part is left behind.

use crate::aftermath::{Attacker, Session};
use crate::subject::{Subject, is_another_program, is_ours_to_promise, must_work};
use frontend::guest::Options;
use frontend::message::{
    HEADER_BYTES, VHOST_USER_GET_CONFIG, VHOST_USER_GET_FEATURES, VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_SET_BACKEND_REQ_FD, VHOST_USER_SET_FEATURES, VHOST_USER_SET_MEM_TABLE,
    VHOST_USER_SET_OWNER, VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ENABLE,
    VHOST_USER_VERSION, config_access, header, memory_table, vring_state, words,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;

/// A message that is fit to be sent to a running session, and whether descriptors belong to it.
struct Whole {
    request: u32,
    bytes: Vec<u8>,
    has_fd: bool,
}

fn whole(request: u32, payload: &[u8], has_fd: bool) -> Whole {
    let size_bytes = u32::try_from(payload.len()).expect("a test's payload is short");
    let flags = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK;
    let mut bytes = header(request, flags, size_bytes);
    bytes.extend(payload);
    Whole { request, bytes, has_fd }
}

/// One message of each layout.
fn messages(attacker: &Attacker) -> Vec<Whole> {
    let guest = &attacker.driver.guest;
    let region = guest.memory.regions()[0].description();
    vec![
        whole(VHOST_USER_GET_FEATURES, &[], false),
        whole(VHOST_USER_SET_FEATURES, &words(&[guest.features]), false),
        whole(VHOST_USER_SET_MEM_TABLE, &memory_table(&[region]), true),
        whole(VHOST_USER_SET_VRING_CALL, &words(&[0]), true),
        whole(VHOST_USER_SET_VRING_ENABLE, &vring_state(0, 1), false),
        whole(VHOST_USER_GET_CONFIG, &config_access(0, 0, &[0; 8]), false),
        whole(VHOST_USER_SET_BACKEND_REQ_FD, &[], true),
    ]
}

/// The descriptor that belongs to a message.
fn descriptor<'a>(
    message: &Whole,
    attacker: &'a Attacker,
    other: &'a Notifier,
) -> Vec<BorrowedFd<'a>> {
    let memory = attacker.driver.guest.memory.regions()[0].file();
    let fd = if message.request == VHOST_USER_SET_MEM_TABLE { memory } else { other.back_end_fd() };
    if message.has_fd { vec![fd] } else { Vec::new() }
}

/// How a front end gives up in the middle of a message.
#[derive(Clone, Copy, Debug)]
enum GivesUp {
    /// It hangs up.
    HangsUp,
    /// It only ends its side, and waits for the back end to hang up.
    EndsItsSide,
}

/// The cuts of a message: every byte of its header, and the edges and insides of its fields.
fn cuts(size_bytes: usize) -> Vec<usize> {
    let closely = 1..size_bytes.min(HEADER_BYTES + 10);
    closely.chain((HEADER_BYTES + 10..size_bytes).step_by(7)).collect()
}

#[test]
fn end_at_every_byte() {
    for mut subject in Subject::each() {
        let other = Notifier::socket().expect("sockets");
        let sizes: Vec<usize> = messages(&Attacker::begin(&subject, &Options::default()))
            .iter()
            .map(|message| message.bytes.len())
            .collect();
        for (index, size_bytes) in sizes.into_iter().enumerate() {
            for (cut, end) in cuts(size_bytes)
                .into_iter()
                .flat_map(|cut| [(cut, GivesUp::HangsUp), (cut, GivesUp::EndsItsSide)])
            {
                let attacker = Attacker::begin(&subject, &Options::default());
                let message = messages(&attacker).swap_remove(index);
                let what = format!("request {}, {cut} bytes, {end:?}", message.request);
                let wire = attacker.driver.guest.front_end.wire();
                let fds = descriptor(&message, &attacker, &other);
                wire.send_bytes(&message.bytes[..cut], &fds).expect("the bytes go out");
                if let GivesUp::EndsItsSide = end {
                    wire.stream().shutdown(Shutdown::Write).expect("a socket can be shut down");
                    wire.wait_for_hang_up(PATIENCE)
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                drop(attacker);
                subject.must_serve_the_next();
            }
        }
    }
}

#[test]
fn stall_at_every_byte_holds_up_no_ring() {
    // Other programs want a header in one piece, as front ends in use send it.
    if !is_ours_to_promise() {
        return;
    }
    for mut subject in Subject::each() {
        let other = Notifier::eventfd().expect("eventfds");
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let mut attacker = Attacker::begin(&subject, &Options::default());
        for message in messages(&attacker) {
            for cut in 1..message.bytes.len() {
                let what = format!("request {}, stalled at byte {cut}", message.request);
                let (first, rest) = message.bytes.split_at(cut);
                let wire = attacker.driver.guest.front_end.wire();
                let fds = match message.request {
                    VHOST_USER_SET_BACKEND_REQ_FD => vec![std::os::fd::AsFd::as_fd(&socket)],
                    _ => descriptor(&message, &attacker, &other),
                };
                wire.send_bytes(first, &fds).expect("the bytes go out");
                attacker.neighbour_must_work(&what);
                let wire = attacker.driver.guest.front_end.wire();
                wire.send_bytes(rest, &[]).expect("the bytes go out");
                let reply =
                    wire.receive(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(reply.request, message.request, "{what}");
            }
        }
        attacker.after(&mut subject, Session::Lives, "messages in two parts");
    }
}

#[test]
fn message_in_single_bytes_is_put_together() {
    if !is_ours_to_promise() {
        return;
    }
    for subject in Subject::each() {
        let attacker = Attacker::begin(&subject, &Options::default());
        let wire = attacker.driver.guest.front_end.wire();
        for message in messages(&attacker).into_iter().filter(|message| !message.has_fd) {
            for byte in &message.bytes {
                wire.send_bytes(&[*byte], &[]).expect("a byte goes out");
            }
            let reply = wire.receive(PATIENCE).expect("the whole is answered");
            assert_eq!(reply.request, message.request);
        }
    }
}

#[test]
fn messages_in_one_piece_are_taken_apart() {
    for subject in Subject::each() {
        let front_end = subject.connect();
        let mut bytes = header(VHOST_USER_SET_OWNER, VHOST_USER_VERSION, 0);
        for _ in 0..20 {
            bytes.extend(header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION, 0));
        }
        front_end.wire().send_bytes(&bytes, &[]).expect("the bytes go out");
        for _ in 0..20 {
            assert_eq!(
                front_end.wire().receive(PATIENCE).expect("each is answered").request,
                VHOST_USER_GET_FEATURES
            );
        }
    }
}

#[test]
fn stalled_front_end_does_not_keep_the_process_from_ending() {
    if is_another_program() {
        return;
    }
    for sent in [1, HEADER_BYTES, HEADER_BYTES + 4] {
        let subject = Subject::start();
        let mut driver = subject.driver(&Options::default());
        let message = whole(VHOST_USER_SET_FEATURES, &words(&[0]), false);
        let wire = driver.guest.front_end.wire();
        wire.send_bytes(&message.bytes[..sent], &[]).expect("the bytes go out");
        must_work(&mut driver, 0);
        let (daemon, _directory) = subject.into_daemon();
        assert_eq!(daemon.terminate().code(), Some(0), "after {sent} bytes");
    }
}
