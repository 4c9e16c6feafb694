//! What is offered, and that it can be had: virtio features, protocol features, ownership, reset.

use crate::subject::{QUEUE_COUNT, Subject, is_ours_to_promise, lacks, must_work, promise};
use frontend::block::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use frontend::guest::{MemoryBy, Options};
use frontend::message::{
    VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIG, VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_LOG_SHMFD, VHOST_USER_PROTOCOL_F_MQ, VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE, VHOST_USER_SET_VRING_KICK, VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;

/// Regions that a front end may at least have: QEMU's boards with hotplugged memory need dozens.
const LEAST_MEM_SLOTS: u64 = 32;

#[test]
fn everything_that_is_implemented_is_offered_and_nothing_else() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let features = subject.connect().get_features().expect("features are told");
    let expected = [
        VIRTIO_F_VERSION_1,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_F_INDIRECT_DESC,
        VHOST_USER_F_PROTOCOL_FEATURES,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    for mask in expected {
        assert_ne!(features & mask, 0, "feature bit {} is missing", mask.trailing_zeros());
    }
    for mask in [VIRTIO_BLK_F_RO, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED] {
        assert_eq!(features & mask, 0, "feature bit {} is offered", mask.trailing_zeros());
    }
}

#[test]
fn protocol_features_are_those_that_are_served() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let front_end = subject.connect();
    // vhost-user, "GET_PROTOCOL_FEATURES": must be supported even before SET_FEATURES was called.
    let features = front_end.get_protocol_features().expect("protocol features are told");
    let expected = [
        VHOST_USER_PROTOCOL_F_MQ,
        VHOST_USER_PROTOCOL_F_REPLY_ACK,
        VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        VHOST_USER_PROTOCOL_F_CONFIG,
        VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
        VHOST_USER_PROTOCOL_F_RESET_DEVICE,
        VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ];
    for mask in expected {
        assert_ne!(features & mask, 0, "protocol feature bit {} is missing", mask.trailing_zeros());
    }
    // A front end relies on what it is told of: a guest hangs if in-band notifications are offered
    // and not served.
    for mask in [VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS, VHOST_USER_PROTOCOL_F_LOG_SHMFD] {
        assert_eq!(features & mask, 0, "protocol feature bit {} is offered", mask.trailing_zeros());
    }
}

#[test]
fn queues_and_memory_slots_are_told() {
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let front_end = &driver.guest.front_end;
    assert_eq!(front_end.get_queue_num().expect("queues are told"), u64::from(QUEUE_COUNT));
    let slots = front_end.get_max_mem_slots().expect("memory slots are told");
    assert!(slots >= LEAST_MEM_SLOTS, "{slots} memory slots");
}

#[test]
fn front_end_without_protocol_features_is_served() {
    // Such a front end never enables a ring: it starts enabled (vhost-user, "Ring states").
    let subject = Subject::start();
    let options = Options {
        features: Options::default().features & !VHOST_USER_F_PROTOCOL_FEATURES,
        ..Options::default()
    };
    must_work(&mut subject.driver(&options), 0);
}

#[test]
fn front_end_that_accepts_config_alone_is_served() {
    // As Firecracker: CONFIG only, and neither INDIRECT nor MQ nor SEG_MAX.
    let subject = Subject::start();
    let options = Options {
        features: VIRTIO_F_VERSION_1
            | VIRTIO_F_EVENT_IDX
            | VIRTIO_BLK_F_FLUSH
            | VHOST_USER_F_PROTOCOL_FEATURES,
        protocol_features: VHOST_USER_PROTOCOL_F_CONFIG,
        ..Options::default()
    };
    must_work(&mut subject.driver(&options), 0);
}

#[test]
fn enabling_before_any_feature_is_no_offence() {
    // QEMU's virtio-net does that when it resets the device.
    let subject = Subject::start();
    let front_end = subject.connect();
    front_end.set_owner().expect("the bytes go out");
    front_end.get_protocol_features().expect("protocol features are told");
    front_end.set_vring_enable(0, true).expect("the bytes go out");
    let goes_on = front_end.barrier();
    promise(goes_on.is_ok(), || format!("the connection is not there any more: {goes_on:?}"));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    let mut front_end = subject.connect();
    front_end.set_protocol_features(VHOST_USER_PROTOCOL_F_REPLY_ACK).expect("the bytes go out");
    let features = front_end.get_features().expect("features are told");
    assert!(
        front_end.set_features(features | VIRTIO_F_RING_PACKED).is_err(),
        "packed rings were accepted"
    );
    drop(front_end);
    subject.must_serve_the_next();
}

#[test]
fn reset_device_leaves_a_connection_that_can_start_over() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_RESET_DEVICE) {
        return;
    }
    must_work(&mut driver, 0);
    driver.guest.front_end.reset_device().expect("the device can be reset");
    restart(&mut driver);
}

#[test]
fn reset_device_keeps_the_error_descriptor() {
    // QEMU sends it once, before the first start, and resets the device after that.
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_RESET_DEVICE) {
        return;
    }
    let guest = &driver.guest;
    let front_end = &guest.front_end;
    front_end.reset_device().expect("the device can be reset");
    front_end.set_features(guest.features).expect("features can be set again");
    front_end.set_mem_table(guest.memory.regions()).expect("memory can be set again");
    let queue = &guest.queues[0];
    front_end.set_vring_num(0, u32::from(queue.ring().size())).expect("the size can be set");
    front_end.set_vring_base(0, 0).expect("the base can be set");
    front_end.set_vring_addr(&guest.ring_addresses(0)).expect("the addresses can be set");
    let kick = queue.kick_notifier().map(Notifier::back_end_fd);
    front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, kick).expect("the kick can be set");
    guest.enable(0).expect("the ring can be enabled");
    queue.ring().set_available_index(1000);
    driver.kick(0).expect("the device can be kicked");
    let errors = guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read");
    assert_eq!(errors, 1, "nobody hears that the ring is broken");
}

#[test]
fn reset_owner_leaves_a_connection_that_can_start_over() {
    // vhost-user, "RESET_OWNER": back ends either ignore it or disable all rings.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    must_work(&mut driver, 0);
    driver.guest.front_end.reset_owner().expect("the owner can be reset");
    driver.guest.front_end.set_owner().expect("there can be an owner again");
    restart(&mut driver);
}

/// Sets up the queue of `driver` once more over its connection, where it got to.
fn restart(driver: &mut frontend::block::BlockDriver) {
    let guest = &driver.guest;
    guest.front_end.set_features(guest.features).expect("features can be set again");
    guest.front_end.set_mem_table(guest.memory.regions()).expect("memory can be set again");
    let base = guest.queues[0].next_available();
    guest.start_queue(0, u32::from(base)).expect("the queue can be set up again");
    guest.enable(0).expect("the queue can be enabled again");
    must_work(driver, 0);
}

#[test]
fn memory_added_after_the_rings_is_used() {
    if !is_ours_to_promise() {
        return;
    }
    // As clients on libblkio do.
    let subject = Subject::start();
    let options = Options { memory_by: MemoryBy::RegionsAfterRings, ..Options::default() };
    must_work(&mut subject.driver(&options), 0);
}
