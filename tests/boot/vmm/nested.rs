//! A host for virtual machines within a machine of QEMU's, whose processor has virtualisation ([`accelerator`]): a stock
//! kernel in it has KVM, and our VMM, with our daemons, runs a second stock kernel there.
//!
//! Contract: a [`Host`] does what is typed (the guest package's check "console": scripts of a shell), and shows what its
//! virtual machine prints, whose verdicts and announcements so come on one console with its own. The scripts wait for
//! nothing that the machine prints, so each line's answer comes before the machine's next announcement.

use std::time::Duration;

use guest::announcement::Announcement;
use serde_json::Value;
use tests::{Initrd, KernelRelease, Machine, Rig, TempDir, temp_dir};

use super::accelerator::accelerator;
use crate::qemu::emulator::{MODULES, start_up};

/// A nested machine is up after 15 s, one with fio after twice that: this is for a host that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(300);
/// Of the outer machine: its initial RAM disk twice while unpacking, and the inner machine.
const MEMORY: &str = "2048M";
const PROCESSORS: &str = "2";
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 no_timer_check check=console";
/// What makes the outer machine a host, beside KVM's module for its processor.
const HOST_MODULES: [&str; 3] = ["irqbypass", "kvm", "tun"];
/// Drivers of the inner machine, beside those that all machines have.
const MORE_MODULES: [&str; 3] = ["virtio_console", "button", "evdev"];
/// Sums what is resident of a process, but for what it shares as guest memory.
const RESIDENT: &str = "awk '/^[0-9a-f]+-/ { guest = /memfd:/ } /^Rss:/ && !guest { sum += $2 } END { print \"resident KiB\", sum }'";
/// Our programs.
const PROGRAMS: [&str; 4] = ["outboard-vmm", "vhost-blk", "vhost-net", "vhost-console"];

/// What speaks to control sockets.
const SOCAT: &str = "usr/bin/socat";

/// A running host.
pub(super) struct Host {
    machine: Machine,
    // The emulator has the files in it open.
    _directory: TempDir,
}

impl Host {
    /// Boots it; its virtual machines have these programs. `None`: it cannot run here, and has said why.
    pub(super) fn boot(inner_programs: &[&str]) -> Option<Self> {
        Self::boot_with(inner_programs, |_, _| ())
    }

    /// Boots one that has more in its initial RAM disk.
    pub(super) fn boot_with(
        inner_programs: &[&str],
        add: impl FnOnce(&Rig, &mut Initrd),
    ) -> Option<Self> {
        let rig = Rig::find()?;
        let accelerator = accelerator();
        let directory = temp_dir();
        let path = |name: &str| directory.path().join(name);
        let release = KernelRelease::Stable;
        let modules = |names: &[&str]| -> Vec<_> {
            names.iter().map(|name| rig.kernel_module(release, name)).collect()
        };
        let mut inner = Initrd::with_guest(&rig, &modules(&[&MODULES[..], &MORE_MODULES].concat()));
        inner_programs.iter().for_each(|program| inner.program(&rig, program));
        inner.write(&path("inner"));
        let mut outer = Initrd::with_guest(
            &rig,
            &modules(&[&HOST_MODULES[..], &[accelerator.module]].concat()),
        );
        for name in PROGRAMS {
            outer.own_program(name);
        }
        outer.program(&rig, SOCAT);
        outer.file("kernel", &rig.kernel(release));
        outer.file("initrd", &path("inner"));
        add(&rig, &mut outer);
        outer.write(&path("outer"));
        let (machine, _) = start_up(LIMIT, || {
            let mut command = rig.tool("qemu-system-x86_64");
            command
                .args(accelerator.arguments)
                .args(["-nodefaults", "-no-user-config", "-no-reboot"])
                .args(["-display", "none", "-serial", "stdio"])
                .args(["-m", MEMORY, "-smp", PROCESSORS, "-append", KERNEL_WORDS])
                .arg("-kernel")
                .arg(rig.kernel(release))
                .arg("-initrd")
                .arg(path("outer"));
            command
        });
        let mut host = Self { machine, _directory: directory };
        assert_eq!(host.announcement(), Announcement::Loaded);
        Some(host)
    }

    /// Has a script succeed.
    pub(super) fn run(&mut self, script: &str) {
        self.begin(&format!("run {script}"));
        self.expect_done();
    }

    /// Types a line, whose answer the caller awaits.
    pub(super) fn begin(&mut self, line: &str) {
        self.machine.type_line(line);
    }

    /// Starts a virtual machine whose kernel has these words on its command line, with these options of the VMM's.
    pub(super) fn start(&mut self, options: &str, words: &str) {
        let words = format!("console=ttyS0 quiet panic=-1 {words}");
        // Lines that come whole do not mix with other lines. The status is the VMM's.
        let script = format!(
            "set -o pipefail; outboard-vmm --kernel /kernel --initrd /initrd --cmdline '{words}' {options} 2>&1 | grep ''"
        );
        self.machine.type_line(&format!("begin run {script}"));
        self.expect_done();
    }

    /// Waits until the virtual machine has ended as it should.
    pub(super) fn finish(&mut self) {
        self.machine.type_line("finish");
        self.expect_done();
    }

    /// Sends a signal to the VMM.
    pub(super) fn signal(&mut self, name: &str) {
        self.run(&format!("kill -{name} $(pidof outboard-vmm)"));
    }

    /// Has the VMM at this control socket do something.
    pub(super) fn command(&mut self, socket: &str, name: &str) {
        self.run(&format!(
            r#"echo '{{"command":"{name}"}}' | /usr/bin/socat -t 60 - UNIX:{socket} > /tmp/answer && grep '"ok"' /tmp/answer"#
        ));
    }

    /// The number that a script prints.
    pub(super) fn count(&mut self, script: &str) -> u64 {
        self.begin(&format!("count {script}"));
        match self.announcement() {
            Announcement::Found(count) => count,
            other => panic!("{other:?}:\n{}", self.console()),
        }
    }

    /// Asks the VMM for its statistics.
    pub(super) fn statistics(&mut self) -> Value {
        let line = self.ask("run kill -HUP $(pidof outboard-vmm)", "\"starts\"");
        let json = &line[line.find('{').expect("the statistics are an object")..];
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error} in {line:?}"))
    }

    /// Types a line that is done soon; returns the line with this text that comes meanwhile.
    pub(super) fn ask(&mut self, line: &str, text: &str) -> String {
        self.machine.type_line(line);
        // Either comes first.
        let done = Announcement::Done.to_string();
        let [answer, _] = self.machine.wait_for_each([text, &done]);
        answer
    }

    /// The resident memory of the one process of this name, without its guest's.
    pub(super) fn resident_kib(&mut self, name: &str) -> u64 {
        let line =
            self.ask(&format!("run {RESIDENT} /proc/$(pidof {name})/smaps"), "resident KiB ");
        let number = line.split_whitespace().nth(2).and_then(|number| number.parse().ok());
        number.unwrap_or_else(|| panic!("no number in {line:?}"))
    }

    /// Waits for a line with this text, and returns it.
    pub(super) fn wait_for(&mut self, text: &str) -> String {
        self.machine.wait_for(text)
    }

    /// The next announcement, of the virtual machine or of the host.
    pub(super) fn announcement(&mut self) -> Announcement {
        self.machine.expect_announcement()
    }

    fn expect_done(&mut self) {
        let answer = self.announcement();
        assert_eq!(answer, Announcement::Done, "{}", self.machine.console());
    }

    /// What the virtual machine's check has found.
    pub(super) fn expect_pass(&mut self) -> String {
        self.machine.expect_pass()
    }

    /// Lets all go on for this time.
    pub(super) fn run_for(&mut self, time: Duration) {
        self.machine.run_for(time);
    }

    /// What has been on the console.
    pub(super) fn console(&self) -> &str {
        self.machine.console()
    }

    /// Ends the host.
    pub(super) fn end(mut self) {
        self.machine.type_line("end");
        self.machine.expect_pass();
        assert!(self.machine.wait().success());
    }
}
