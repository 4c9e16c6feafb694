//! The write cache as the driver sees it and switches it (`VIRTIO_BLK_F_CONFIG_WCE`). Whether data is
//! stable then is for [`crate::stability`].

use crate::subject::{QUEUE_COUNT, Subject, is_another_program, must_work};
use frontend::Error;
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_S_OK,
};
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::message::{VHOST_USER_SET_CONFIG, config_access};
use tests::temp_dir_with_direct_io;

/// Offset of the byte `writeback` in the configuration space.
pub(crate) const WRITEBACK: u32 = 32;

fn writeback(driver: &BlockDriver) -> u8 {
    driver.config().expect("the configuration space can be read").writeback()
}

/// The driver switches; the front end hears that it worked.
pub(crate) fn switch(driver: &BlockDriver, writeback: u8) {
    driver.guest.front_end.set_config(WRITEBACK, &[writeback]).expect("the cache can be switched");
}

fn without_flush() -> Options {
    Options { features: Options::default().features & !VIRTIO_BLK_F_FLUSH, ..Options::default() }
}

/// A front end that has not told us features yet, but those of the protocol.
fn negotiating(subject: &Subject) -> FrontEnd {
    let mut front_end = subject.connect();
    let protocol_features = front_end.get_protocol_features().expect("protocol features");
    front_end.set_protocol_features(protocol_features).expect("protocol features");
    front_end
}

#[test]
fn every_mode_begins_as_it_should() {
    if is_another_program() {
        return;
    }
    for (mode, expected) in
        [("none", 1), ("writeback", 1), ("writethrough", 0), ("directsync", 0), ("unsafe", 1)]
    {
        let Some(directory) = temp_dir_with_direct_io() else { return };
        let subject = Subject::in_directory(directory, &["--cache", mode]);
        // A front end that asks before it has negotiated anything: QEMU never asks again.
        let front_end = negotiating(&subject);
        let told = front_end.get_config(WRITEBACK, 1).expect("it can be read");
        assert_eq!(told, [expected], "{mode}");
        drop(front_end);
        let mut driver = subject.driver(&Options::default());
        assert_ne!(driver.guest.features & VIRTIO_BLK_F_CONFIG_WCE, 0, "{mode}");
        assert_eq!(writeback(&driver), expected, "{mode}");
        must_work(&mut driver, 0);
        assert_eq!(
            driver.perform(0, &Request::flush()).expect("a flush ends").status,
            VIRTIO_BLK_S_OK
        );
    }
}

#[test]
fn driver_that_cannot_flush_finds_a_write_through_cache() {
    // VIRTIO 1.3, 5.2.5.2: with CONFIG_WCE and without FLUSH, writeback MUST be 0.
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    assert_eq!(writeback(&subject.driver(&without_flush())), 0);
    assert_eq!(writeback(&subject.driver(&Options::default())), 1);
}

#[test]
fn written_cache_is_read_back() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for value in [0, 0, 1, 1, 0, 1] {
        switch(&driver, value);
        assert_eq!(writeback(&driver), value);
        must_work(&mut driver, 0);
    }
}

#[test]
fn cache_takes_no_other_value_and_no_other_byte() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    for (offset, data) in [
        (WRITEBACK, &[2][..]),
        (WRITEBACK, &[0xff]),
        (WRITEBACK, &[0, 0]),
        (WRITEBACK - 1, &[0]),
        (WRITEBACK - 1, &[0, 0]),
        (WRITEBACK + 1, &[0]),
        (0, &[0; 60]),
    ] {
        let driver = subject.driver(&Options::default());
        let refused = driver.guest.front_end.set_config(offset, data);
        assert!(matches!(refused, Err(Error::Refused { .. })), "{data:?} at {offset}: {refused:?}");
        assert_eq!(writeback(&driver), 1, "{data:?} at {offset}");
        // A driver's write that says it is a migration's is no other.
        let refused = driver.guest.front_end.tell(
            VHOST_USER_SET_CONFIG,
            &config_access(offset, 1, data),
            &[],
        );
        assert!(refused.is_err(), "{data:?} at {offset} for a migration");
    }
}

#[test]
fn driver_may_switch_before_its_features_are_told() {
    // VMMs pass a driver's writes on at once, and its features when it sets DRIVER_OK.
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let front_end = negotiating(&subject);
    front_end.set_config(WRITEBACK, &[0]).expect("the cache can be switched");
    assert_eq!(front_end.get_config(WRITEBACK, 1).expect("it can be read"), [0]);
}

#[test]
fn choice_survives_a_reconnect() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    for value in [0, 1, 0] {
        switch(&subject.driver(&Options::default()), value);
        let mut driver = subject.driver(&Options::default());
        assert_eq!(writeback(&driver), value);
        must_work(&mut driver, 0);
    }
}

#[test]
fn reset_takes_a_write_back_cache_away_and_never_gives_one() {
    if is_another_program() {
        return;
    }
    for (mode, switched, expected) in [
        ("writeback", 1, 1),
        // A front end that has read the space once tells the next driver what this one has written.
        ("writeback", 0, 0),
        ("writethrough", 1, 0),
        ("writethrough", 0, 0),
        ("unsafe", 0, 0),
    ] {
        let subject = Subject::with_options(&["--cache", mode]);
        let driver = subject.driver(&Options::default());
        switch(&driver, switched);
        driver.guest.front_end.reset_device().expect("the device can be reset");
        assert_eq!(writeback(&driver), expected, "{mode}, switched to {switched}");
    }
}

#[test]
fn cache_can_be_switched_while_requests_are_under_way() {
    const SECTORS: usize = 16;
    const DEPTH: u64 = 32;
    if is_another_program() {
        return;
    }
    for mode in ["writeback", "none", "unsafe"] {
        let Some(directory) = temp_dir_with_direct_io() else { return };
        let subject = Subject::in_directory(directory, &["--cache", mode, "--threads", "2"]);
        let options = Options { queue_count: QUEUE_COUNT, ..Options::default() };
        let mut driver = subject.driver(&options);
        for round in 0..60_u8 {
            let data = [round; SECTORS * SECTOR_BYTES];
            for number in 0..DEPTH {
                let queue = u16::try_from(number).expect("few") % QUEUE_COUNT;
                driver.submit(queue, &Request::write(number * SECTORS as u64, &data));
                if number % 8 == 0 {
                    driver.submit(queue, &Request::flush());
                }
            }
            for queue in 0..QUEUE_COUNT {
                driver.kick(queue).expect("the device can be kicked");
            }
            switch(&driver, round % 2);
            for queue in 0..QUEUE_COUNT {
                while driver.guest.queues[usize::from(queue)].outstanding_count() > 0 {
                    let (_, outcome) = driver.complete(queue).expect("each request ends");
                    assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
                }
            }
            let all = SECTORS * SECTOR_BYTES * usize::try_from(DEPTH).expect("few");
            let read = driver.perform(0, &Request::read(0, all)).expect("a read ends");
            assert!(read.data.iter().all(|byte| *byte == round), "{mode}, round {round}");
        }
        assert_eq!(writeback(&driver), 1);
    }
}
