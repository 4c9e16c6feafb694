//! The control queue of a network device (VIRTIO 1.3, 5.1.6.5): commands that are good are in force when they are
//! answered, and all others are answered with an error and change nothing.

use crate::network_frames::{drops, options};
use crate::subject::{CONTROL_QUEUE, GUEST_MAC, Subject, frame, is_another_program, must_carry};
use crate::wire::Wire;
use frontend::guest::Options;
use frontend::net::{NetDriver, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_OK};
use frontend::wire::PATIENCE;
use tests::{DaemonCommand, temp_dir};

pub(crate) const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];
const GROUP_MAC: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

pub(crate) fn command(driver: &mut NetDriver, bytes: &[u8]) -> u8 {
    driver.command(CONTROL_QUEUE, &[bytes]).expect("a command is answered")
}

/// Two tables of addresses.
pub(crate) fn mac_table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    for table in [unicast, multicast] {
        bytes.extend(u32::try_from(table.len()).expect("few addresses").to_le_bytes());
        bytes.extend(table.concat());
    }
    bytes
}

/// Whether a frame to `to` reaches the guest: one to everybody, behind it, tells of one that does not.
pub(crate) fn is_received(driver: &mut NetDriver, wire: &Wire, to: [u8; 6], tag: &[u8]) -> bool {
    let mut sent = [&to[..], &[2, 0, 0, 0, 0, 9], tag, &[0x88, 0xb5]].concat();
    sent.resize(200, 0x77);
    let last = frame(300, 1);
    for _ in 0..2 {
        driver.submit(0, &[], &[2000]);
    }
    driver.kick(0).expect("the device can be kicked");
    wire.send(&sent);
    wire.send(&last);
    let mut first = driver.receive(0).expect("a frame comes").remove(0).bytes.split_off(12);
    let is_received = first == sent;
    if is_received {
        first = driver.receive(0).expect("a frame comes").remove(0).bytes.split_off(12);
    } else {
        wire.send(&last);
        driver.receive(0).expect("the buffer that is left is used");
    }
    assert!(first == last, "the guest receives another frame");
    is_received
}

#[test]
fn commands_that_cannot_be_are_answered_with_an_error() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let [class, table] = [vec![0, 0, 1], mac_table(&[OTHER_MAC], &[GROUP_MAC])];
    let short = [&class, &table].into_iter().flat_map(|good| {
        (1..good.len()).map(|len| good[..len].to_vec()).chain([[&good[..], &[0]].concat()])
    });
    let unknown = (0..=255).flat_map(|class| match class {
        0 => vec![vec![0, 6, 1], vec![0, 255, 1]],
        1 => vec![vec![1, 2], vec![1, 255, 0, 0, 0, 0, 0, 0]],
        2 => vec![vec![2, 2, 0, 0]],
        3 => vec![vec![3, 1], vec![3, 0, 0]],
        // Neither one pair nor a back end without offloads has these.
        4 => vec![vec![4, 0, 1, 0], vec![4, 1, 0, 0], vec![4, 2, 0, 0]],
        5 => vec![vec![5, 0, 0, 0, 0, 0, 0, 0, 0, 0]],
        class => vec![vec![class, 0], vec![class, 1, 1]],
    });
    let values = [
        vec![0, 0, 2],
        vec![0, 0, 255],
        vec![2, 0, 0, 0x10],
        vec![2, 0, 0xff, 0xff],
        [&[1, 1][..], &GROUP_MAC].concat(),
        [&[1, 1][..], &[0; 6]].concat(),
        [&[1, 1][..], &[0xff; 6]].concat(),
        [&[1, 1][..], &OTHER_MAC[..5]].concat(),
        mac_table(&[GROUP_MAC], &[]),
        mac_table(&[], &[OTHER_MAC]),
    ];
    // Tables that say more than there is, or than there can be.
    let counts = [2_u32, 1 << 16, 1 << 31, u32::MAX, u32::MAX / 6 + 1]
        .map(|count| [&[1, 0][..], &count.to_le_bytes(), &OTHER_MAC, &[0; 4]].concat());
    let long = [mac_table(&vec![OTHER_MAC; 10_930], &[]), vec![0; 1 << 20]];
    let mut refused = 0;
    for bytes in short.chain(unknown).chain(values).chain(counts).chain(long) {
        let what = format!("{:x?}…, {} bytes", &bytes[..bytes.len().min(16)], bytes.len());
        assert_eq!(command(&mut driver, &bytes), VIRTIO_NET_ERR, "{what}");
        refused += 1;
    }
    assert!(refused > 500, "{refused} commands");
    must_carry(&mut driver.guest, &wire, "after all of them");
    assert!(
        is_received(&mut driver, &wire, OTHER_MAC, &[]),
        "a command that failed has changed it"
    );
}

#[test]
fn command_may_be_in_any_pieces() {
    // VIRTIO 1.3, 2.7.4.1: no assumptions about the arrangement of descriptors.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let mut driver = subject.net_driver(&options());
    let good = mac_table(&[OTHER_MAC], &[GROUP_MAC]);
    for size in [1, 2, 3, good.len()] {
        let pieces: Vec<&[u8]> = good.chunks(size).collect();
        let ack = driver.command(CONTROL_QUEUE, &pieces).expect("a command is answered");
        assert_eq!(ack, VIRTIO_NET_OK, "pieces of {size} bytes");
    }
}

#[test]
fn command_without_room_for_its_answer_breaks_that_ring_alone() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    driver.submit(CONTROL_QUEUE, &[&[0, 0, 0]], &[]);
    driver.kick(CONTROL_QUEUE).expect("the device can be kicked");
    let told = driver.guest.errs[usize::from(CONTROL_QUEUE)].wait(PATIENCE);
    assert!(told.is_ok_and(|told| told > 0), "the ring is not broken");
    must_carry(&mut driver.guest, &wire, "beside it");
    assert!(is_received(&mut driver, &wire, OTHER_MAC, &[]), "it was carried out");
    drop(driver);
    subject.must_serve_the_next();
}

#[test]
fn filter_is_in_force_when_its_command_is_answered() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    // (command, whether frames to the guest, another, a group come after it)
    let steps: [(Vec<u8>, [bool; 3]); 9] = [
        (vec![0, 0, 0], [true, false, false]),
        (vec![0, 1, 1], [true, false, true]),
        (vec![0, 3, 1], [true, false, false]),
        (vec![0, 0, 1], [true, true, true]),
        (vec![0, 0, 0], [true, false, false]),
        (vec![0, 3, 0], [true, false, true]),
        (vec![0, 1, 0], [true, false, false]),
        (mac_table(&[OTHER_MAC], &[GROUP_MAC]), [true, true, true]),
        (vec![0, 4, 1], [false, false, true]),
    ];
    for (bytes, expected) in steps {
        assert_eq!(command(&mut driver, &bytes), VIRTIO_NET_OK, "{bytes:x?}");
        let received =
            [GUEST_MAC, OTHER_MAC, GROUP_MAC].map(|to| is_received(&mut driver, &wire, to, &[]));
        assert_eq!(received, expected, "after {bytes:x?}");
    }
    assert_eq!(drops(&subject, 0, "unwanted_multicast"), 4);
    // A reset forgets all of it.
    driver.guest.front_end.reset_device().expect("the device is reset");
    drop(driver);
    let mut driver = subject.net_driver(&options());
    assert!(is_received(&mut driver, &wire, OTHER_MAC, &[]));
}

#[test]
fn vlans_are_received_that_are_in_the_table() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let tag = |vlan: u16| [&[0x81, 0][..], &vlan.to_be_bytes()].concat();
    for (bytes, expected) in
        [(None, false), (Some([2, 0, 9, 0]), true), (Some([2, 1, 9, 0]), false)]
    {
        if let Some(bytes) = bytes {
            assert_eq!(command(&mut driver, &bytes), VIRTIO_NET_OK);
        }
        assert_eq!(is_received(&mut driver, &wire, GUEST_MAC, &tag(9)), expected, "{bytes:?}");
        assert!(is_received(&mut driver, &wire, GUEST_MAC, &[]), "a frame without a tag");
    }
    // VIRTIO 1.3, 5.1.6.5.3.1: without the feature, all of them.
    let features = Options::default().features & !VIRTIO_NET_F_CTRL_VQ;
    drop(driver);
    let mut driver = subject.net_driver(&Options { features, queue_count: 2, ..options() });
    assert!(is_received(&mut driver, &wire, GUEST_MAC, &tag(9)));
}

#[test]
fn address_is_changed_before_the_command_is_answered() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let read =
        |driver: &NetDriver| driver.guest.front_end.get_config(0, 6).expect("it can be read");
    assert_eq!(read(&driver), GUEST_MAC);
    assert_eq!(command(&mut driver, &[0, 0, 0]), VIRTIO_NET_OK);
    assert_eq!(command(&mut driver, &[&[1, 1][..], &OTHER_MAC].concat()), VIRTIO_NET_OK);
    assert_eq!(read(&driver), OTHER_MAC);
    assert!(is_received(&mut driver, &wire, OTHER_MAC, &[]));
    assert!(!is_received(&mut driver, &wire, GUEST_MAC, &[]));
}

#[test]
fn pairs_beyond_those_in_use_receive_nothing() {
    // VIRTIO 1.3, 5.1.6.5.6.2. The back end makes frames without end, for every pair.
    if is_another_program() {
        return;
    }
    let command_line = DaemonCommand::network("null=100");
    let subject = Subject::of_network(temp_dir(), command_line, &["--queue-pairs", "2"]);
    let control = 4;
    let mut driver = subject.net_driver(&Options { queue_count: control + 1, ..options() });
    for queue in [0, 2] {
        driver.submit(queue, &[], &[1526]);
        driver.kick(queue).expect("the device can be kicked");
    }
    driver.receive(0).expect("a frame comes");
    for pairs in [0, 3, 0xffff_u16] {
        let bytes = [&[4, 0][..], &pairs.to_le_bytes()].concat();
        let ack = driver.command(control, &[&bytes]).expect("a command is answered");
        assert_eq!(ack, VIRTIO_NET_ERR, "{pairs} pairs");
    }
    // The worker has looked at both rings before it answered.
    assert_eq!(driver.guest.queues[2].ring().used_index(), 0, "the other pair gets a frame");
    let ack = driver.command(control, &[&[4, 0, 2, 0]]).expect("a command is answered");
    assert_eq!(ack, VIRTIO_NET_OK);
    driver.receive(2).expect("a frame comes without another kick");
    let ack = driver.command(control, &[&[4, 0, 1, 0]]).expect("a command is answered");
    assert_eq!(ack, VIRTIO_NET_OK);
    driver.submit(2, &[], &[1526]);
    driver.kick(2).expect("the device can be kicked");
    driver.submit(0, &[], &[1526]);
    driver.kick(0).expect("the device can be kicked");
    driver.receive(0).expect("a frame comes");
    let base = driver.guest.front_end.get_vring_base(2).expect("the ring can be stopped");
    assert_eq!(base, 1, "the other pair gets a frame");
}
