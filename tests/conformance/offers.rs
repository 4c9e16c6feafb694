//! What is offered is meant: every part of it can be had by itself, and nothing is there that stands
//! for something else (VIRTIO 1.3, 2.2.2, 2.5.2, 5.2.6.2 and 6.2).

use crate::subject::{DISK_SECTORS, Subject, is_another_program, lacks_feature, must_work};
use frontend::block::{
    Request, SECTOR_BYTES, Segment, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
};
use frontend::guest::Options;
use frontend::message::{
    VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_CONFIG, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1,
};

/// Request types of features that are not offered, by their names.
const UNOFFERED_KINDS: [(u32, &str); 9] = [
    (10, "GET_LIFETIME"),
    (14, "SECURE_ERASE"),
    (15, "ZONE_APPEND"),
    (16, "ZONE_REPORT"),
    (18, "ZONE_OPEN"),
    (20, "ZONE_CLOSE"),
    (22, "ZONE_FINISH"),
    (24, "ZONE_RESET"),
    (26, "ZONE_RESET_ALL"),
];

#[test]
fn no_feature_is_offered_that_is_not_served() {
    // VIRTIO 1.3, 2.2.2: no reserved bits, none of other devices or transports, none that would not be
    // supported. Among those that stay away: the legacy ones (BARRIER, SCSI, NOTIFY_ON_EMPTY,
    // ANY_LAYOUT), LIFETIME, SECURE_ERASE, ZONED, ACCESS_PLATFORM, RING_PACKED, IN_ORDER, SR_IOV,
    // RING_RESET, and vhost's LOG_ALL.
    if is_another_program() {
        return;
    }
    let served = VIRTIO_F_VERSION_1
        | VIRTIO_F_EVENT_IDX
        | VIRTIO_F_INDIRECT_DESC
        | VHOST_USER_F_PROTOCOL_FEATURES
        | VIRTIO_BLK_F_SIZE_MAX
        | VIRTIO_BLK_F_SEG_MAX
        | VIRTIO_BLK_F_BLK_SIZE
        | VIRTIO_BLK_F_FLUSH
        | VIRTIO_BLK_F_TOPOLOGY
        | VIRTIO_BLK_F_CONFIG_WCE
        | VIRTIO_BLK_F_MQ
        | VIRTIO_BLK_F_DISCARD
        | VIRTIO_BLK_F_WRITE_ZEROES;
    let subject = Subject::start();
    let front_end = subject.connect();
    let features = front_end.get_features().expect("features are told");
    assert_eq!(features & !served, 0, "features {features:#x}");
    let served = Options::default().protocol_features;
    let features = front_end.get_protocol_features().expect("protocol features are told");
    assert_eq!(features, served, "protocol features");
}

#[test]
fn every_offered_feature_can_be_declined_by_itself_and_with_all_others() {
    // VIRTIO 1.3, 2.2.2: the device SHOULD accept any valid subset.
    let subject = Subject::start();
    let offered = subject.connect().get_features().expect("features are told");
    let mut subsets: Vec<u64> = (0..64)
        .map(|bit| 1_u64 << bit)
        .filter(|mask| offered & mask != 0 && *mask != VIRTIO_F_VERSION_1)
        .map(|mask| offered & !mask)
        .collect();
    subsets.push(offered & (VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES));
    subsets.push(offered & VIRTIO_F_VERSION_1);
    for features in subsets {
        let mut driver = subject.driver(&Options { features, ..Options::default() });
        must_work(&mut driver, 0);
    }
}

#[test]
fn configuration_space_can_be_read_before_features_are_accepted() {
    // VIRTIO 1.3, 2.5.2: any field, before FEATURES_OK.
    let subject = Subject::start();
    let mut front_end = subject.connect();
    let offered = front_end.get_protocol_features().expect("protocol features are told");
    let wanted = offered & VHOST_USER_PROTOCOL_F_CONFIG;
    front_end.set_protocol_features(wanted).expect("the message goes out");
    let early = front_end.get_config(0, 32).expect("the configuration space can be read");
    assert_eq!(early[..8], DISK_SECTORS.to_le_bytes());
    drop(front_end);
    let driver = subject.driver(&Options::default());
    let later = driver.guest.front_end.get_config(0, 32).expect("it can be read");
    assert_eq!(early, later);
}

#[test]
fn requests_of_features_that_are_not_offered_are_unsupported() {
    // VIRTIO 1.3, 5.2.6.2: the device MUST reject zone requests with UNSUPP if ZONED was not
    // negotiated.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    let data = [0x6d; 2 * SECTOR_BYTES];
    let written = driver.perform(0, &Request::write(0, &data)).expect("a write ends");
    assert_eq!(written.status, VIRTIO_BLK_S_OK);
    for (kind, name) in UNOFFERED_KINDS {
        let segment = [Segment { sector: 0, count: 2, flags: 0 }];
        let shapes = [
            Request { kind, ..Request::default() },
            Request { kind, writable_bytes: vec![512, 8], ..Request::default() },
            Request {
                kind,
                readable: vec![vec![7; 512]],
                writable_bytes: vec![8],
                ..Request::default()
            },
            Request::over_segments(kind, &segment),
        ];
        for request in shapes {
            let outcome = driver.perform(0, &request).expect("the request ends");
            assert_eq!(outcome.status, VIRTIO_BLK_S_UNSUPP, "{name}: {request:?}");
        }
    }
    assert_eq!(driver.perform(0, &Request::read(0, data.len())).expect("a read ends").data, data);
}

#[test]
fn flag_that_may_not_be_is_unsupported_whatever_else_is_wrong() {
    // VIRTIO 1.3, 5.2.6.2: the device MUST set UNSUPP if any unknown flag is set, and for a discard
    // if unmap is.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let config = driver.config().expect("the configuration space can be read");
    let plain = Segment { sector: 0, count: 1, flags: 0 };
    let beyond = Segment { sector: DISK_SECTORS, ..plain };
    let empty = Segment { count: 0, ..plain };
    let kinds = [
        (VIRTIO_BLK_T_DISCARD, &[1, 2, 3, 1 << 31][..], config.max_discard_seg()),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[2, 3, 1 << 31], config.max_write_zeroes_seg()),
    ];
    for (kind, flags, max_segments) in kinds {
        for flags in flags.iter().copied() {
            let with = |segment| Segment { flags, ..segment };
            let lists = [
                vec![with(plain)],
                vec![with(beyond)],
                vec![with(empty)],
                vec![plain, with(plain)],
                vec![with(plain), beyond],
                vec![beyond, with(plain)],
                vec![empty, with(empty)],
            ];
            for list in lists.iter().filter(|list| list.len() as u64 <= u64::from(max_segments)) {
                let outcome = driver.perform(0, &Request::over_segments(kind, list));
                let status = outcome.expect("the request ends").status;
                assert_eq!(status, VIRTIO_BLK_S_UNSUPP, "request type {kind}: {list:?}");
            }
        }
        let outcome = driver.perform(0, &Request::over_segments(kind, &[beyond]));
        assert_eq!(outcome.expect("the request ends").status, VIRTIO_BLK_S_IOERR, "{kind}");
    }
    must_work(&mut driver, 0);
}
