//! A guest whose network device is all ours, on a tap that the daemon makes the port of a bridge: whoever the front end is, it
//! leaves the control queue and the configuration space to the daemon.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use tests::{Frame, Machine, Namespace, Rig, Tap};

use super::TAP;
use super::port::Port;
use crate::dialogue::Guest;

/// The guest's address.
pub(super) const MAC: &str = "52:54:00:12:34:56";
pub(super) const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// An address that the guest was not given.
pub(super) const OTHER_MAC: &str = "52:54:00:65:43:21";
pub(super) const BRIDGE: &str = "br0";
/// What is sent in a row: fewer than a ring or a tap takes.
pub(super) const DATAGRAMS: u64 = 20;
/// Why a frame does not reach the guest that the tap has had for it.
const UNWANTED: [&str; 3] = ["unwanted_unicast", "unwanted_multicast", "unwanted_vlan"];
/// Time in which all that was sent has long arrived, and been counted.
const QUIET_LIMIT: Duration = Duration::from_secs(20);

/// Who boots guests.
pub(super) trait FrontEnd {
    fn rig(&self) -> &Rig;

    /// Queue pairs of the guest's device.
    fn queue_pairs(&self) -> u16;

    /// How much the guest sends, and gets back, while something happens: some seconds' worth.
    fn echo_bytes(&self) -> u64;

    /// Boots a guest in the dialogue, with an interface on this port and these words on its kernel's command line.
    fn boot(&self, port: &Port, words: &[&str]) -> Machine;

    /// Waits for the guest to pass its check and for its machine to end.
    fn finish(&self, machine: Machine);
}

/// A guest on a tap, and a bridge with the address 10.0.0.1.
pub(super) struct Bench {
    // The guest goes before its daemon, and the daemon before its network.
    pub(super) guest: Guest,
    pub(super) port: Port,
    pub(super) namespace: Namespace,
    front_end: Box<dyn FrontEnd>,
}

impl Bench {
    /// A guest in the dialogue, with the address 10.0.0.2, on a daemon with these options.
    pub(super) fn new(front_end: impl FrontEnd + 'static, options: &[&str]) -> Option<Self> {
        let front_end = Box::new(front_end);
        let namespace = bridged_namespace(front_end.rig())?;
        let pairs = front_end.queue_pairs().to_string();
        let options = [&["--queue-pairs", &pairs], options].concat();
        let port = open_port(&namespace, TAP, MAC, &options);
        let guest = Guest::meet(front_end.boot(&port, &["address=10.0.0.2/24"]));
        Some(Self { guest, port, namespace, front_end })
    }

    /// How the daemon opens its tap.
    pub(super) fn tap(&self) -> Tap {
        if self.front_end.queue_pairs() > 1 { Tap::MultiQueue } else { Tap::SingleQueue }
    }

    /// What takes a guest long enough for segments to be lost and sent again, when something happens meanwhile.
    pub(super) fn echo_bytes(&self) -> u64 {
        self.front_end.echo_bytes()
    }

    /// An attribute that the host's kernel has about an interface.
    fn attribute(&self, interface: &str, name: &str) -> String {
        let path = format!("/sys/class/net/{interface}/{name}");
        let output = self.namespace.command("cat").arg(&path).output().expect("cat is there");
        assert!(output.status.success(), "{path}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(super) fn bridge_mac(&self) -> [u8; 6] {
        let text = self.attribute(BRIDGE, "address");
        let bytes: Vec<_> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal"))
            .collect();
        bytes.try_into().expect("six bytes")
    }

    /// Fails unless the guest, the daemon and the tap come to count the same frames, and what each knows of their bytes.
    pub(super) fn expect_equal_counts(&mut self) {
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

    /// Fails unless the guest's driver has had no command refused.
    fn expect_obedience(&self) {
        let statistics = self.port.statistics();
        let refused: u64 = statistics.kind("control", "errors").iter().sum();
        assert_eq!(refused, 0, "{statistics:?}");
    }

    pub(super) fn finish(self) {
        self.expect_obedience();
        self.front_end.finish(self.guest.part());
        self.port.expect_clean_end();
    }
}

/// A namespace whose bridge has the address 10.0.0.1.
pub(super) fn bridged_namespace(rig: &Rig) -> Option<Namespace> {
    let namespace = Namespace::new(rig)?;
    super::without_ipv6(&namespace);
    namespace.add_bridge(BRIDGE, &[]);
    namespace.add_address(BRIDGE, "10.0.0.1/24");
    Some(namespace)
}

/// A daemon on a tap of that bridge.
pub(super) fn open_port(namespace: &Namespace, tap: &str, mac: &str, options: &[&str]) -> Port {
    let options = [&["--bridge", BRIDGE, "--mac", mac], options].concat();
    Port::open(Some(namespace), &format!("tap={tap}"), &options)
}

/// Sends datagrams from the host to an address.
pub(super) fn send(namespace: &Namespace, to: &str) {
    let socket = namespace.run(|| UdpSocket::bind("10.0.0.1:0")).expect("the address is there");
    for _ in 0..DATAGRAMS {
        socket.send_to(&[7; 100], to).expect("the bridge is up");
    }
}

pub(super) fn is_from(frame: &Frame, source: [u8; 6]) -> bool {
    frame.packet().is_ok_and(|packet| packet.source == source)
}
