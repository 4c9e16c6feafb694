//! Taps that whoever starts the daemon has opened, and macvtaps: neighbours on the network of another interface.

use std::fs::File;

use tests::{Capture, Device, Echo, Namespace, Rig, Tap, UserModeLinux};

use super::{MAC, MAC_BYTES, is_from, talk};
use crate::network::port::Port;
use crate::network::{FRAME_BYTES_MAX, PINGS, TAP, expect_traffic};

/// The interface that macvtaps are on, and the host's behind it.
const PARENT: &str = "wire0";
const FAR: &str = "eth0";

/// Where the daemon is and a host, with a wire between them. `None`: it cannot be had here, and it was said why.
fn lay_wire(rig: &Rig) -> Option<(Namespace, Namespace)> {
    let (near, far) = (Namespace::new(rig)?, Namespace::new(rig)?);
    near.add_veth(PARENT, &far, FAR);
    near.has_macvtaps(PARENT).then_some((near, far))
}

/// Has a guest talk with a namespace over this interface of it.
fn expect_guest_s_traffic(rig: Rig, port: &Port, far: &Namespace, interface: &str) {
    let guests = UserModeLinux::with_network(rig);
    let mac = format!("mac={MAC}");
    let frames = expect_traffic(far, interface, |words| {
        guests.pass(&[Device::Network(port.socket())], "network", &[words, &[&*mac]].concat())
    });
    for out in [true, false] {
        let mut those = frames.iter().filter(|frame| is_from(frame, MAC_BYTES) == out);
        assert!(those.any(|frame| frame.bytes().len() > FRAME_BYTES_MAX), "out: {out}");
    }
}

#[test]
fn tap_that_is_passed_carries_all() {
    let Some(rig) = Rig::find() else { return };
    let Some(namespace) = Namespace::new(&rig) else { return };
    namespace.add_tap(TAP, Tap::SingleQueue);
    let port = Port::pass(&namespace, namespace.open_tap(TAP), &["--mac", MAC]);
    expect_guest_s_traffic(rig, &port, &namespace, TAP);
    port.expect_clean_end();
}

#[test]
fn macvtap_that_is_passed_carries_all() {
    let Some(rig) = Rig::find() else { return };
    let Some((near, far)) = lay_wire(&rig) else { return };
    near.add_macvtap("macvtap0", PARENT);
    near.ip(&format!("link set macvtap0 address {MAC}"));
    // The kernel makes it; a container has another directory there.
    let node = format!("/dev/tap{}", near.index("macvtap0"));
    let queue = match File::options().read(true).write(true).open(&node) {
        Ok(queue) => queue,
        Err(error) => return tests::cannot_run(&format!("{node}: {error}")),
    };
    let port = Port::pass(&near, queue, &["--mac", MAC]);
    expect_guest_s_traffic(rig, &port, &far, FAR);
    port.expect_clean_end();
}

#[test]
fn macvtap_of_its_own_goes_and_comes_with_its_parent() {
    let Some(rig) = Rig::find() else { return };
    let Some((near, far)) = lay_wire(&rig) else { return };
    let guests = UserModeLinux::with_network(rig);
    let port = Port::open(Some(&near), &format!("macvtap={PARENT}"), &["--mac", MAC]);
    far.add_address(FAR, "10.0.0.1/24");
    let _echo = Echo::serve(&far);
    let mut guest = talk(&guests, &[&port], "10.0.0.2/24");
    guest.do_line("await carrier 1");
    for len_bytes in PINGS {
        guest.do_line(&format!("ping 10.0.0.1 {len_bytes}"));
    }
    let capture = Capture::start(&far, FAR, "tcp");
    guest.do_line("echo 10.0.0.1 1 8388608");
    let frames = capture.stop();
    for out in [true, false] {
        let mut those = frames.iter().filter(|frame| is_from(frame, MAC_BYTES) == out);
        assert!(those.any(|frame| frame.bytes().len() > FRAME_BYTES_MAX), "out: {out}");
    }

    far.ip(&format!("link set {FAR} down"));
    guest.do_line("await carrier 0");
    far.ip(&format!("link set {FAR} up"));
    guest.do_line("await carrier 1");
    guest.do_line("begin-echo 10.0.0.1 2 134217728");
    let before = port.statistics().bytes("receive");
    port.wait_for(|found| found.bytes("receive") > before + (4 << 20));
    near.ip(&format!("link delete {PARENT}"));
    guest.do_line("await carrier 0");
    near.add_veth(PARENT, &far, FAR);
    far.add_address(FAR, "10.0.0.1/24");
    guest.do_line("await carrier 1");
    guest.do_line("end-echo");
    UserModeLinux::finish(guest.part());
    port.expect_clean_end();
}
