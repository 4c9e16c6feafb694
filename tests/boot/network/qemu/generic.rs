//! QEMU's device for back ends of any kind, as a network: control queue and configuration are the daemon's, and the driver is one
//! with several processors. It has one interrupt, and rings by its main loop.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::Duration;

use tests::{Capture, Echo, Iperf, Machine, Namespace, Packet, Rig};

use super::expect_all_queues;
use crate::network::bench::{BRIDGE, Bench, DATAGRAMS, FrontEnd, MAC_BYTES, is_from};
use crate::network::port::Port;
use crate::network::{FRAME_BYTES_MAX, PROGRAMS, TAP, scenes};
use crate::qemu::emulator::{Device, Emulator, OnRestart, QUEUE_COUNT, Version};

/// What VLANs are made of in the guest, in the order of their dependencies.
const VLAN_MODULES: [&str; 5] = ["llc", "stp", "garp", "mrp", "8021q"];
const ETHTOOL: &str = "sbin/ethtool";
const SOCAT: &str = "usr/bin/socat";
/// Datagrams that a kernel is given as one, and how many.
const SEGMENT_BYTES: usize = 1400;
const SEGMENTS: u8 = 30;
/// Time in which a datagram that was sent has long arrived.
const DATAGRAM_LIMIT: Duration = Duration::from_secs(20);
/// An EtherType for experiments (IEEE 802): the guest counts the frame and drops it.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Ethernet's shortest frame, without its checksum.
const FRAME_BYTES_MIN: usize = 60;

impl FrontEnd for Emulator {
    fn rig(&self) -> &Rig {
        self.rig()
    }

    fn queue_pairs(&self) -> u16 {
        self.processors()
    }

    fn echo_bytes(&self) -> u64 {
        32 << 20
    }

    fn boot(&self, port: &Port, words: &[&str]) -> Machine {
        let device = Device::NetworkAsItIs(port.socket(), self.queue_pairs());
        self.boot(&[device], &format!("check=dialogue {}", words.join(" ")), OnRestart::End)
    }

    fn finish(&self, machine: Machine) {
        crate::qemu::finish(machine);
    }
}

fn bench(options: &[&str]) -> Option<Bench> {
    let programs = [&PROGRAMS[..], &[ETHTOOL]].concat();
    Bench::new(Emulator::of(Version::New, &programs, &VLAN_MODULES)?, options)
}

#[test]
fn filter_follows_the_driver_and_the_link_the_tap() {
    let Some(mut bench) = bench(&[]) else { return };
    scenes::frames_for_others_are_not_received(&mut bench);
    scenes::link_follows_the_tap_amid_traffic(&mut bench);
    bench.finish();
}

#[test]
fn driver_s_commands_are_in_force() {
    let Some(mut bench) = bench(&[]) else { return };
    let (_echo, _iperf) = (Echo::serve(&bench.namespace), Iperf::serve(&bench.namespace));
    expect_pairs_to_be_switched(&mut bench);
    expect_offloads_to_be_switched(&mut bench);
    expect_vlans_to_be_filtered(&mut bench);
    bench.finish();
}

/// Linux before 6.2 knows nothing of it.
#[test]
fn datagrams_that_are_one_stay_one_between_kernels() {
    let Some(emulator) = Emulator::newest_with_network(&[SOCAT]) else { return };
    let Some(mut bench) = Bench::new(emulator, &[]) else { return };
    let Bench { guest, namespace, .. } = &mut bench;
    guest.do_line("serve");
    let capture = Capture::start(namespace, TAP, "udp");
    let receiver = namespace.run(|| UdpSocket::bind("10.0.0.1:9")).expect("the port is free");
    receiver.set_read_timeout(Some(DATAGRAM_LIMIT)).expect("a socket takes a time limit");
    guest.do_line(&format!("segments 10.0.0.1 9 {SEGMENT_BYTES} {SEGMENTS}"));
    let mut datagram = [0; 2 * SEGMENT_BYTES];
    for number in 0..SEGMENTS {
        let len = receiver.recv(&mut datagram).expect("it was sent");
        assert_eq!(datagram[..len], [number; SEGMENT_BYTES]);
    }
    expect_echo_of_segments(namespace);
    let frames = capture.stop();
    for out in [true, false] {
        let mut those = frames.iter().filter(|frame| is_from(frame, MAC_BYTES) == out);
        let whole = SEGMENT_BYTES * usize::from(SEGMENTS);
        assert!(those.any(|frame| frame.bytes().len() > whole), "out: {out}, {frames:?}");
    }
    bench.finish();
}

/// Gives the host's kernel datagrams as one, which the guest's echo service sends back.
fn expect_echo_of_segments(namespace: &Namespace) {
    let bytes: Vec<_> = (0..SEGMENTS).flat_map(|number| [number; SEGMENT_BYTES]).collect();
    let mut socat = namespace
        .tool("socat")
        .args(["-b", &bytes.len().to_string(), "-"])
        .arg(format!("UDP:10.0.0.2:7,setsockopt-int=17:103:{SEGMENT_BYTES}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nsenter can be run");
    let mut into = socat.stdin.take().expect("it was piped");
    into.write_all(&bytes).expect("it reads");
    let mut received = vec![0; bytes.len()];
    let mut from = socat.stdout.take().expect("it was piped");
    from.read_exact(&mut received).expect("all of it comes back");
    assert!(received == bytes, "other datagrams came back");
    drop(into);
    let status = socat.wait().expect("our own child can be waited for");
    assert!(status.success(), "socat ended with {status}");
}

/// VIRTIO 1.3, 5.1.6.5.6: frames come on those pairs only that the driver uses.
fn expect_pairs_to_be_switched(bench: &mut Bench) {
    let Bench { guest, port, .. } = bench;
    expect_all_queues(guest, port);
    guest.do_line("ethtool -L eth0 combined 1");
    let before = port.statistics().kind("receive", "requests");
    for processor in 0..QUEUE_COUNT {
        guest.load(&format!("10.0.0.1 --bytes 256K --affinity {processor} --reverse"));
    }
    let after = port.statistics().kind("receive", "requests");
    assert!(after[0] > before[0] && after[1..] == before[1..], "{before:?}, {after:?}");
    guest.do_line(&format!("ethtool -L eth0 combined {QUEUE_COUNT}"));
    expect_all_queues(guest, port);
}

/// VIRTIO 1.3, 5.1.6.5.8: the host cuts segments for the guest while that does without the offload.
fn expect_offloads_to_be_switched(bench: &mut Bench) {
    let Bench { guest, namespace, .. } = bench;
    for (switch, wants_large) in [("off", false), ("on", true)] {
        guest.do_line(&format!("ethtool -K eth0 rx-gro-hw {switch}"));
        let capture = Capture::start(namespace, TAP, "tcp src port 7");
        guest.do_line("echo 10.0.0.1 3 2097152");
        let frames = capture.stop();
        let has_large = frames.iter().any(|frame| frame.bytes().len() > FRAME_BYTES_MAX);
        assert_eq!(has_large, wants_large, "rx-gro-hw {switch}, of {} frames", frames.len());
    }
}

/// VIRTIO 1.3, 5.1.6.5.3: frames of those VLANs arrive that the driver has asked for.
fn expect_vlans_to_be_filtered(bench: &mut Bench) {
    const VLAN: u16 = 5;
    let capture = Capture::start(&bench.namespace, TAP, "");
    let add = [
        "ip link add link eth0 name eth0.5 type vlan id 5",
        "ip address add 10.0.5.2/24 dev eth0.5",
        "ip link set eth0.5 up",
        // Nobody is there; but it is asked for in that VLAN.
        "miss 10.0.5.3",
    ];
    let delete = ["ip link delete eth0.5"];
    let steps: [(&[&str], bool); 3] = [(&[], false), (&add, true), (&delete, false)];
    for (lines, is_wanted) in steps {
        lines.iter().for_each(|line| bench.guest.do_line(line));
        for vlan in [VLAN, VLAN + 1] {
            let before = bench.port.statistics();
            let received = bench.guest.show("statistics/rx_packets");
            send_tagged(&bench.namespace, vlan);
            let (passed, dropped) =
                if is_wanted && vlan == VLAN { (DATAGRAMS, 0) } else { (0, DATAGRAMS) };
            let drops = before.drops("unwanted_vlan") + dropped;
            let requests = before.requests("receive") + passed;
            bench.port.wait_for(|found| {
                found.drops("unwanted_vlan") == drops && found.requests("receive") == requests
            });
            assert_eq!(bench.guest.show("statistics/rx_packets"), received + passed, "{lines:?}");
        }
    }
    // The tap had all of them for the guest, each time.
    let frames = capture.stop();
    let packets = || frames.iter().filter_map(|frame| frame.packet().ok());
    for vlan in [VLAN, VLAN + 1] {
        let is_such =
            |packet: &Packet<'_>| packet.vlan == Some(vlan) && packet.destination == MAC_BYTES;
        assert_eq!(packets().filter(is_such).count() as u64, 3 * DATAGRAMS, "VLAN {vlan}");
    }
    assert!(packets().any(|packet| packet.vlan == Some(VLAN) && packet.source == MAC_BYTES));
}

/// Sends tagged frames to the guest out of the bridge.
fn send_tagged(namespace: &Namespace, vlan: u16) {
    let source = [2, 0, 0, 0, 0, 9];
    let tag = vlan.to_be_bytes();
    let mut frame = [&MAC_BYTES[..], &source, &[0x81, 0], &tag, &EXPERIMENT].concat();
    frame.resize(FRAME_BYTES_MIN, 0);
    let mut socat = namespace
        .tool("socat")
        // A frame is what it reads at a time.
        .args(["-u", "-b", &FRAME_BYTES_MIN.to_string(), "-", &format!("INTERFACE:{BRIDGE}")])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nsenter can be run");
    let mut into = socat.stdin.take().expect("it was piped");
    for _ in 0..DATAGRAMS {
        into.write_all(&frame).expect("it reads");
    }
    drop(into);
    let status = socat.wait().expect("our own child can be waited for");
    assert!(status.success(), "socat ended with {status}");
}
