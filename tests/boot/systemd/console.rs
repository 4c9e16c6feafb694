//! The console device's units: a console that root attaches to, with a log that is renamed while it is written.

use std::env;
use std::fs;
use std::path::Path;

use tests::{Device, Rig, UserModeLinux};

use super::{
    Capabilities, INSIDE, JournalOnPanic, assert_counts_requests, assert_is_confined, configure,
    install, outside_with_the_rig, show, starts_when_a_vmm_connects, systemctl, verify,
};
use crate::console::server::{Client, wait_for};
use crate::dialogue::Guest;

const SERVICE: &str = "vhost-console@web.service";

#[test]
fn installed_units_serve_a_console_that_is_attached_to() {
    match env::var_os(INSIDE) {
        Some(_) => inside(),
        None => outside_with_the_rig(
            "systemd::console::installed_units_serve_a_console_that_is_attached_to",
        ),
    }
}

/// In the namespace, as a unit of the systemd there.
fn inside() {
    let _journal = JournalOnPanic;
    install();
    let example = fs::read_to_string("/usr/local/share/doc/outboard/example-console.conf");
    configure("console", "web", &example.expect("it is installed").replace("NAME", "web"));
    verify("vhost-console@web", 10);
    let socket = Path::new("/run/outboard/console/web.sock");
    starts_when_a_vmm_connects("vhost-console@web", socket);
    assert_is_confined(&show(SERVICE, "MainPID"), Capabilities::NONE);

    let guests =
        UserModeLinux::with_console(Rig::find().expect("the rig is bound into the namespace"));
    let mut guest =
        Guest::meet(guests.boot(&[Device::Console(socket)], "console", &["console=hvc0"]));
    let mut viewer = Client::connect(Path::new("/run/outboard/console/web/console.sock"));
    guest.do_line("login hvc0");
    viewer.expect("login: ");
    viewer.type_text("root\n");
    viewer.expect("# ");

    let log = Path::new("/var/log/outboard/console/web/console.log");
    let says = |file: &Path, text: &str| {
        let read = || fs::read_to_string(file).ok().filter(|said| said.contains(text));
        wait_for(read).unwrap_or_else(|| panic!("{text:?} is not in {}", file.display()))
    };
    let stamped = says(log, "login: ");
    assert!(stamped.starts_with("20"), "no line begins with its time: {stamped}");
    let old = log.with_extension("old");
    fs::rename(log, &old).expect("root may");
    systemctl(&["reload", SERVICE]);
    viewer.type_text("echo written to the new $((2 + 2)) log\n");
    says(log, "written to the new 4 log");
    assert!(!says(&old, "login: ").contains("the new 4 log"));

    assert_counts_requests(Path::new("/run/outboard/console/web/control.sock"));
    UserModeLinux::finish(guest.part());
    systemctl(&["stop", "vhost-console@web.socket"]);
    assert_eq!(show(SERVICE, "Result"), "success");
    for gone in ["/run/outboard/console/web.sock", "/run/outboard/console/web"] {
        assert!(!Path::new(gone).exists(), "{gone} is left behind");
    }
}
