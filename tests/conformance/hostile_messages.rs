//! A front end that breaks the protocol: half messages, wrong sizes, wrong numbers, descriptors too
//! many or too few.
//!
//! The reaction (vhost-user, "REPLY_ACK"): an acknowledgement that says no where one was asked for
//! and the protocol has one, else the connection closes. Either way the process lives and the next
//! front end is served.

use crate::subject::Subject;
use frontend::Error;
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::message::{
    Descriptors, HEADER_BYTES, Row, TABLE, VHOST_USER_GET_CONFIG, VHOST_USER_GET_FEATURES,
    VHOST_USER_NEED_REPLY_MASK, VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_REPLY_MASK,
    VHOST_USER_SET_FEATURES, VHOST_USER_SET_OWNER, VHOST_USER_SET_VRING_NUM, VHOST_USER_VERSION,
    header, vring_state, words,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use std::os::fd::BorrowedFd;

/// A connection with every protocol feature that the back end has.
fn negotiated(subject: &Subject) -> FrontEnd {
    subject
        .driver(&Options { protocol_features: u64::MAX, queue_count: 0, ..Options::default() })
        .guest
        .front_end
}

/// Sends a message that must be refused, with or without asking for an acknowledgement.
#[track_caller]
fn must_refuse(
    subject: &Subject,
    (request, flags): (u32, u32),
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) {
    let front_end = negotiated(subject);
    let wire = front_end.wire();
    let sent = wire.send(request, flags, payload, fds).and_then(|()| wire.receive(PATIENCE));
    match sent {
        Err(Error::HangUp) => {}
        Ok(reply) => {
            // An acknowledgement that says no; a refused GET_CONFIG has an answer of its own, one
            // without data.
            let acknowledged = flags & VHOST_USER_NEED_REPLY_MASK != 0
                && reply.word(0).is_some_and(|code| code != 0);
            let refused =
                acknowledged || request == VHOST_USER_GET_CONFIG && reply.payload.len() <= 12;
            assert!(
                refused,
                "request {request}, {} bytes, {} descriptors: {reply:?}",
                payload.len(),
                fds.len()
            );
        }
        Err(error) => {
            panic!("request {request}, {} bytes, {} descriptors: {error}", payload.len(), fds.len())
        }
    }
}

/// Sends raw bytes after which the connection must be closed.
#[track_caller]
fn must_close(subject: &Subject, bytes: &[u8]) {
    let front_end = negotiated(subject);
    match front_end.wire().send_bytes(bytes, &[]) {
        Ok(()) => front_end.wire().wait_for_hang_up(PATIENCE).expect("the connection is closed"),
        Err(error) => assert!(matches!(error, Error::HangUp), "{error}"),
    }
}

#[test]
fn header_cut_short_by_a_hang_up() {
    let mut subject = Subject::start();
    for length in 1..HEADER_BYTES {
        let front_end = subject.connect();
        let whole = header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION, 0);
        front_end.wire().send_bytes(&whole[..length], &[]).expect("the bytes go out");
    }
    subject.must_serve_the_next();
}

#[test]
fn payload_cut_short_by_a_hang_up() {
    let mut subject = Subject::start();
    for length in 0..8 {
        let front_end = negotiated(&subject);
        let mut message = header(VHOST_USER_SET_FEATURES, VHOST_USER_VERSION, 8);
        message.extend(vec![0; length]);
        front_end.wire().send_bytes(&message, &[]).expect("the bytes go out");
    }
    subject.must_serve_the_next();
}

#[test]
fn message_in_pieces_is_put_together() {
    let subject = Subject::start();
    let front_end = subject.connect();
    for byte in header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION, 0) {
        front_end.wire().send_bytes(&[byte], &[]).expect("a byte goes out");
    }
    let reply = front_end.wire().receive(PATIENCE).expect("the whole is answered");
    assert_eq!((reply.request, reply.payload.len()), (VHOST_USER_GET_FEATURES, 8));
}

#[test]
fn messages_in_one_piece_are_taken_apart() {
    let subject = Subject::start();
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

#[test]
fn payload_that_is_announced_longer_than_any() {
    let mut subject = Subject::start();
    for size in [4097, 1 << 20, 1 << 31, u32::MAX - 11, u32::MAX] {
        for request in
            [VHOST_USER_GET_FEATURES, VHOST_USER_SET_FEATURES, VHOST_USER_GET_CONFIG, 9999]
        {
            must_close(&subject, &header(request, VHOST_USER_VERSION, size));
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn unknown_requests() {
    let mut subject = Subject::start();
    for request in [0, 45, 99, 1000, 0x7fff_ffff, u32::MAX] {
        for flags in [0, VHOST_USER_NEED_REPLY_MASK] {
            must_refuse(&subject, (request, flags), &[], &[]);
            must_refuse(&subject, (request, flags), &words(&[1]), &[]);
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn header_flags_that_no_front_end_sends() {
    let mut subject = Subject::start();
    for flags in [0, 2, 3, VHOST_USER_VERSION | VHOST_USER_REPLY_MASK] {
        must_close(&subject, &header(VHOST_USER_GET_FEATURES, flags, 0));
    }
    subject.must_serve_the_next();
}

/// The rows that a back end of ours serves; the others are refused whatever they look like.
fn descriptors_of(row: &Row) -> usize {
    usize::from(matches!(
        row.descriptors,
        Descriptors::One | Descriptors::OneUnlessFlagged | Descriptors::OnePerRegion
    ))
}

#[test]
fn every_request_with_a_wrong_size() {
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds");
    for row in TABLE {
        let fds = vec![file.back_end_fd(); descriptors_of(row)];
        let flags = if row.answered { 0 } else { VHOST_USER_NEED_REPLY_MASK };
        if row.size_bytes > 0 {
            must_refuse(&subject, (row.request, flags), &vec![0; row.size_bytes - 1], &fds);
            must_refuse(&subject, (row.request, flags), &[], &fds);
        }
        if !row.varies {
            must_refuse(&subject, (row.request, flags), &vec![0; row.size_bytes + 1], &fds);
            must_refuse(&subject, (row.request, flags), &vec![0; row.size_bytes + 8], &fds);
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn every_request_with_surplus_descriptors_leaks_none() {
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds");
    subject.must_serve_the_next();
    drop(negotiated(&subject));
    let before = idle_descriptors(&subject);
    for row in TABLE {
        let flags = if row.answered { 0 } else { VHOST_USER_NEED_REPLY_MASK };
        for surplus in [descriptors_of(row) + 1, 40, 200] {
            // REM_MEM_REG may come with a descriptor, which means nothing.
            if surplus > 1 || row.descriptors != Descriptors::Optional {
                must_refuse(
                    &subject,
                    (row.request, flags),
                    &vec![0; row.size_bytes],
                    &vec![file.back_end_fd(); surplus],
                );
            }
        }
    }
    assert_eq!(idle_descriptors(&subject), before, "descriptors of the back end");
    subject.must_serve_the_next();
}

/// Open descriptors of the back end while it serves one front end that has done nothing.
fn idle_descriptors(subject: &Subject) -> usize {
    let _served = negotiated(subject);
    subject.count("fd")
}

#[test]
fn every_request_that_needs_a_descriptor_without_one() {
    let mut subject = Subject::start();
    for row in TABLE.iter().filter(|row| descriptors_of(row) > 0) {
        let flags = if row.answered { 0 } else { VHOST_USER_NEED_REPLY_MASK };
        let mut payload = vec![0; row.size_bytes];
        if row.descriptors == Descriptors::OnePerRegion {
            // A table without regions needs no descriptor.
            payload[..4].copy_from_slice(&1_u32.to_ne_bytes());
        }
        must_refuse(&subject, (row.request, flags), &payload, &[]);
    }
    subject.must_serve_the_next();
}

#[test]
fn ring_indexes_out_of_range() {
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds");
    for index in [2, 63, 255, 256, u32::MAX] {
        for row in TABLE.iter().filter(|row| row.name.contains("_VRING_") && row.feature == 0) {
            let carries_fd = row.descriptors != Descriptors::None;
            // Kick, call and err messages have eight bits for the index.
            if carries_fd && index > 0xff {
                continue;
            }
            let mut payload =
                if carries_fd { words(&[u64::from(index)]) } else { vring_state(index, 0) };
            payload.resize(row.size_bytes, 0);
            let flags = if row.answered { 0 } else { VHOST_USER_NEED_REPLY_MASK };
            must_refuse(
                &subject,
                (row.request, flags),
                &payload,
                &vec![file.back_end_fd(); descriptors_of(row)],
            );
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn odd_queue_sizes() {
    let mut subject = Subject::start();
    for size in [0, 3, 100, 1023, 1025, 32_769, 65_536, 1 << 31, u32::MAX] {
        must_refuse(
            &subject,
            (VHOST_USER_SET_VRING_NUM, VHOST_USER_NEED_REPLY_MASK),
            &vring_state(0, size),
            &[],
        );
    }
    subject.must_serve_the_next();
}

#[test]
fn refusal_without_acknowledgement_closes_the_connection() {
    let mut subject = Subject::start();
    let options = Options::default();
    let without = Options {
        protocol_features: options.protocol_features & !VHOST_USER_PROTOCOL_F_REPLY_ACK,
        queue_count: 0,
        ..options
    };
    let front_end = subject.driver(&without).guest.front_end;
    front_end.set_vring_num(0, 3).expect("the bytes go out");
    front_end.wire().wait_for_hang_up(PATIENCE).expect("the connection is closed");
    subject.must_serve_the_next();
}

#[test]
fn front_end_that_never_reads_its_replies() {
    // Its socket fills up; whoever waits for room in it is stuck with it until it hangs up.
    let mut subject = Subject::start();
    let front_end = subject.connect();
    front_end
        .wire()
        .stream()
        .set_write_timeout(Some(std::time::Duration::from_millis(200)))
        .expect("a socket takes a timeout");
    let burst = header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION, 0).repeat(1000);
    let mut sent = 0;
    while sent < 1000 && front_end.wire().send_bytes(&burst, &[]).is_ok() {
        sent += 1;
    }
    drop(front_end);
    subject.must_serve_the_next();
}
