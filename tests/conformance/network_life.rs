//! What vhost-user has for networks alone, the order in which their front ends speak, and the configuration space
//! (VIRTIO 1.3, 5.1.4).

use crate::aftermath::{Reaction, reaction};
use crate::network_frames::options;
use crate::subject::{GUEST_MAC, Subject, frame, is_another_program, must_carry};
use frontend::front_end::FrontEnd;
use frontend::guest::{Guest, Options};
use frontend::message::{
    VHOST_USER_NEED_REPLY_MASK, VHOST_USER_NET_SET_MTU, VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_RARP, VHOST_USER_SEND_RARP, VIRTIO_F_VERSION_1, words,
};
use frontend::net::{
    CONFIG_BYTES, Header, NetDriver, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use std::time::{Duration, Instant};

/// Protocol features that a network has, too.
fn networks_own() -> Options {
    let options = options();
    let own = VHOST_USER_PROTOCOL_F_MTU | VHOST_USER_PROTOCOL_F_RARP;
    Options { protocol_features: options.protocol_features | own, ..options }
}

#[test]
fn protocol_features_of_networks_are_offered_by_networks() {
    // That a disk offers neither, `offers` shows.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let offered = subject.connect().get_protocol_features().expect("they are told");
    assert_eq!(offered, networks_own().protocol_features);
}

#[test]
fn rings_may_be_enabled_before_features_are_accepted() {
    // As QEMU's `-netdev vhost-user` does, which enables and disables rings while its guest still boots.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    for enabled in [true, false] {
        let mut front_end = subject.connect();
        front_end.set_owner().expect("it is taken");
        let features = front_end.get_protocol_features().expect("they are told");
        front_end.set_protocol_features(features).expect("they are taken");
        for index in 0..2 {
            front_end.set_vring_enable(index, enabled).expect("a ring is enabled early");
        }
        let wire_of_it = front_end.into_wire();
        let mut guest = Guest::start_on(wire_of_it, &networks_own()).expect("the queues start");
        must_carry(&mut guest, &wire, "after it");
    }
}

#[test]
fn mtu_is_taken_if_it_can_be_one() {
    // vhost-user, "VHOST_USER_NET_SET_MTU": the answer says whether it is valid.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&networks_own());
    let say = |driver: &NetDriver, mtu: u64| {
        let front_end: &FrontEnd = &driver.guest.front_end;
        let request = (VHOST_USER_NET_SET_MTU, VHOST_USER_NEED_REPLY_MASK);
        reaction(front_end.wire(), request, &words(&[mtu]), &[])
    };
    for mtu in [68, 1280, 1500, 9000, 65_535] {
        assert_eq!(say(&driver, mtu), Reaction::Answered, "{mtu}");
    }
    for mtu in [0, 67, 65_536, 1 << 32 | 1500, u64::MAX] {
        assert_eq!(say(&driver, mtu), Reaction::Refused, "{mtu}");
    }
    must_carry(&mut driver.guest, &wire, "after it");
}

#[test]
fn announcement_over_a_stream_is_nobody_s_and_harmless() {
    // Who is behind it is no switch, which would learn from it. That a tap gets it, `network_offloads` shows.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&networks_own());
    for mac in [u64::from_le_bytes([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0]), 0, u64::MAX] {
        let request = (VHOST_USER_SEND_RARP, VHOST_USER_NEED_REPLY_MASK);
        let front_end = driver.guest.front_end.wire();
        assert_eq!(reaction(front_end, request, &words(&[mac]), &[]), Reaction::Answered);
        must_carry(&mut driver.guest, &wire, "after it");
    }
}

#[test]
fn configuration_space_says_what_the_operator_did_and_is_read_only() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&["--mtu", "1400", "--speed", "10000"]);
    let driver = subject.net_driver(&options());
    let front_end = &driver.guest.front_end;
    let read = || front_end.get_config(0, CONFIG_BYTES).expect("it can be read");
    let expected = [
        &GUEST_MAC[..],
        &1_u16.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &1400_u16.to_le_bytes(),
        &10_000_u32.to_le_bytes(),
        &[1],
    ];
    assert_eq!(read(), expected.concat());
    for offset in 0..CONFIG_BYTES {
        assert_eq!(
            front_end.get_config(offset as u32, 1).expect("a byte"),
            read()[offset..=offset]
        );
        front_end.set_config(offset as u32, &[1]).expect_err("it is read-only");
    }
    front_end.set_config(0, &[2; 6]).expect_err("an address is set by a command");
    assert_eq!(read(), expected.concat());
    assert_eq!(front_end.get_config(60, 100).expect("beyond its end"), [0; 100]);
}

#[test]
fn legacy_driver_may_write_its_address_where_it_has_no_command() {
    // VIRTIO 1.3, 5.1.4.3.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let without = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_CTRL_MAC_ADDR;
    let features = Options::default().features & !without;
    let driver = subject.net_driver(&Options { features, ..options() });
    let front_end = &driver.guest.front_end;
    front_end.set_config(0, &[2, 0, 0, 0, 0, 7]).expect("it may");
    assert_eq!(front_end.get_config(0, 6).expect("it can be read"), [2, 0, 0, 0, 0, 7]);
    front_end.set_config(0, &[2, 0, 0, 0, 0, 7, 0]).expect_err("the status is not the driver's");
    front_end.set_config(6, &[0]).expect_err("nor here");
}

#[test]
fn frame_longer_than_the_mtu_is_not_passed_on() {
    // VIRTIO 1.3, 5.1.4.1: the device MUST NOT pass received packets that exceed mtu, if MTU was negotiated.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&["--mtu", "1000"]);
    let wire = subject.wire().expect("it is a network");
    for (without, passes) in [(0, false), (VIRTIO_NET_F_MTU, true)] {
        let features = Options::default().features & !without;
        let mut driver = subject.net_driver(&Options { features, ..options() });
        for _ in 0..2 {
            driver.submit(0, &[], &[2000]);
        }
        driver.kick(0).expect("the device can be kicked");
        wire.send(&frame(1015, 1));
        wire.send(&frame(1014, 2));
        let first = driver.receive(0).expect("a frame comes").remove(0).bytes;
        assert_eq!(first.len() - 12, if passes { 1015 } else { 1014 });
        assert_eq!(crate::network_frames::drops(&subject, 0, "too_long"), 1);
    }
}

#[test]
fn only_mac_lets_no_other_source_out() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&["--only-mac"]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    assert_eq!(driver.guest.features & VIRTIO_NET_F_CTRL_MAC_ADDR, 0, "it is not offered");
    let mut spoofed = frame(100, 1);
    for at in 6..12 {
        spoofed[at] ^= 1;
        let header = Header::default().encode();
        let parts: [&[u8]; 2] = [&header, &spoofed];
        crate::network_frames::must_drop((&subject, &mut driver, &wire), &parts, "spoofed", "it");
        spoofed[at] ^= 1;
    }
}

#[test]
fn link_follows_the_wire() {
    // VIRTIO 1.3, 5.1.4: the status says whether the link is up.
    if is_another_program() {
        return;
    }
    let mut subject = Subject::network(&[]);
    let mut driver = subject.net_driver(&options());
    assert_ne!(driver.guest.features & VIRTIO_NET_F_STATUS, 0);
    assert_ne!(driver.guest.features & VIRTIO_NET_F_MRG_RXBUF, 0);
    let status = |driver: &NetDriver| driver.guest.front_end.get_config(6, 2).expect("it is told");
    assert_eq!(status(&driver), [1, 0]);
    subject.cut_wire();
    wait_until(|| status(&driver)[0] & 1 == 0);
    let before = crate::network_frames::drops(&subject, 1, "link_down");
    driver.send(1, &Header::default(), &frame(100, 1)).expect("a chain comes back");
    assert_eq!(crate::network_frames::drops(&subject, 1, "link_down"), before + 1);
    subject.mend_wire();
    wait_until(|| status(&driver)[0] & 1 != 0);
    // VIRTIO 1.3, 5.1.6.5.4: the driver is asked to announce itself where it is plugged in now.
    assert_ne!(driver.guest.features & VIRTIO_NET_F_GUEST_ANNOUNCE, 0);
    wait_until(|| status(&driver) == [3, 0]);
    let wire = subject.wire().expect("it is a network");
    must_carry(&mut driver.guest, &wire, "over the new wire");
}

/// Asks again and again: what changes without a notice is seen by nothing else.
#[track_caller]
fn wait_until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come about");
        std::thread::yield_now();
    }
}
