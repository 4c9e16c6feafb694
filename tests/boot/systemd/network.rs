//! The network device's units: a tap that is made for an instance, and one that its account may open without any right.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use tests::{Device, Rig, UserModeLinux};

use super::{
    Capabilities, INSIDE, JournalOnPanic, assert_counts_requests, assert_is_confined,
    assert_opens_its_device_only, configure, install, outside_with_the_rig, pass_with, run, show,
    starts_when_a_vmm_connects, systemctl, verify,
};

/// The host's end.
const HOST: &str = "10.0.0.1";
/// As `systemd/README.md` has it.
const WITHOUT_CAPABILITIES: &str = "\
[Service]
CapabilityBoundingSet=
AmbientCapabilities=
PrivateUsers=yes
";

#[test]
fn installed_units_serve_taps_to_guests() {
    match env::var_os(INSIDE) {
        Some(_) => inside(),
        None => outside_with_the_rig("systemd::network::installed_units_serve_taps_to_guests"),
    }
}

/// In the namespace, as a unit of the systemd there; the network is the namespace's, too.
fn inside() {
    let _journal = JournalOnPanic;
    install();
    let rig = Rig::find().expect("the rig is bound into the namespace");
    let host = Host::new(&rig);
    let guests = UserModeLinux::with_network(rig.clone());
    serves_a_tap_of_its_own(&host, &guests);
    serves_a_tap_of_its_account_s(&host, &guests);
}

/// A bridge, which the host has an address on.
struct Host<'a> {
    rig: &'a Rig,
}

impl<'a> Host<'a> {
    fn new(rig: &'a Rig) -> Self {
        fs::create_dir_all("/dev/net").expect("root may");
        let tun = Path::new("/dev/net/tun");
        mknodat(CWD, tun, FileType::CharacterDevice, Mode::empty(), makedev(10, 200))
            .expect("root may make a node");
        // As systemd-udevd would have it.
        fs::set_permissions(tun, Permissions::from_mode(0o666)).expect("root may");
        let host = Self { rig };
        host.ip("link add br0 type bridge");
        host.ip(&format!("address add {HOST}/24 dev br0"));
        host.ip("link set br0 up");
        host
    }

    fn ip(&self, words: &str) {
        let ip = self.rig.tool("ip");
        run(Command::new(ip.get_program()).args(words.split_whitespace()));
    }
}

fn serves_a_tap_of_its_own(host: &Host<'_>, guests: &UserModeLinux) {
    let mac = "52:54:00:12:34:56";
    configure("net", "made", &format!("BACKEND=tap=made\nOPTIONS=--bridge br0 --mac {mac}\n"));
    verify("vhost-net@made", 20);
    let socket = Path::new("/run/outboard/net/made.sock");
    starts_when_a_vmm_connects("vhost-net@made", socket);
    assert_is_confined(&show("vhost-net@made.service", "MainPID"), Capabilities::NET_ADMIN);

    expect_pings(guests, socket, &format!("mac={mac}"));
    assert_counts_requests(Path::new("/run/outboard/net/made/control.sock"));
    let group = show("vhost-net@made.service", "ControlGroup");
    assert_opens_its_device_only(&group, Path::new("/dev/net/tun"));

    systemctl(&["stop", "vhost-net@made.socket"]);
    assert_eq!(show("vhost-net@made.service", "Result"), "success");
    for gone in ["/run/outboard/net/made.sock", "/sys/class/net/made"] {
        assert!(!Path::new(gone).exists(), "{gone} is left behind");
    }
    host.ip("link show br0");
}

/// What root has prepared asks for no right.
fn serves_a_tap_of_its_account_s(host: &Host<'_>, guests: &UserModeLinux) {
    host.ip("tuntap add lasting mode tap vnet_hdr user outboard");
    host.ip("link set lasting master br0 up");
    configure("net", "lasting", "BACKEND=tap=lasting\n");
    let drop_in = Path::new("/etc/systemd/system/vhost-net@lasting.service.d");
    fs::create_dir_all(drop_in).expect("root may");
    fs::write(drop_in.join("override.conf"), WITHOUT_CAPABILITIES).expect("root may");
    systemctl(&["daemon-reload"]);
    verify("vhost-net@lasting", 10);

    let socket = Path::new("/run/outboard/net/lasting.sock");
    starts_when_a_vmm_connects("vhost-net@lasting", socket);
    assert_is_confined(&show("vhost-net@lasting.service", "MainPID"), Capabilities::NONE);
    expect_pings(guests, socket, "mtu=1500");
    systemctl(&["stop", "vhost-net@lasting.socket"]);
    assert_eq!(show("vhost-net@lasting.service", "Result"), "success");
    host.ip("link show lasting");
}

/// The host answers a guest on the network behind `socket`.
fn expect_pings(guests: &UserModeLinux, socket: &Path, word: &str) {
    let peer = format!("peer={HOST}");
    let words = ["address=10.0.0.2/24", &peer, "ping_bytes=56,1472", word];
    pass_with(guests, Device::Network(socket), "network", &words);
}
