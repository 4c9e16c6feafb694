//! Headers by which a driver leaves work to a host that can do it: a tap in a network namespace of its own, on which all
//! offloads are negotiated. The wire is a socket that sees what the kernel takes from the tap.

use crate::network_frames::{drops, options};
use crate::subject::{Subject, frame, is_another_program};
use frontend::guest::Options;
use frontend::message::{VHOST_USER_PROTOCOL_F_RARP, VHOST_USER_SEND_RARP, words};
use frontend::net::{Header, NetDriver, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4};
use frontend::wire::PATIENCE;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use tests::{DaemonCommand, Namespace, Rig, Tap, temp_dir};

/// All protocols, in the byte order of the network (packet(7)).
const ETH_P_ALL: u32 = 3_u16.to_be() as u32;
/// An EtherType for experiments: nobody else's frames have it.
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
const ETHER_TYPE_RARP: [u8; 2] = [0x80, 0x35];

/// How often a daemon is killed whose tap the next one opens at once.
const KILLS: u32 = 20;

/// Sees the frames of one type that pass an interface of the namespace.
struct Sniffer(OwnedFd);

impl Sniffer {
    fn new(namespace: &Namespace) -> Self {
        let protocol = Protocol::from_raw(NonZeroU32::new(ETH_P_ALL).expect("it is 3"));
        let socket = namespace.run(|| {
            socket_with(
                AddressFamily::PACKET,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                Some(protocol),
            )
            .expect("root may see packets")
        });
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("it takes a timeout");
        Self(socket)
    }

    #[track_caller]
    fn receive(&self, ether_type: [u8; 2]) -> Vec<u8> {
        loop {
            let frame = self.receive_any();
            if frame.get(12..14) == Some(&ether_type) {
                return frame;
            }
        }
    }

    #[track_caller]
    fn receive_any(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let (len, _) = recv(&self.0, &mut frame[..], RecvFlags::empty())
            .unwrap_or_else(|error| panic!("no frame: {error}"));
        frame.truncate(len);
        frame
    }
}

/// A subject on a tap, and who sees its frames; `None`, and why on stderr, where there cannot be one.
fn on_a_tap(options: &[&str]) -> Option<(Namespace, Subject, Sniffer)> {
    if is_another_program() {
        return None;
    }
    let namespace = Namespace::new(&Rig::find()?)?;
    namespace.add_tap("tap0", Tap::SingleQueue);
    let sniffer = Sniffer::new(&namespace);
    let command = DaemonCommand::network("tap=tap0").through(namespace.launcher());
    let subject = Subject::of_network(temp_dir(), command, options);
    Some((namespace, subject, sniffer))
}

#[test]
fn every_field_of_a_header_that_cannot_be_is_counted_by_its_reason() {
    let Some((_namespace, subject, wire)) = on_a_tap(&[]) else { return };
    let mut driver = subject.net_driver(&options());
    let needed = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4;
    assert_eq!(driver.guest.features & needed, needed, "a tap has these");
    let sent = frame(3000, 1);
    let sum = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() };
    let tso = Header { gso_type: 1, gso_size: 1000, hdr_len: 54, ..sum };
    let wrong: [(Header, &str); 24] = [
        (Header { csum_start: 2983, ..sum }, "checksum_outside"),
        (Header { csum_start: 3000, ..sum }, "checksum_outside"),
        (Header { csum_start: 0xffff, ..sum }, "checksum_outside"),
        (Header { csum_offset: 2965, ..sum }, "checksum_outside"),
        (Header { csum_offset: 0xffff, ..sum }, "checksum_outside"),
        (Header { csum_start: 0xffff, csum_offset: 0xffff, ..sum }, "checksum_outside"),
        (Header { csum_start: 0, ..sum }, "checksum_in_ethernet"),
        (Header { csum_start: 6, csum_offset: 0, ..sum }, "checksum_in_ethernet"),
        (Header { csum_start: 13, ..sum }, "checksum_in_ethernet"),
        (Header { gso_type: 2, ..tso }, "gso_type"),
        (Header { gso_type: 6, ..tso }, "gso_type"),
        (Header { gso_type: 0x7f, ..tso }, "gso_type"),
        (Header { gso_type: 0x83, ..tso }, "gso_type"),
        (Header { gso_type: 0x85, ..tso }, "gso_type"),
        (Header { gso_type: 0xff, ..tso }, "gso_type"),
        (Header { gso_size: 0, ..tso }, "gso_size"),
        (Header { gso_size: 0, gso_type: 4, ..tso }, "gso_size"),
        (Header { flags: 0, ..tso }, "gso_checksum"),
        (Header { flags: 2, ..tso }, "gso_checksum"),
        (Header { flags: 0, gso_type: 0x81, ..tso }, "gso_checksum"),
        (Header { csum_offset: 6, ..tso }, "gso_header"),
        (Header { csum_offset: 0, ..tso }, "gso_header"),
        (Header { csum_start: 2981, ..tso }, "gso_header"),
        (Header { gso_type: 4, csum_start: 2982, ..tso }, "gso_header"),
    ];
    for (header, reason) in wrong {
        let before = drops(&subject, 1, reason);
        driver.send(1, &header, &sent).expect("a chain comes back");
        assert_eq!(drops(&subject, 1, reason), before + 1, "{header:?} is counted as {reason}");
        must_pass(&mut driver, &wire, &Header::default(), &frame(100, 2));
    }
    // At the edge. (Where a frame has no network header before its checksum, the kernel itself refuses it.)
    for header in [
        sum,
        Header { csum_start: 2982, ..sum },
        Header { csum_start: 54, csum_offset: 0, ..sum },
        Header { hdr_len: 0xffff, ..sum },
        Header { flags: 0xff, ..sum },
    ] {
        must_pass(&mut driver, &wire, &header, &sent);
    }
}

#[track_caller]
fn must_pass(driver: &mut NetDriver, wire: &Sniffer, header: &Header, sent: &[u8]) {
    driver.send(1, header, sent).expect("a chain comes back");
    let received = wire.receive(ETHER_TYPE);
    // The kernel fills in the checksum that was left to it, or leaves it to the next one.
    let at = usize::from(header.csum_start) + usize::from(header.csum_offset);
    let is_sum = |index| header.flags & 1 != 0 && (at..at + 2).contains(&index);
    let is_same = received.len() == sent.len()
        && (0..sent.len()).all(|index| received[index] == sent[index] || is_sum(index));
    assert!(is_same, "{header:?}: {:x?}…", &received[..32.min(received.len())]);
}

#[test]
fn guest_that_cannot_announce_itself_is_announced() {
    // vhost-user, "VHOST_USER_SEND_RARP".
    let Some((_namespace, subject, wire)) = on_a_tap(&[]) else { return };
    let options = options();
    let protocol_features = options.protocol_features | VHOST_USER_PROTOCOL_F_RARP;
    let driver = subject.net_driver(&Options { protocol_features, ..options });
    let mac = [0x52, 0x54, 0, 9, 8, 7];
    let payload = words(&[u64::from_le_bytes([0x52, 0x54, 0, 9, 8, 7, 0, 0])]);
    driver.guest.front_end.tell(VHOST_USER_SEND_RARP, &payload, &[]).expect("it is done");
    let announced = wire.receive(ETHER_TYPE_RARP);
    assert_eq!((&announced[..6], &announced[6..12]), (&[0xff; 6][..], &mac[..]));
    // RFC 903: "request reverse", of the guest by the guest.
    assert_eq!(announced[20..22], [0, 3]);
    assert_eq!((&announced[22..28], &announced[32..38]), (&mac[..], &mac[..]));
}

#[test]
fn tap_is_free_again_when_its_daemon_is_killed_amid_frames() {
    // The kernel goes on with what an io_uring instance holds after its process has ended: here, who waits for the tap.
    let Some((namespace, mut subject, _wire)) = on_a_tap(&[]) else { return };
    for _ in 0..KILLS {
        let mut driver = subject.net_driver(&options());
        driver.submit(0, &[], &[2000]);
        driver.kick(0).expect("the device can be kicked");
        driver.send(1, &Header::default(), &frame(1000, 1)).expect("a chain comes back");
        // Dropping it kills it.
        drop((driver, subject));
        let command = DaemonCommand::network("tap=tap0").through(namespace.launcher());
        subject = Subject::of_network(temp_dir(), command, &[]);
    }
}

#[test]
fn tag_of_the_port_s_vlan_is_on_the_wire_and_no_other_is() {
    let Some((_namespace, subject, wire)) = on_a_tap(&["--vlan", "7"]) else { return };
    let mut driver = subject.net_driver(&options());
    let mut own_tag = frame(100, 1);
    own_tag.splice(12..12, [0x81, 0, 0, 9]);
    let before = drops(&subject, 1, "vlan");
    driver.send(1, &Header::default(), &own_tag).expect("a chain comes back");
    assert_eq!(drops(&subject, 1, "vlan"), before + 1);
    let sent = frame(1000, 1);
    driver.send(1, &Header::default(), &sent).expect("a chain comes back");
    // The kernel has taken the tag out of the frame, or not: what is behind it is the same.
    let received = loop {
        let frame = wire.receive_any();
        if frame.len() >= 1000 {
            break frame;
        }
    };
    assert_eq!((&received[..12], &received[received.len() - 900..]), (&sent[..12], &sent[100..]));
}
