//! User-Mode Linux as the guest: a kernel that is an ordinary process and has its own vhost-user front end.

use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

use crate::{Initrd, Machine, Rig, temp_dir};

/// A guest is up within 2 s and most checks take less: this is for a machine that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(120);
/// What a network needs besides the disk's driver, in the order of dependencies.
const NETWORK_MODULES: [&str; 5] = ["failover", "net_failover", "virtio_net", "crc-ccitt", "ipv6"];
/// What the check "network" runs.
const NETWORK_PROGRAM: &str = "usr/bin/iperf3";
/// What a console needs.
const CONSOLE_MODULES: [&str; 1] = ["virtio_console"];

/// A device of a guest, by the vhost-user socket behind which it is.
#[derive(Clone, Copy, Debug)]
pub enum Device<'a> {
    /// A disk: `/dev/vda`, the next one `/dev/vdb`.
    Block(&'a Path),
    /// A network interface: `eth0`, the next one `eth1`; of guests with [`UserModeLinux::with_network`].
    Network(&'a Path),
    /// A console device, whose first console is `hvc0`; of guests with [`UserModeLinux::with_console`].
    Console(&'a Path),
}

impl Device<'_> {
    /// The driver's parameter: the socket, and the device's number (VIRTIO 1.3, 5).
    fn parameter(&self) -> String {
        let (socket, number) = match self {
            Self::Network(socket) => (socket, 1),
            Self::Block(socket) => (socket, 2),
            Self::Console(socket) => (socket, 3),
        };
        format!("virtio_uml.device={}:{number}", socket.display())
    }
}

/// Everything that boots of User-Mode Linux share: kernel, modules, initial RAM disk.
#[derive(Debug)]
pub struct UserModeLinux {
    rig: Rig,
    directory: TempDir,
}

impl UserModeLinux {
    /// Prepares an initial RAM disk with the guest's checks, the block driver and ext4 tools.
    ///
    /// # Panics
    /// If the rig lacks a part.
    pub fn new(rig: Rig) -> Self {
        Self::with_programs(rig, &[])
    }

    /// The same, with these programs of the rig besides.
    ///
    /// # Panics
    /// If the rig lacks a part.
    pub fn with_programs(rig: Rig, programs: &[&str]) -> Self {
        Self::prepare(rig, &[], programs)
    }

    /// The same, with what network devices need.
    ///
    /// # Panics
    /// If the rig lacks a part.
    pub fn with_network(rig: Rig) -> Self {
        Self::with_network_and(rig, &[], &[])
    }

    /// The same, with these modules and programs of the rig besides.
    ///
    /// # Panics
    /// If the rig lacks a part.
    pub fn with_network_and(rig: Rig, modules: &[&str], programs: &[&str]) -> Self {
        let modules = [&NETWORK_MODULES, modules].concat();
        Self::prepare(rig, &modules, &[&[NETWORK_PROGRAM], programs].concat())
    }

    /// The same, with what console devices need.
    ///
    /// # Panics
    /// If the rig lacks a part.
    pub fn with_console(rig: Rig) -> Self {
        Self::prepare(rig, &CONSOLE_MODULES, &[])
    }

    fn prepare(rig: Rig, modules: &[&str], programs: &[&str]) -> Self {
        let directory = temp_dir();
        let modules: Vec<_> =
            ["virtio_blk"].iter().chain(modules).map(|name| rig.uml_module(name)).collect();
        let mut initrd = Initrd::with_guest(&rig, &modules);
        initrd.program(&rig, "sbin/mke2fs");
        for program in programs {
            initrd.program(&rig, program);
        }
        initrd.write(&directory.path().join("initrd"));
        Self { rig, directory }
    }

    /// What the guests are made of.
    pub fn rig(&self) -> &Rig {
        &self.rig
    }

    /// Boots a guest with these devices, has it pass `check` and power off, and returns what it found.
    ///
    /// # Panics
    /// If the check fails, or the guest does not get as far as powering off; the message has the console.
    pub fn pass(&self, devices: &[Device<'_>], check: &str, words: &[&str]) -> String {
        Self::finish(self.boot(devices, check, words))
    }

    /// Has a guest pass its check and power off, and returns what it found.
    ///
    /// # Panics
    /// As [`UserModeLinux::pass`] does.
    pub fn finish(mut machine: Machine) -> String {
        let details = machine.expect_pass();
        Self::finish_after_pass(machine);
        details
    }

    /// Has a guest power off that has passed its check.
    ///
    /// # Panics
    /// As [`UserModeLinux::pass`] does.
    pub fn finish_after_pass(mut machine: Machine) {
        // The kernel's last word. What its process does after that is not looked at: on a machine with much else to do a late
        // timer signal can abort it while it tears itself down (once seen in several hundred boots).
        machine.wait_for("reboot: System halted");
        machine.wait();
    }

    /// Boots a guest that has these devices and runs `check`, with further words for its command line.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn boot(&self, devices: &[Device<'_>], check: &str, words: &[&str]) -> Machine {
        let mut command = self.rig.tool("linux.uml");
        command
            .arg("mem=256M")
            .arg(format!("initrd={}", self.directory.path().join("initrd").display()))
            .args(devices.iter().map(Device::parameter))
            // One console, on the process's own stdin and stdout; no terminal emulator is started for others.
            .args(["con=null", "con0=fd:0,fd:1", "console=tty0", "quiet"])
            .arg(format!("uml_dir={}", self.directory.path().display()))
            .arg(format!("check={check}"))
            .args(words)
            // The guest's memory is a deleted file there; /dev/shm, the default, is too small in many containers.
            .env("TMPDIR", self.directory.path());
        Machine::start(command, LIMIT)
    }
}
