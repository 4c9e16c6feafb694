//! QEMU's machines on the network daemon. QEMU serves the control queue itself, gives the guest its address, and takes the
//! connection for the link: another front end than User-Mode Linux in all that. Its device for back ends of any kind does
//! nothing of the sort (`generic.rs`).

mod generic;

use serde_json::json;
use tests::{Capture, Echo, Frame, Iperf, Machine, Namespace, Tap};

use super::port::{Port, Wire};
use super::{PROGRAMS, TAP};
use crate::dialogue::Guest;
use crate::qemu::emulator::{Device, Emulator, Network, OnRestart, QUEUE_COUNT, Version};
use crate::qemu::finish;
use crate::statistics::Statistics;

const MAC: &str = "52:54:00:12:34:56";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// The EtherType of reverse ARP.
const RARP: u16 = 0x8035;
/// Long enough for a daemon to die and another one to come meanwhile.
const LONG_ECHO: &str = "begin-echo 10.0.0.1 5 33554432";
/// A pair for each of the machine's processors, and more than one thread to serve them.
const OPTIONS: [&str; 6] = ["--mac", MAC, "--queue-pairs", "4", "--threads", "2"];

fn boot(emulator: &Emulator, port: &Port, properties: &[&str], words: &str) -> Machine {
    let properties = [&["mac=52:54:00:12:34:56"], properties].concat();
    let network =
        Network { socket: port.socket(), queue_pairs: QUEUE_COUNT, properties: &properties };
    emulator.boot(&[Device::Network(network)], words, OnRestart::End)
}

#[test]
fn frames_on_the_wire_are_finished() {
    let Some(emulator) = Emulator::new(&PROGRAMS, &[]) else { return };
    let Some(wire) = Wire::lay(emulator.rig(), Tap::MultiQueue) else { return };
    let port = Port::open(Some(&wire.near), &format!("tap={TAP}"), &OPTIONS);
    let is_large = "not port 5201 and greater 1515 and ether src 52:54:00:12:34:56";
    let entering = Capture::start(&wire.near, TAP, is_large);
    let frames = super::expect_traffic(&wire.far, Wire::FAR, |words| {
        let words = format!("check=network mac={MAC} {}", words.join(" "));
        finish(boot(&emulator, &port, &[], &words))
    });
    super::expect_finished(&frames);
    assert!(!entering.stop().is_empty(), "the guest has cut all segments itself");
    port.expect_clean_end();
}

#[test]
fn every_queue_carries_traffic_and_daemons_come_and_go() {
    carries_traffic_while_daemons_come_and_go(Version::Usual);
}

#[test]
fn every_queue_carries_traffic_and_daemons_come_and_go_on_the_oldest() {
    carries_traffic_while_daemons_come_and_go(Version::Old);
}

#[test]
fn every_queue_carries_traffic_and_daemons_come_and_go_on_the_newest() {
    carries_traffic_while_daemons_come_and_go(Version::New);
}

/// A machine of this QEMU uses all its queues, is announced, and has data come back as it was sent over the death of a daemon.
fn carries_traffic_while_daemons_come_and_go(version: Version) {
    let Some(emulator) = Emulator::of(version, &PROGRAMS, &[]) else { return };
    let Some(namespace) = Namespace::new(emulator.rig()) else { return };
    super::without_ipv6(&namespace);
    namespace.add_tap(TAP, Tap::MultiQueue);
    namespace.add_address(TAP, "10.0.0.1/24");
    let backend = format!("tap={TAP}");
    let port = Port::open(Some(&namespace), &backend, &OPTIONS);
    // A guest that announces itself needs no announcement by others.
    let words = "check=dialogue address=10.0.0.2/24";
    let mut guest = Guest::meet(boot(&emulator, &port, &["guest_announce=off"], words));
    let (_echo, _iperf) = (Echo::serve(&namespace), Iperf::serve(&namespace));
    expect_all_queues(&mut guest, &port);

    let capture = Capture::start(&namespace, TAP, "");
    let times = json!({ "initial": 50, "max": 50, "step": 50, "rounds": 1 });
    emulator.command(&json!({ "execute": "announce-self", "arguments": times }));
    port.wait_for_log("the guest was announced");
    guest.do_line("ping 10.0.0.1 1472");
    expect_announcement(&capture.stop());

    let before = port.statistics();
    guest.do_line(LONG_ECHO);
    port.wait_for(|found| has_moved(found, Some(&before), 1 << 20));
    let port = port.restart(Some(&namespace), &backend, &OPTIONS, || {
        guest.do_line("await carrier 0");
    });
    guest.do_line("await carrier 1");
    port.wait_for(|found| has_moved(found, None, 1 << 20));
    guest.do_line("end-echo");
    expect_all_queues(&mut guest, &port);
    finish(guest.part());
    port.expect_clean_end();
}

/// Whether so much has gone each way since the daemon had counted `before`.
fn has_moved(found: &Statistics, before: Option<&Statistics>, len_bytes: u64) -> bool {
    ["transmit", "receive"].into_iter().all(|kind| {
        let before = before.map_or(0, |before| before.bytes(kind));
        found.bytes(kind) - before >= len_bytes
    })
}

/// Has each of the guest's processors send and receive, which each do over a queue pair of its own.
fn expect_all_queues(guest: &mut Guest, port: &Port) {
    for processor in 0..QUEUE_COUNT {
        for direction in ["", "--reverse"] {
            let options = format!("--bytes 1M --affinity {processor} {direction}");
            let found = guest.load(&format!("10.0.0.1 {options}"));
            assert!(found.received_bytes > 0, "{options}: {found:?}");
        }
    }
    let statistics = port.statistics();
    let bytes = |kind| statistics.kind(kind, "bytes");
    // Receive and transmit queues take turns; the control queue is last.
    let pairs = bytes("receive").into_iter().zip(bytes("transmit").into_iter().skip(1)).step_by(2);
    let pairs: Vec<_> = pairs.collect();
    assert_eq!(pairs.len(), usize::from(QUEUE_COUNT), "{statistics:?}");
    assert!(pairs.iter().all(|(into, out)| *into > 0 && *out > 0), "{pairs:?}");
}

/// Fails unless somebody has told for the guest where it is.
fn expect_announcement(frames: &[Frame]) {
    let tells = |frame: &Frame| {
        let packet = frame.packet();
        packet.is_ok_and(|found| found.ether_type == RARP && found.source == MAC_BYTES)
    };
    assert!(frames.iter().any(tells), "{frames:?}");
}
