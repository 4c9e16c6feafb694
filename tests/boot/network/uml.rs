//! User-Mode Linux guests on the network daemon. This kernel serves neither the control queue nor the configuration itself: all
//! of the device is ours.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use tests::{Capture, Device, Echo, Frame, Iperf, Namespace, Passt, Rig, Tap, UserModeLinux};

use super::port::{Port, Wire};
use super::{FRAME_BYTES_MAX, PINGS, TAP, rates};
use crate::dialogue::Guest;
use crate::statistics::Statistics;

/// The guest's address.
const MAC: &str = "52:54:00:12:34:56";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// An address that the guest was not given.
const OTHER_MAC: &str = "52:54:00:65:43:21";
const OTHER_MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x65, 0x43, 0x21];
/// Why a frame does not reach the guest that the tap has had for it.
const UNWANTED: [&str; 2] = ["unwanted_unicast", "unwanted_multicast"];
/// An EtherType.
const ARP: u16 = 0x0806;
const BRIDGE: &str = "br0";
/// Long enough for segments to be lost and sent again, when something happens meanwhile.
const LONG_ECHO: &str = "begin-echo 10.0.0.1 5 268435456";
/// Datagrams that have room in the receiving socket, whoever is slow: it counts the pages that they are in.
const UNLOSABLE: &str = "--udp --bytes 32K --bitrate 10M";
/// Time in which all that was sent has long arrived, and been counted.
const QUIET_LIMIT: Duration = Duration::from_secs(20);
/// What is sent in a row: fewer than a ring or a tap takes.
const DATAGRAMS: u64 = 20;

/// A guest on a tap, which the daemon makes, and a bridge with the address 10.0.0.1.
struct Bench {
    // The guest goes before its daemon, and the daemon before its network.
    guest: Guest,
    port: Port,
    namespace: Namespace,
    _guests: UserModeLinux,
}

impl Bench {
    /// A guest in the dialogue, with the address 10.0.0.2, on a daemon with these options.
    fn new(options: &[&str]) -> Option<Self> {
        let guests = UserModeLinux::with_network(Rig::find()?);
        let namespace = bridged_namespace(guests.rig())?;
        let port = open_port(&namespace, TAP, MAC, options);
        let guest = talk(&guests, &[&port], "10.0.0.2/24");
        Some(Self { guest, port, namespace, _guests: guests })
    }

    /// An attribute that the host's kernel has about an interface.
    fn attribute(&self, interface: &str, name: &str) -> String {
        let path = format!("/sys/class/net/{interface}/{name}");
        let output = self.namespace.command("cat").arg(&path).output().expect("cat is there");
        assert!(output.status.success(), "{path}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn bridge_mac(&self) -> [u8; 6] {
        let text = self.attribute(BRIDGE, "address");
        let bytes: Vec<_> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal"))
            .collect();
        bytes.try_into().expect("six bytes")
    }

    /// Fails unless the guest, the daemon and the tap come to count the same frames, and what each knows of their bytes.
    fn expect_equal_counts(&mut self) {
        let deadline = Instant::now() + QUIET_LIMIT;
        loop {
            let guest = ["tx_packets", "rx_packets", "tx_bytes", "rx_bytes"]
                .map(|name| self.guest.show(&format!("statistics/{name}")));
            let statistics = self.port.statistics();
            let [(out, out_bytes), (into, in_bytes)] = ["transmit", "receive"]
                .map(|kind| (statistics.requests(kind), statistics.bytes(kind)));
            let daemon = [out, into, out_bytes, in_bytes];
            // What goes into the guest leaves the tap; not all that leaves the tap goes into the guest.
            let unwanted = UNWANTED.iter().map(|reason| statistics.drops(reason)).sum::<u64>();
            let tap = ["rx_packets", "tx_packets", "rx_bytes"].map(|name| {
                let count = self.attribute(TAP, &format!("statistics/{name}"));
                count.parse::<u64>().expect("a number")
            });
            if guest == daemon && tap == [out, into + unwanted, out_bytes] {
                return;
            }
            let late = Instant::now() > deadline;
            assert!(!late, "guest {guest:?}, daemon {daemon:?} {unwanted}, tap {tap:?}");
        }
    }

    fn finish(self) {
        UserModeLinux::finish(self.guest.part());
        self.port.expect_clean_end();
    }
}

/// Sends datagrams from the host to an address.
fn send(namespace: &Namespace, to: &str) {
    let socket = namespace.run(|| UdpSocket::bind("10.0.0.1:0")).expect("the address is there");
    for _ in 0..DATAGRAMS {
        socket.send_to(&[7; 100], to).expect("the bridge is up");
    }
}

/// A namespace whose bridge has the address 10.0.0.1.
fn bridged_namespace(rig: &Rig) -> Option<Namespace> {
    let namespace = Namespace::new(rig)?;
    super::without_ipv6(&namespace);
    namespace.add_bridge(BRIDGE, &[]);
    namespace.add_address(BRIDGE, "10.0.0.1/24");
    Some(namespace)
}

/// A daemon on a tap of that bridge.
fn open_port(namespace: &Namespace, tap: &str, mac: &str, options: &[&str]) -> Port {
    let options = [&["--bridge", BRIDGE, "--mac", mac], options].concat();
    Port::open(Some(namespace), &format!("tap={tap}"), &options)
}

/// Boots a guest with an interface for each port, of which the first has this address.
fn talk(guests: &UserModeLinux, ports: &[&Port], address: &str) -> Guest {
    let devices: Vec<_> = ports.iter().map(|port| Device::Network(port.socket())).collect();
    Guest::meet(guests.boot(&devices, "dialogue", &[&format!("address={address}")]))
}

fn is_from(frame: &Frame, source: [u8; 6]) -> bool {
    frame.packet().is_ok_and(|packet| packet.source == source)
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
    let Some(mut bench) = Bench::new(&["--mtu", "9000", "--pcap", pcap]) else { return };
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
    let Some(mut bench) = Bench::new(&[]) else { return };
    let Bench { guest, port, namespace, .. } = &mut bench;
    let _echo = Echo::serve(namespace);
    guest.do_line("await carrier 1");
    guest.do_line(LONG_ECHO);
    let began = port.wait_for(|found| found.bytes("transmit") > 1 << 20).bytes("transmit");
    namespace.ip(&format!("link set {TAP} down"));
    guest.do_line("await carrier 0");
    let capture = Capture::start(namespace, BRIDGE, "arp");
    namespace.ip(&format!("link set {TAP} up"));
    guest.do_line("await carrier 1");
    port.wait_for(|found| found.bytes("transmit") > began + (4 << 20));
    expect_gratuitous_arp(&capture.stop());

    namespace.ip(&format!("link delete {TAP}"));
    guest.do_line("await carrier 0");
    let before = port.statistics().bytes("transmit");
    let capture = Capture::start(namespace, BRIDGE, "arp");
    namespace.add_tap(TAP, Tap::SingleQueue);
    guest.do_line("await carrier 1");
    port.wait_for(|found| found.bytes("transmit") > before + (4 << 20));
    // The daemon has made it a port of the bridge again: it was asked to.
    expect_gratuitous_arp(&capture.stop());
    guest.do_line("end-echo");
    bench.finish();
}

/// Fails unless the guest has told everybody where its address is.
fn expect_gratuitous_arp(frames: &[Frame]) {
    let tells = |frame: &Frame| {
        let bytes = frame.bytes();
        // RFC 5227, 1.2.1: the sender's address (at byte 28) is also the target's.
        is_from(frame, MAC_BYTES)
            && frame.packet().is_ok_and(|packet| packet.ether_type == ARP)
            && bytes[28..32] == [10, 0, 0, 2]
            && bytes[38..42] == [10, 0, 0, 2]
    };
    assert!(frames.iter().any(tells), "{frames:?}");
}

#[test]
fn frames_from_another_address_are_dropped() {
    let Some(mut bench) = Bench::new(&["--only-mac"]) else { return };
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
fn frames_for_others_are_not_received() {
    let Some(mut bench) = Bench::new(&[]) else { return };
    bench.namespace.ip(&format!("neighbor add 10.0.0.9 lladdr {OTHER_MAC} dev {BRIDGE}"));
    bench.namespace.ip(&format!("route add 239.0.0.0/8 dev {BRIDGE}"));
    bench.guest.do_line("ping 10.0.0.1 56");
    for (to, reason) in [("10.0.0.9:9", "unwanted_unicast"), ("239.1.2.3:9", "unwanted_multicast")]
    {
        send(&bench.namespace, to);
        bench.port.wait_for(|found| found.drops(reason) >= DATAGRAMS);
    }
    bench.expect_equal_counts();
    // Then the guest wants them all, and then, under its new address, those for it.
    for line in ["promisc on", "promisc off", &format!("address {OTHER_MAC}")] {
        bench.guest.do_line(&format!("ip link set eth0 {line}"));
        let wants = line != "promisc off";
        let before = bench.port.statistics();
        send(&bench.namespace, "10.0.0.9:9");
        let what = |found: &Statistics| {
            if wants { found.requests("receive") } else { found.drops("unwanted_unicast") }
        };
        let after = bench.port.wait_for(|found| what(found) >= what(&before) + DATAGRAMS);
        let unwanted = after.drops("unwanted_unicast") - before.drops("unwanted_unicast");
        assert_eq!(unwanted, if wants { 0 } else { DATAGRAMS }, "{line}: {after:?}");
    }
    bench.guest.do_line("ping 10.0.0.1 56");
    bench.expect_equal_counts();
    bench.finish();
}

#[test]
fn limits_hold_in_the_guest() {
    let Some(mut bench) = Bench::new(&[]) else { return };
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
