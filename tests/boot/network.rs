//! A guest's network, end to end: pings, data that is compared, load both ways, and what went over the interface meanwhile.
//!
//! What these tests stand on is shown to work without our daemon, too: DPDK's testpmd is a back end that moves frames between
//! a guest and a tap.

mod bench;
mod port;
mod qemu;
mod rates;
mod scenes;
mod testpmd;
mod uml;

use std::path::PathBuf;
use std::time::Duration;

use guest::throughput::Throughput;
use guest::verdict::word;
use tests::{Capture, Echo, Frame, Iperf, Machine, Namespace, TempDir, temp_dir};

/// The programs that the guest's check runs, where its initial RAM disk has them.
pub(crate) const PROGRAMS: [&str; 1] = ["usr/bin/iperf3"];
/// The interface of testpmd's other end.
pub(crate) const TAP: &str = "tap0";
/// A frame of the standard MTU: Ethernet's header is in front of it.
pub(crate) const FRAME_BYTES_MAX: usize = 1500 + 14;

/// Longer than any guest of its lives.
const TESTPMD_LIMIT: Duration = Duration::from_secs(240);
/// What testpmd says once front ends can connect.
const LISTENING: &str = "binding succeeded";
/// A capture does not keep up with iperf3, whose port this is.
const NOT_THE_LOAD: &str = "not port 5201";
const ECHO_BYTES: u64 = 8 << 20;
/// How much data pings have: from hardly any, over a full frame and one byte more, to nearly the longest packet.
pub(crate) const PINGS: [u32; 6] = [1, 56, 1472, 1473, 9000, 65_000];

/// Has a guest talk with a namespace by all means that the check "network" has, over this interface of the namespace. `pass`
/// boots it with these words for the check, and returns what it found. What comes back went over the interface, but for the
/// load.
pub(crate) fn expect_traffic(
    namespace: &Namespace,
    interface: &str,
    pass: impl FnOnce(&[&str]) -> String,
) -> Vec<Frame> {
    for address in ["10.0.0.1/24", "fd00::1/64"] {
        namespace.add_address(interface, address);
    }
    let _echo = Echo::serve(namespace);
    let _iperf = Iperf::serve(namespace);
    let capture = Capture::start(namespace, interface, NOT_THE_LOAD);
    let echo = format!("echo_bytes={ECHO_BYTES}");
    let pings = PINGS.map(|len_bytes| len_bytes.to_string()).join(",");
    let pings = format!("ping_bytes={pings}");
    let details = pass(&[
        "address=10.0.0.2/24,fd00::2/64",
        "peer=10.0.0.1",
        &pings,
        "seed=1",
        &echo,
        "load_seconds=1",
    ]);
    let frames = capture.stop();
    assert_eq!(word(&details, "echoed"), Some(&*ECHO_BYTES.to_string()), "{details}");
    for direction in ["out", "in"] {
        let throughput = word(&details, direction).and_then(Throughput::parse);
        assert!(throughput.is_some_and(|found| found.received_bytes > 0), "{details}");
    }
    let payload = |frame: &Frame| {
        let transport = frame.packet().ok().and_then(|packet| packet.transport);
        transport.map_or(0, |transport| transport.payload.len() as u64)
    };
    let carried: u64 = frames.iter().map(payload).sum();
    assert!(carried >= 2 * ECHO_BYTES, "{carried} bytes went over {interface}");
    frames
}

/// Fails if a frame is not as it would be on a cable: of the standard MTU at most, with its checksums.
pub(crate) fn expect_finished(frames: &[Frame]) {
    for frame in frames {
        let packet = frame.packet().unwrap_or_else(|error| panic!("{error}: {frame:?}"));
        assert!(!packet.has_bad_checksum(), "{packet:?}");
        assert!(frame.bytes().len() <= FRAME_BYTES_MAX, "{} bytes", frame.bytes().len());
    }
}

/// Has interfaces that are made from now on be silent but for what a test sends: IPv6 would talk of its own accord.
fn without_ipv6(namespace: &Namespace) {
    let path = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    namespace.run(|| std::fs::write(path, "1")).expect("root may write it");
}

/// DPDK's testpmd, between a front end and [`TAP`] of a namespace.
pub(crate) struct Testpmd {
    _process: Machine,
    directory: TempDir,
}

impl Testpmd {
    /// Starts it and waits until a front end can connect.
    pub(crate) fn start(namespace: &Namespace) -> Self {
        let directory = temp_dir();
        let mut command = namespace.tool("dpdk-testpmd");
        command
            // It would leave files in the system's.
            .env("RUNTIME_DIRECTORY", directory.path())
            // One processor polls; the other is left to the guest.
            .args(["--lcores", "0@0,1@0", "--no-huge", "-m", "256", "--no-pci", "--no-shconf"])
            .arg("--vdev")
            .arg(format!("net_vhost0,queues=1,iface={}/socket", directory.path().display()))
            .args(["--vdev", &format!("net_tap0,iface={TAP}"), "--"])
            .args(["--total-num-mbufs=8192", "--forward-mode=io", "--auto-start"])
            // It would wait for the front end.
            .arg("--disable-link-check");
        let mut process = Machine::start(command, TESTPMD_LIMIT);
        process.wait_for(LISTENING);
        namespace.ip(&format!("link set {TAP} up"));
        Self { _process: process, directory }
    }

    /// Where it is a back end.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}
