//! Explicit congestion notification (RFC 3168) between two guests: the segment that answers it may be as long as any other, where
//! each of the devices on its way takes it so (`VIRTIO_NET_F_HOST_ECN`, `VIRTIO_NET_F_GUEST_ECN`).

use tests::{Capture, Rig, UserModeLinux};

use super::{MAC, MAC_BYTES, OTHER_MAC, bridged_namespace, is_from, open_port, talk};
use crate::network::FRAME_BYTES_MAX;
use crate::network::port::Port;

/// A queue that loses frames, or says on them that it would have.
const MODULES: [&str; 1] = ["sch_netem"];
const PROGRAMS: [&str; 1] = ["sbin/tc"];
/// Segments that say that their sender has reduced its window (CWR).
const ANSWERS: &str = "tcp[13] & 0x80 != 0 and tcp[13] & 2 == 0";

#[test]
fn long_segments_answer_congestion() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = bridged_namespace(&rig) else { return };
    let guests =
        [(); 2].map(|()| UserModeLinux::with_network_and(rig.clone(), &MODULES, &PROGRAMS));
    let ports =
        [("tap0", MAC), ("tap1", OTHER_MAC)].map(|(tap, mac)| open_port(&namespace, tap, mac, &[]));
    let mut one = talk(&guests[0], &[&ports[0]], "10.0.0.2/24");
    let mut other = talk(&guests[1], &[&ports[1]], "10.0.0.3/24");
    let captures = ["tap0", "tap1"].map(|tap| Capture::start(&namespace, tap, ANSWERS));
    other.do_line("serve");
    one.do_line("set ipv4/tcp_ecn 1");
    // Nor is it done without notifications where the first segment is lost: that one bears none.
    one.do_line("set ipv4/tcp_ecn_fallback 0");
    one.do_line("tc qdisc add dev eth0 root netem loss 3% ecn");
    one.do_line("echo 10.0.0.3 1 33554432");
    // Out of one guest, and into the other.
    for (tap, capture) in captures.into_iter().enumerate() {
        let frames = capture.stop();
        let mut answers = frames.iter().filter(|frame| is_from(frame, MAC_BYTES));
        let is_long = answers.any(|frame| frame.bytes().len() > FRAME_BYTES_MAX);
        assert!(is_long, "none of {} answers is long on tap{tap}", frames.len());
    }
    for guest in [one, other] {
        UserModeLinux::finish(guest.part());
    }
    ports.into_iter().for_each(Port::expect_clean_end);
}
