//! DPDK's testpmd as a front end: a driver that polls, with a ring always full or empty, and nothing in common with Linux' own.
//!
//! What it counts, the daemon must count, and a tap: frames that went out to the last one, and those that came in but for what
//! lies in the ring.

use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::{Machine, Namespace, Rig, Tap, TempDir, temp_dir};

use super::TAP;
use super::port::Port;

/// Longer than any test runs.
const LIMIT: Duration = Duration::from_secs(120);
/// Frames that are to pass before a run ends: many times the ring.
const RUN_FRAMES: u64 = 20_000;
const RING_FRAMES: u64 = 256;
/// What the host sends: it has room in a ring.
const DATAGRAMS: u64 = 200;
/// Frames of Ethernet's least length, and of a usual MTU.
const LENGTHS: [u32; 2] = [64, 1500];

/// A running testpmd whose only port is a virtio device.
struct Testpmd {
    process: Machine,
    _directory: TempDir,
}

/// What its port has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    received: u64,
    sent: u64,
}

impl Testpmd {
    /// Connects to the daemon.
    fn connect(rig: &Rig, socket: &Path, is_mergeable: bool) -> Self {
        let directory = temp_dir();
        let testpmd = rig.tool("dpdk-testpmd");
        let mut command = Command::new("stdbuf");
        command
            // Else it would keep to itself what it has to say until it ends.
            .arg("--output=L")
            .arg(testpmd.get_program())
            // It would leave files in the system's.
            .env("RUNTIME_DIRECTORY", directory.path())
            // One processor polls; the other is left to the daemon.
            .args(["--lcores", "0@0,1@0", "--no-huge", "-m", "256", "--no-pci", "--no-shconf"])
            .arg("--vdev")
            .arg(format!(
                "net_virtio_user0,path={},queues=1,queue_size={RING_FRAMES},mrg_rxbuf={}",
                socket.display(),
                u8::from(is_mergeable)
            ))
            // What is in the ring when it starts to forward is forwarded, too.
            .args(["--", "--total-num-mbufs=8192", "--no-flush-rx", "--interactive"]);
        Self { process: Machine::start(command, LIMIT), _directory: directory }
    }

    /// Forwards in this mode until the host has seen enough, and says what the port has counted since it was connected.
    fn forward(&mut self, mode: &str, until: impl FnOnce()) -> Counters {
        self.process.type_line(&format!("set fwd {mode}"));
        self.process.type_line("start");
        until();
        self.process.type_line("stop");
        self.process.type_line("show port stats all");
        self.process.wait_for("NIC statistics");
        let [received, sent] = ["RX-packets:", "TX-packets:"].map(|name| {
            let line = self.process.wait_for(name);
            let number = line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
            number.unwrap_or_else(|| panic!("no number in {line:?}"))
        });
        Counters { received, sent }
    }

    fn quit(mut self) {
        self.process.type_line("quit");
        let status = self.process.wait();
        assert!(status.success(), "testpmd ended with {status}");
    }
}

/// Has a daemon without a network take and give frames of this length.
fn expect_equal_counts(rig: &Rig, len_bytes: u32, is_mergeable: bool) {
    let port = Port::open(None, &format!("null={len_bytes}"), &[]);
    let mut testpmd = Testpmd::connect(rig, port.socket(), is_mergeable);
    testpmd.process.type_line(&format!("set txpkts {len_bytes}"));
    let wait = |kind, before: u64| {
        port.wait_for(|found| found.requests(kind) >= before + RUN_FRAMES);
    };
    let out = testpmd.forward("txonly", || wait("transmit", 0));
    port.wait_for(|found| found.requests("transmit") == out.sent);
    let sent = port.statistics();
    assert_eq!(sent.bytes("transmit"), out.sent * u64::from(len_bytes), "{sent:?}");

    let into = testpmd.forward("rxonly", || wait("receive", sent.requests("receive")));
    let received = port.statistics().requests("receive");
    let left = received.checked_sub(into.received).expect("none is from nowhere");
    assert!(left <= 4 * RING_FRAMES, "{left} of {received} frames were not received");
    assert_eq!(into.sent, out.sent);

    // What comes in goes out.
    let both = testpmd.forward("io", || wait("transmit", out.sent));
    let statistics = port.wait_for(|found| found.requests("transmit") == both.sent);
    assert!(both.sent - out.sent <= both.received, "{both:?}, {into:?}, {statistics:?}");
    testpmd.quit();
    port.expect_clean_end();
}

#[test]
fn frames_are_counted_alike_with_buffers_that_merge() {
    let Some(rig) = Rig::find() else { return };
    for len_bytes in LENGTHS {
        expect_equal_counts(&rig, len_bytes, true);
    }
}

#[test]
fn frames_are_counted_alike_with_buffers_that_do_not_merge() {
    let Some(rig) = Rig::find() else { return };
    for len_bytes in LENGTHS {
        expect_equal_counts(&rig, len_bytes, false);
    }
}

#[test]
fn tap_counts_the_same_frames() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = Namespace::new(&rig) else { return };
    super::without_ipv6(&namespace);
    namespace.add_tap(TAP, Tap::SingleQueue);
    namespace.add_address(TAP, "10.0.0.1/24");
    namespace.ip(&format!("neighbor add 10.0.0.9 lladdr 52:54:00:65:43:21 dev {TAP}"));
    for is_mergeable in [true, false] {
        let port = Port::open(Some(&namespace), &format!("tap={TAP}"), &[]);
        let before = ["rx_packets", "tx_packets"].map(|name| tap_counter(&namespace, name));
        let mut testpmd = Testpmd::connect(&rig, port.socket(), is_mergeable);
        let socket = namespace.run(|| UdpSocket::bind("10.0.0.1:0")).expect("it has the address");
        // They come back by the way by which they went.
        testpmd.forward("io", || {
            for _ in 0..DATAGRAMS {
                socket.send_to(&[7; 1000], "10.0.0.9:9").expect("the tap is up");
            }
            port.wait_for(|found| found.requests("transmit") >= DATAGRAMS);
        });
        let found = port.statistics();
        assert_eq!(["receive", "transmit"].map(|kind| found.requests(kind)), [DATAGRAMS; 2]);
        for len_bytes in LENGTHS {
            testpmd.process.type_line(&format!("set txpkts {len_bytes}"));
            let before = port.statistics().requests("transmit");
            let out = testpmd.forward("txonly", || {
                port.wait_for(|found| found.requests("transmit") >= before + RUN_FRAMES);
            });
            port.wait_for(|found| found.requests("transmit") == out.sent);
        }
        let statistics = port.statistics();
        let after = ["rx_packets", "tx_packets"].map(|name| tap_counter(&namespace, name));
        assert_eq!(after[0] - before[0], statistics.requests("transmit"), "{statistics:?}");
        assert_eq!(after[1] - before[1], statistics.requests("receive"), "{statistics:?}");
        testpmd.quit();
        port.expect_clean_end();
    }
}

fn tap_counter(namespace: &Namespace, name: &str) -> u64 {
    let path = format!("/sys/class/net/{TAP}/statistics/{name}");
    let output = namespace.command("cat").arg(path).output().expect("cat is there");
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("a number")
}
