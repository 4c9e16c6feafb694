//! Which requests are answered, and by what: replies of their own, acknowledgements where they are
//! asked for (vhost-user, "Communication", "VHOST_USER_PROTOCOL_F_REPLY_ACK").

use crate::subject::{Subject, is_ours_to_promise};
use frontend::Error;
use frontend::block::BlockDriver;
use frontend::guest::Options;
use frontend::message::{
    Descriptors, Row, TABLE, VHOST_USER_GET_CONFIG, VHOST_USER_GET_FEATURES,
    VHOST_USER_GET_MAX_MEM_SLOTS, VHOST_USER_GET_PROTOCOL_FEATURES, VHOST_USER_GET_QUEUE_NUM,
    VHOST_USER_GET_VRING_BASE, VHOST_USER_GPU_SET_SOCKET, VHOST_USER_IOTLB_MSG,
    VHOST_USER_NEED_REPLY_MASK, VHOST_USER_SET_LOG_FD, VHOST_USER_SET_OWNER, config_access,
    vring_state,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;

/// The requests that have a reply of their own and need nothing but what is offered: number and a
/// good payload.
fn answered() -> [(u32, Vec<u8>); 6] {
    [
        (VHOST_USER_GET_FEATURES, Vec::new()),
        (VHOST_USER_GET_PROTOCOL_FEATURES, Vec::new()),
        (VHOST_USER_GET_QUEUE_NUM, Vec::new()),
        (VHOST_USER_GET_MAX_MEM_SLOTS, Vec::new()),
        (VHOST_USER_GET_VRING_BASE, vring_state(1, 0)),
        (VHOST_USER_GET_CONFIG, config_access(0, 0, &[0; 8])),
    ]
}

#[test]
fn request_with_a_reply_of_its_own_has_one_whether_or_not_it_asks() {
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let wire = driver.guest.front_end.wire();
    for (request, payload) in answered() {
        let [plain, asking] = [0, VHOST_USER_NEED_REPLY_MASK].map(|flags| {
            wire.send(request, flags, &payload, &[]).expect("the message goes out");
            let reply = wire.receive(PATIENCE).expect("it is answered");
            assert_eq!(reply.request, request);
            reply.payload
        });
        assert_eq!(plain, asking, "request {request}");
        // A second reply would be taken for the answer to this.
        driver.guest.front_end.barrier().expect("there is no second answer");
    }
}

#[test]
fn refused_request_with_a_reply_of_its_own_is_not_acknowledged() {
    if !is_ours_to_promise() {
        return;
    }
    // An acknowledgement has eight bytes, and so has the reply to most of these: it would be taken
    // for that, and its 1 for a feature or a ring.
    let mut subject = Subject::start();
    for (request, mut payload) in answered() {
        let driver = subject.driver(&Options::default());
        let wire = driver.guest.front_end.wire();
        payload.push(0);
        wire.send(request, VHOST_USER_NEED_REPLY_MASK, &payload, &[])
            .expect("the message goes out");
        match wire.receive(PATIENCE) {
            Err(Error::HangUp) => {}
            // vhost-user, "VHOST_USER_GET_CONFIG": no payload says that it failed.
            Ok(reply) => assert!(
                request == VHOST_USER_GET_CONFIG && reply.payload.is_empty(),
                "request {request}: {reply:?}"
            ),
            Err(error) => panic!("request {request}: {error}"),
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn acknowledgement_is_only_for_who_has_negotiated_it() {
    // Who has not may not ask: what comes of it is not said.
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let front_end = subject.connect();
    let wire = front_end.wire();
    wire.send(VHOST_USER_SET_OWNER, VHOST_USER_NEED_REPLY_MASK, &[], &[]).expect("it goes out");
    front_end.barrier().expect("the next message is answered, and this one was not");
}

/// Whether a row is about something that is never offered: a protocol feature, or without one an
/// IOMMU, a log, a GPU.
fn is_not_offered(row: &Row, driver: &BlockDriver) -> bool {
    const OTHERWISE: [u32; 3] =
        [VHOST_USER_IOTLB_MSG, VHOST_USER_SET_LOG_FD, VHOST_USER_GPU_SET_SOCKET];
    let offered = driver.guest.front_end.get_protocol_features().expect("they are told");
    row.feature & !offered != 0 || OTHERWISE.contains(&row.request)
}

#[test]
fn requests_of_features_that_are_not_offered_are_refused() {
    if crate::subject::is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds can be made");
    let mut refused = 0;
    for row in TABLE {
        for flags in [0, VHOST_USER_NEED_REPLY_MASK] {
            let driver = subject.driver(&Options::default());
            if !is_not_offered(row, &driver) {
                continue;
            }
            let count = usize::from(row.descriptors == Descriptors::One);
            let fds = vec![file.back_end_fd(); count];
            let wire = driver.guest.front_end.wire();
            let payload = vec![0; row.size_bytes];
            wire.send(row.request, flags, &payload, &fds).expect("the message goes out");
            let says_no = match wire.receive(PATIENCE) {
                Err(Error::HangUp) => true,
                Ok(reply) => flags != 0 && !row.answered && reply.word(0).is_some_and(|no| no != 0),
                Err(_) => false,
            };
            assert!(says_no, "{}, flags {flags:#x}", row.name);
            refused += 1;
        }
    }
    assert!(refused >= 2 * 19, "{refused} requests of the table are not offered");
    subject.must_serve_the_next();
}
