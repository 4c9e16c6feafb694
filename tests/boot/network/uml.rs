//! User-Mode Linux guests on the network daemon. This kernel serves neither the control queue nor the configuration itself: all
//! of the device is ours.

mod congestion;
mod taps;

use tests::{Capture, Device, Frame, Iperf, Machine, Namespace, Passt, Rig, Tap, UserModeLinux};

use super::bench::{
    BRIDGE, Bench, DATAGRAMS, FrontEnd, MAC, MAC_BYTES, OTHER_MAC, bridged_namespace, is_from,
    open_port, send,
};
use super::port::{Port, Wire};
use super::{FRAME_BYTES_MAX, PINGS, TAP, rates, scenes};
use crate::dialogue::Guest;

const OTHER_MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x65, 0x43, 0x21];
/// Datagrams that have room in the receiving socket, whoever is slow: it counts the pages that they are in.
const UNLOSABLE: &str = "--udp --bytes 32K --bitrate 10M";

impl FrontEnd for UserModeLinux {
    fn rig(&self) -> &Rig {
        self.rig()
    }

    fn queue_pairs(&self) -> u16 {
        // One for each processor, of which it has one.
        1
    }

    fn echo_bytes(&self) -> u64 {
        128 << 20
    }

    fn boot(&self, port: &Port, words: &[&str]) -> Machine {
        self.boot(&[Device::Network(port.socket())], "dialogue", words)
    }

    fn finish(&self, machine: Machine) {
        Self::finish(machine);
    }
}

/// A guest on a tap, with these options of the daemon's.
fn bench(options: &[&str]) -> Option<Bench> {
    Bench::new(UserModeLinux::with_network(Rig::find()?), options)
}

/// Boots a guest with an interface for each port, of which the first has this address.
fn talk(guests: &UserModeLinux, ports: &[&Port], address: &str) -> Guest {
    let devices: Vec<_> = ports.iter().map(|port| Device::Network(port.socket())).collect();
    Guest::meet(guests.boot(&devices, "dialogue", &[&format!("address={address}")]))
}

#[test]
fn frames_pass_whole_where_both_ends_are_kernels() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = Namespace::new(&rig) else { return };
    namespace.add_tap(TAP, Tap::SingleQueue);
    let guests = UserModeLinux::with_network(rig);
    let port = Port::open(Some(&namespace), &format!("tap={TAP}"), &["--mac", MAC]);
    let frames = super::expect_traffic(&namespace, TAP, |words| {
        let mac = format!("mac={MAC}");
        guests.pass(&[Device::Network(port.socket())], "network", &[words, &[&*mac]].concat())
    });
    let is_large = |frame: &Frame| frame.bytes().len() > FRAME_BYTES_MAX;
    let (out, into): (Vec<_>, Vec<_>) =
        frames.iter().filter(|frame| is_large(frame)).partition(|frame| is_from(frame, MAC_BYTES));
    assert!(!out.is_empty() && !into.is_empty(), "{} out, {} in", out.len(), into.len());
    port.expect_clean_end();
}

#[test]
fn frames_on_the_wire_are_finished() {
    let Some(rig) = Rig::find() else { return };
    let Some(wire) = Wire::lay(&rig, Tap::SingleQueue) else { return };
    let guests = UserModeLinux::with_network(rig);
    let port = Port::open(Some(&wire.near), &format!("tap={TAP}"), &["--mac", MAC]);
    let entering = Capture::start(&wire.near, TAP, "not port 5201 and greater 1515");
    let frames = super::expect_traffic(&wire.far, Wire::FAR, |words| {
        guests.pass(&[Device::Network(port.socket())], "network", words)
    });
    super::expect_finished(&frames);
    let is_large = |frame: &Frame| frame.bytes().len() > FRAME_BYTES_MAX;
    let entered = entering.stop();
    assert!(entered.iter().any(|frame| is_large(frame) && is_from(frame, MAC_BYTES)));
    port.expect_clean_end();
}

#[test]
fn long_frames_are_counted_and_captured() {
    let directory = tests::temp_dir();
    let file = directory.path().join("frames.pcapng");
    let pcap = file.to_str().expect("a temporary directory has a plain name");
    let Some(mut bench) = bench(&["--mtu", "9000", "--pcap", pcap]) else { return };
    let _iperf = Iperf::serve(&bench.namespace);
    let guest = &mut bench.guest;
    assert_eq!(guest.show("mtu"), 9000);
    guest.do_line("ping 10.0.0.1 8972");
    for options in ["--bytes 16M", UNLOSABLE] {
        for direction in ["", "--reverse"] {
            let found = guest.load(&format!("10.0.0.1 {options} {direction}"));
            // iperf3 counts no more once the sender has said that it has sent all, with some still under way, and its sender
            // goes on until it is told that there is enough: its two counts are near each other. Those below are equal.
            assert!(found.received_bytes > 0, "{options} {direction}: {found:?}");
        }
    }
    bench.expect_equal_counts();
    let sources = [MAC_BYTES, bench.bridge_mac()];
    bench.finish();
    let captured = Capture::read(&Rig::find().expect("it was there"), &file);
    for source in sources {
        let long = captured.iter().filter(|frame| frame.bytes().len() == 8972 + 28 + 14);
        let count = long.filter(|frame| is_from(frame, source)).count();
        assert!(count >= 3, "{count} long frames from {source:x?}");
    }
}

#[test]
fn link_follows_the_tap_amid_traffic() {
    let Some(mut bench) = bench(&[]) else { return };
    scenes::link_follows_the_tap_amid_traffic(&mut bench);
    bench.finish();
}

#[test]
fn frames_for_others_are_not_received() {
    let Some(mut bench) = bench(&[]) else { return };
    scenes::frames_for_others_are_not_received(&mut bench);
    bench.finish();
}

#[test]
fn frames_from_another_address_are_dropped() {
    let Some(mut bench) = bench(&["--only-mac"]) else { return };
    let guest = &mut bench.guest;
    guest.do_line("ping 10.0.0.1 56");
    let capture = Capture::start(&bench.namespace, TAP, "");
    guest.do_line(&format!("ip link set eth0 address {OTHER_MAC}"));
    guest.do_line("miss 10.0.0.1");
    let statistics = bench.port.wait_for(|found| found.drops("spoofed") > 0);
    let frames = capture.stop();
    assert!(!frames.iter().any(|frame| is_from(frame, OTHER_MAC_BYTES)), "{statistics:?}");
    guest.do_line(&format!("ip link set eth0 address {MAC}"));
    guest.do_line("ping 10.0.0.1 56");
    bench.finish();
}

#[test]
fn limits_hold_in_the_guest() {
    let Some(mut bench) = bench(&[]) else { return };
    let _iperf = Iperf::serve(&bench.namespace);
    rates::measure(&mut bench.guest, "10.0.0.1", bench.port.control());
    bench.finish();
}

#[test]
fn guests_on_a_bridge_reach_each_other() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = bridged_namespace(&rig) else { return };
    let guests = [(); 2].map(|()| UserModeLinux::with_network(rig.clone()));
    let ports =
        [("tap0", MAC), ("tap1", OTHER_MAC)].map(|(tap, mac)| open_port(&namespace, tap, mac, &[]));
    converse(&guests, &ports);
    ports.into_iter().for_each(Port::expect_clean_end);
}

#[test]
fn ports_are_in_their_vlans() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = bridged_namespace(&rig) else { return };
    let guests = [(); 2].map(|()| UserModeLinux::with_network(rig.clone()));
    let port = |tap, mac, vlan| open_port(&namespace, tap, mac, &["--vlan", vlan]);
    let ports = [
        port("tap0", MAC, "7"),
        port("tap1", OTHER_MAC, "7"),
        port("tap2", "52:54:00:00:00:08", "8"),
    ];
    let capture = Capture::start(&namespace, TAP, "");
    let mut one = talk(&guests[0], &[&ports[0]], "10.0.0.2/24");
    let mut other = talk(&guests[1], &[&ports[1], &ports[2]], "10.0.0.3/24");
    one.do_line("serve");
    other.do_line("ping 10.0.0.2 65000");
    other.do_line("echo 10.0.0.2 2 4194304");

    // From another VLAN, and from none.
    one.do_line("ip address add 10.0.1.2/24 dev eth0");
    other.do_line("ip address add 10.0.1.3/24 dev eth1");
    other.do_line("ip link set eth1 up");
    let received = one.show("statistics/rx_packets");
    other.do_line("miss 10.0.1.2");
    let dropped = ports[0].wait_for(|found| found.drops("vlan") > 0).drops("vlan");
    namespace.ip(&format!("neighbor add 10.0.0.2 lladdr {MAC} dev {BRIDGE}"));
    send(&namespace, "10.0.0.2:7");
    ports[0].wait_for(|found| found.drops("vlan") >= dropped + DATAGRAMS);
    assert_eq!(one.show("statistics/rx_packets"), received);

    let frames = capture.stop();
    let vlans = frames.iter().map(|frame| frame.packet().expect("it is whole").vlan);
    for vlan in [Some(7), Some(8), None] {
        assert!(vlans.clone().any(|found| found == vlan), "nothing of VLAN {vlan:?} passed");
    }
    for frame in frames.iter().filter(|frame| is_from(frame, MAC_BYTES)) {
        assert_eq!(frame.packet().expect("it is whole").vlan, Some(7));
    }
    for guest in [one, other] {
        UserModeLinux::finish(guest.part());
    }
    ports.into_iter().for_each(Port::expect_clean_end);
}

#[test]
fn guests_reach_each_other_over_a_stream_socket() {
    let Some(rig) = Rig::find() else { return };
    let directory = tests::temp_dir();
    let backend = format!("socket={}", directory.path().join("stream").display());
    let ports = [(format!("{backend},server"), MAC), (backend, OTHER_MAC)]
        .map(|(backend, mac)| Port::open(None, &backend, &["--mac", mac]));
    let guests = [(); 2].map(|()| UserModeLinux::with_network(rig.clone()));
    converse(&guests, &ports);
    ports.into_iter().for_each(Port::expect_clean_end);
}

/// Has a guest on each port talk to the other.
fn converse(guests: &[UserModeLinux; 2], ports: &[Port; 2]) {
    let mut one = talk(&guests[0], &[&ports[0]], "10.0.0.2/24");
    let mut other = talk(&guests[1], &[&ports[1]], "10.0.0.3/24");
    one.do_line("serve");
    one.do_line("await carrier 1");
    for len_bytes in PINGS {
        other.do_line(&format!("ping 10.0.0.2 {len_bytes}"));
    }
    other.do_line("echo 10.0.0.2 1 8388608");
    for guest in [one, other] {
        UserModeLinux::finish(guest.part());
    }
}

#[test]
fn passt_comes_and_goes() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = Namespace::new(&rig) else { return };
    let passt = Passt::serve(&namespace);
    let guests = UserModeLinux::with_network(rig);
    let backend = format!("socket={}", passt.socket().display());
    let port = Port::open(Some(&namespace), &backend, &["--mac", MAC]);
    let router = Passt::ROUTER;
    let mut guest = talk(&guests, &[&port], &format!("{}/24", Passt::ADDRESS));
    let _iperf = Iperf::serve(&namespace);
    guest.do_line("await carrier 1");
    guest.do_line(&format!("ping {router} 1400"));
    // Out only: what a guest receives by TCP this passt spoils (tests/rig/README.md).
    let found = guest.load(&format!("{router} --bytes 4M"));
    assert!(found.received_bytes > 0, "{found:?}");
    let _passt = passt.restart(&namespace, || guest.do_line("await carrier 0"));
    guest.do_line("await carrier 1");
    guest.do_line(&format!("ping {router} 1400"));
    UserModeLinux::finish(guest.part());
    port.expect_clean_end();
}
