//! What any guest can be asked to do whose device is all ours: links that come and go, and frames for others.

use tests::{Capture, Echo, Frame, Namespace};

use super::TAP;
use super::bench::{BRIDGE, Bench, DATAGRAMS, MAC, MAC_BYTES, OTHER_MAC, is_from, send};
use crate::statistics::Statistics;

/// An EtherType.
const ARP: u16 = 0x0806;

/// The guest learns each change of its link, and announces itself wherever it is plugged in.
pub(super) fn link_follows_the_tap_amid_traffic(bench: &mut Bench) {
    let tap = bench.tap();
    let _echo = Echo::serve(&bench.namespace);
    bench.guest.do_line("await carrier 1");
    expect_return(
        bench,
        |namespace| namespace.ip(&format!("link set {TAP} down")),
        |namespace| namespace.ip(&format!("link set {TAP} up")),
    );
    // The daemon makes it a port of the bridge again: it was asked to.
    expect_return(
        bench,
        |namespace| namespace.ip(&format!("link delete {TAP}")),
        |namespace| namespace.add_tap(TAP, tap),
    );
}

/// The guest loses its link in the middle of its traffic, goes on with that when it has it again, and tells everybody where it is.
fn expect_return(
    bench: &mut Bench,
    plug_out: impl FnOnce(&Namespace),
    plug_in: impl FnOnce(&Namespace),
) {
    let echo_bytes = bench.echo_bytes();
    let Bench { guest, port, namespace, .. } = bench;
    let before = port.statistics();
    guest.do_line(&format!("begin-echo 10.0.0.1 5 {echo_bytes}"));
    port.wait_for(|found| found.bytes("transmit") > before.bytes("transmit") + (1 << 20));
    plug_out(namespace);
    // Its kernel has taken the interface out of use: what it sends is lost until it has noticed that the link is back.
    guest.do_line("await operstate down");
    let before = port.statistics().requests("control");
    let capture = Capture::start(namespace, BRIDGE, "arp");
    plug_in(namespace);
    guest.do_line("await operstate up");
    // Of the announcements, which its driver answers by a command each, the first may have come too soon.
    port.wait_for(|found| found.requests("control") >= before + 2);
    expect_gratuitous_arp(&capture.stop());
    guest.do_line("end-echo");
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

/// The guest receives what it wants to, under its address and for a while under another one.
pub(super) fn frames_for_others_are_not_received(bench: &mut Bench) {
    bench.namespace.ip(&format!("neighbor add 10.0.0.9 lladdr {OTHER_MAC} dev {BRIDGE}"));
    bench.namespace.ip(&format!("route add 224.0.0.0/4 dev {BRIDGE}"));
    bench.guest.do_line("ping 10.0.0.1 56");
    for (to, reason) in [("10.0.0.9:9", "unwanted_unicast"), ("239.1.2.3:9", "unwanted_multicast")]
    {
        send(&bench.namespace, to);
        bench.port.wait_for(|found| found.drops(reason) >= DATAGRAMS);
    }
    bench.expect_equal_counts();
    // The group of all hosts is in the guest's table.
    let before = bench.port.statistics().requests("receive");
    send(&bench.namespace, "224.0.0.1:9");
    bench.port.wait_for(|found| found.requests("receive") >= before + DATAGRAMS);
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
    bench.guest.do_line(&format!("ip link set eth0 address {MAC}"));
    bench.guest.do_line("ping 10.0.0.1 56");
    bench.expect_equal_counts();
}
