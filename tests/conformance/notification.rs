//! Calls: over descriptors of every kind, also full and broken ones, and only when the driver wants
//! them.

use crate::subject::{QUEUE_COUNT, Subject, is_ours_to_promise, must_work, promise};
use frontend::Error;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{
    VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_KICK,
    VIRTIO_F_EVENT_IDX,
};
use frontend::notifier::Notifier;
use frontend::ring::VIRTQ_AVAIL_F_NO_INTERRUPT;
use frontend::wire::PATIENCE;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Makes one end of a notification.
type Maker = fn() -> Result<Notifier, Error>;

fn without_event_idx() -> Options {
    Options { features: Options::default().features & !VIRTIO_F_EVENT_IDX, ..Options::default() }
}

/// One request, whose end is seen in the ring and not by a call.
fn must_work_by_looking(driver: &mut BlockDriver) {
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    driver.kick(0).expect("the device can be kicked");
    assert_eq!(driver.complete_by_looking(0).expect("the request ends").1.status, VIRTIO_BLK_S_OK);
}

#[test]
fn call_descriptor_may_be_a_pipe_or_a_socket() {
    let subject = Subject::start();
    let makers: [Maker; 3] = [Notifier::eventfd, Notifier::pipe, Notifier::socket];
    for (call, event_idx) in makers.into_iter().flat_map(|call| [(call, true), (call, false)]) {
        let features =
            if event_idx { Options::default().features } else { without_event_idx().features };
        let mut driver =
            subject.driver(&Options { call: Some(call), features, ..Options::default() });
        for _ in 0..10 {
            must_work(&mut driver, 0);
        }
    }
}

#[test]
fn full_or_broken_call_descriptor_stops_nobody() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    let makers: [(&str, Maker); 4] = [
        ("pipe without room", Notifier::full_pipe),
        ("socket without room", Notifier::full_socket),
        ("blocking eventfd at its maximum", Notifier::full_blocking_eventfd),
        ("pipe without reader", Notifier::broken_pipe),
    ];
    for (what, call) in makers {
        let mut driver = subject.driver(&Options {
            call: Some(call),
            queue_count: QUEUE_COUNT,
            ..without_event_idx()
        });
        for _ in 0..10 {
            must_work_by_looking(&mut driver);
        }
        // Whoever blocks on the descriptor never answers this.
        driver.guest.front_end.get_vring_base(0).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    subject.must_serve_the_next();
}

#[test]
fn driver_without_call_descriptor_polls() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { call: None, ..Options::default() });
    for _ in 0..20 {
        must_work(&mut driver, 0);
    }
}

#[test]
fn driver_that_wants_no_calls_gets_none() {
    // VIRTIO 1.3, 2.7.7.2: with the flag at 1 and without EVENT_IDX, the device SHOULD NOT send a
    // notification.
    let subject = Subject::start();
    let mut driver = subject.driver(&without_event_idx());
    driver.guest.queues[0].ring().set_available_flags(VIRTQ_AVAIL_F_NO_INTERRUPT);
    must_work_by_looking(&mut driver);
    // A back end may call once when a ring starts, in case something was missed: that is over now.
    take_calls(&driver);
    for _ in 0..20 {
        must_work_by_looking(&mut driver);
    }
    driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
    let calls = take_calls(&driver);
    promise(calls == 0, || format!("{calls} calls in spite of NO_INTERRUPT"));
}

#[test]
fn driver_that_wants_every_call_gets_them() {
    let subject = Subject::start();
    let mut driver = subject.driver(&without_event_idx());
    must_work_by_looking(&mut driver);
    for _ in 0..20 {
        take_calls(&driver);
        must_work_by_looking(&mut driver);
        assert_ne!(
            call(&driver).wait(PATIENCE).expect("the call descriptor can be read"),
            0,
            "a call is missing"
        );
    }
}

#[test]
fn with_event_idx_the_call_comes_at_the_index_that_was_asked_for() {
    // VIRTIO 1.3, 2.7.7.2: a notification when the used index passes used_event, and SHOULD NOT
    // otherwise.
    const APART: u16 = 10;
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    must_work_by_looking(&mut driver);
    for round in 0..5 {
        let used = driver.guest.queues[0].ring().used_index();
        driver.guest.queues[0].ring().set_used_event(used.wrapping_add(APART - 1));
        take_calls(&driver);
        for _ in 0..APART {
            must_work_by_looking(&mut driver);
        }
        assert_eq!(
            call(&driver).wait(PATIENCE).expect("the call descriptor can be read"),
            1,
            "calls in round {round}"
        );
    }
}

#[test]
fn idle_device_asks_for_kicks() {
    // VIRTIO 1.3, 2.7.10: else the driver need not kick, and both sleep.
    let subject = Subject::start();
    for options in [Options::default(), without_event_idx()] {
        let mut driver = subject.driver(&options);
        for _ in 0..200 {
            driver.submit(0, &Request::read(0, SECTOR_BYTES));
            driver.kick_if_wanted(0).expect("the device can be kicked");
            // A device that wants no kick is looking, and finds the request by itself.
            driver.complete(0).expect("the request ends");
        }
    }
}

#[test]
fn descriptors_can_be_changed_while_the_ring_runs() {
    // vhost-user, "Ring states": the back end must support changing some configuration aspects on
    // the fly.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    must_work(&mut driver, 0);
    let front_end = &driver.guest.front_end;
    let (kick, call) = (Notifier::eventfd().expect("eventfds"), Notifier::pipe().expect("pipes"));
    front_end
        .set_vring_fd(VHOST_USER_SET_VRING_CALL, 0, Some(call.back_end_fd()))
        .expect("the call descriptor can be changed");
    front_end
        .set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, Some(kick.back_end_fd()))
        .expect("the kick descriptor can be changed");
    let used = driver.guest.queues[0].ring().used_index();
    driver.guest.queues[0].ring().set_used_event(used);
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    kick.signal().expect("the device can be kicked");
    assert_eq!(
        call.wait(PATIENCE).expect("the call descriptor can be read"),
        1,
        "no call over the new descriptor"
    );
    assert_eq!(driver.complete_by_looking(0).expect("the request ends").1.status, VIRTIO_BLK_S_OK);
}

#[test]
fn kick_descriptor_that_is_no_eventfd_is_refused() {
    if !is_ours_to_promise() {
        return;
    }
    // A regular file and a device are always readable, a pipe and a socket fill up.
    let mut subject = Subject::start();
    let (pipe, socket) = (Notifier::pipe().expect("pipes"), Notifier::socket().expect("sockets"));
    let file = File::open(subject.image()).expect("the image is ours");
    let null = File::open("/dev/null").expect("every system has one");
    let kicks = [
        ("pipe", pipe.back_end_fd()),
        ("socket", socket.back_end_fd()),
        ("regular file", file.as_fd()),
        ("device", null.as_fd()),
    ];
    for (what, kick) in kicks {
        let mut driver =
            subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
        must_work(&mut driver, 0);
        let front_end = &driver.guest.front_end;
        let set_kick = || front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, Some(kick));
        front_end.get_vring_base(0).expect("the ring can be stopped");
        // The message that starts the ring is the one that is refused: this one,
        let started = set_kick();
        assert!(matches!(started, Err(Error::Refused { .. })), "{what}: {started:?}");
        // or the one that enables it.
        front_end.set_vring_enable(0, false).expect("a ring can be disabled");
        set_kick().unwrap_or_else(|error| panic!("{what}, ring disabled: {error}"));
        let enabled = front_end.set_vring_enable(0, true);
        assert!(matches!(enabled, Err(Error::Refused { .. })), "{what}, enabled: {enabled:?}");
        must_work(&mut driver, 1);
        let good = driver.guest.queues[0].kick_notifier().map(Notifier::back_end_fd);
        driver
            .guest
            .front_end
            .set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, good)
            .unwrap_or_else(|error| panic!("an eventfd after a {what}: {error}"));
        must_work(&mut driver, 0);
        drop(driver);
        must_hang_up_on(&subject, kick);
    }
    subject.must_serve_the_next();
}

/// A front end that cannot be told by an acknowledgement that its kick is none loses its
/// connection.
#[track_caller]
fn must_hang_up_on(subject: &Subject, kick: BorrowedFd<'_>) {
    let protocol_features = Options::default().protocol_features & !VHOST_USER_PROTOCOL_F_REPLY_ACK;
    let driver = subject.driver(&Options { protocol_features, ..Options::default() });
    let front_end = &driver.guest.front_end;
    front_end.get_vring_base(0).expect("the ring can be stopped");
    front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, Some(kick)).expect("the message goes out");
    front_end.wire().wait_for_hang_up(PATIENCE).expect("the session ends");
}

#[test]
fn kicks_without_requests_are_harmless() {
    // VIRTIO 1.3, 2.7.10.2: the device MUST handle spurious notifications.
    let subject = Subject::start();
    for options in [Options::default(), without_event_idx()] {
        let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..options });
        for round in 0..50 {
            let used = driver.guest.queues[0].ring().used_index();
            for _ in 0..round {
                driver.kick(0).expect("the device can be kicked");
            }
            must_work(&mut driver, 1);
            assert_eq!(driver.guest.queues[0].ring().used_index(), used, "chains out of nothing");
            must_work(&mut driver, 0);
        }
        assert_eq!(
            driver.guest.errs[0].wait(Duration::ZERO).expect("the err descriptor can be read"),
            0,
            "the ring is broken"
        );
    }
}

fn call(driver: &BlockDriver) -> &Notifier {
    driver.guest.queues[0].call_notifier().expect("the queue has a call descriptor")
}

fn take_calls(driver: &BlockDriver) -> u64 {
    call(driver).wait(Duration::ZERO).expect("the call descriptor can be read")
}
