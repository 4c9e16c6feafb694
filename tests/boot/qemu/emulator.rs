//! QEMU without hardware virtualisation: a whole PC with an unmodified distribution kernel and QEMU's vhost-user-blk-pci
//! and vhost-user netdev.
//!
//! Contract: one [`Emulator`] has everything that several boots share, and runs one machine at a time. What a machine runs
//! is a check of the `guest` package, named by words on its kernel's command line.
//!
//! The emulator translates the guest's code and cannot see that another process has changed a page with code in it. So the
//! programs of these guests live in their initial RAM disk, never on the disk under test; `tests/rig/boot-disk` says what
//! that means for a boot loader.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tests::{Initrd, KernelRelease, Machine, Rig, Seen, TempDir, temp_dir};

/// A machine is up within 4 s and its check takes 10 s at most: this is for a host that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(180);
/// How soon a kernel comes to its first program, which takes it 2 s on an idle host.
const UP_LIMIT: Duration = Duration::from_secs(60);
/// How often a machine is started whose kernel does not come so far: rarely, on a host that lets the emulator wait, one loses
/// the timer it waits for. It has not touched our devices by then, for it has no drivers, but the newest, which has them built in.
const STARTS_MAX: u64 = 3;
/// What QEMU says when it has looked for a device's registers in a map that another processor's driver has just changed, and
/// ends: a race of its own between translated processors.
const EMULATOR_FAULT: &str = "iotlb_to_section: Assertion";
/// The time in which an emulator that runs at all answers its monitor.
const MONITOR_LIMIT: Duration = Duration::from_secs(60);
/// Processors of the machine and queues of its disk: drivers take a queue, or a pair, for each processor.
pub(crate) const QUEUE_COUNT: u16 = 4;
/// Processors of the newest machines, whose consoles have the same queues for any number. The fewer there are, the fewer
/// must be given time by a busy host all at once, which the newest kernel needs to come up.
const NEWEST_PROCESSORS: u16 = 2;
/// Entries of a queue of a network as it is: by default it has 64, of which Linux's driver leaves up to a half empty, and then the
/// longest frame finds no room.
const NETWORK_QUEUE_SIZE: u16 = 256;
/// What the drivers are made of, in the order of their dependencies.
pub(crate) const MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];
/// The same for consoles, and of older kernels.
const CONSOLE_MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
];
const OLD_CONSOLE_MODULES: [&str; 4] = ["virtio", "virtio_ring", "virtio_pci", "virtio_console"];
/// What a network takes of the newest kernel.
const NEW_NETWORK_MODULES: [&str; 3] = ["failover", "net_failover", "virtio_net"];
/// Memory of the machine. The load's initial RAM disk needs most of it: fio and all its libraries, twice while unpacking.
const MEMORY: &str = "512M";
/// A kernel that panics restarts at once, which ends a machine that must not restart: no test waits for its deadline. It does
/// not look whether the timer works, for it counts ticks over some milliseconds of its own, and panics where the host had
/// no time for the emulator meanwhile.
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 no_timer_check";

/// Where the parts of [`Version::Old`] are that it loads as it needs them.
const OLD_PARTS: &str = "../qemu-7.2/usr/lib/x86_64-linux-gnu/qemu";

/// Which QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// 7.2, of Debian 12 itself.
    Old,
    /// 10, of its backports.
    Usual,
    /// 11, the newest that Debian has: its machines can have devices of any kind that somebody else serves.
    New,
}

impl Version {
    fn launcher(self) -> &'static str {
        match self {
            Self::Old => "qemu-system-x86_64-7.2",
            Self::Usual => "qemu-system-x86_64",
            Self::New => "qemu-system-x86_64-sid",
        }
    }

    /// How soon it tries to connect to a back end that is gone: as soon as it can be told to.
    fn reconnect(self) -> &'static str {
        match self {
            Self::Old => "reconnect=1",
            Self::Usual | Self::New => "reconnect-ms=100",
        }
    }

    /// Interrupts of a network interface: one for each queue, for the control queue and for the configuration.
    fn vectors(self, queue_pairs: u16) -> u16 {
        match self {
            // Without hardware virtualisation it crashes where a back end calls by an interrupt of its own.
            Self::Old => 0,
            Self::Usual | Self::New => 2 * queue_pairs + 2,
        }
    }
}

/// What happens when the guest restarts its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnRestart {
    /// The machine ends: whatever restarted it was not asked to.
    End,
    /// The machine starts again, from its firmware on, within the same process.
    Again,
}

/// A device of a machine, by the vhost-user socket behind which it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Device<'a> {
    /// A disk of [`QUEUE_COUNT`] queues: `/dev/vda`, the next one `/dev/vdb`.
    Block(&'a Path),
    /// A disk of so many queues of a machine of [`Version::New`]. It ends the machine when its back end hangs up.
    BlockAsItIs(&'a Path, u16),
    /// A network interface: `eth0`, the next one `eth1`.
    Network(Network<'a>),
    /// A console device of a machine of [`Version::New`], with so many queues; its first console is `hvc0`.
    Console(&'a Path, u16),
    /// A network interface of such a machine that is the back end's, control queue and configuration included, with so many
    /// queue pairs.
    NetworkAsItIs(&'a Path, u16),
    /// What QEMU's own devices are, as options.
    Own(&'a [&'a str]),
}

/// What QEMU is told of a network interface. It waits for the back end and connects to the next one when that is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Network<'a> {
    pub(crate) socket: &'a Path,
    /// The back end may have more.
    pub(crate) queue_pairs: u16,
    /// Properties of QEMU's `virtio-net-pci`, such as `mac=52:54:00:12:34:56` and `host_mtu=9000`.
    pub(crate) properties: &'a [&'a str],
}

impl Device<'_> {
    /// The emulator's options for it; `name` is no other device's.
    fn arguments(&self, name: &str, version: Version) -> Vec<String> {
        match self {
            Self::Block(socket) => [
                "-chardev".into(),
                format!("socket,id={name},path={},{}", socket.display(), version.reconnect()),
                "-device".into(),
                format!("vhost-user-blk-pci,chardev={name},num-queues={QUEUE_COUNT}"),
            ]
            .into(),
            // All of `struct virtio_blk_config` (VIRTIO 1.3, 5.2.4) but what comes with features that nobody offers.
            Self::BlockAsItIs(socket, queue_count) => {
                let properties = format!("virtio-id=2,num_vqs={queue_count},config_size=60");
                of_any_kind(name, socket, &properties)
            }
            Self::Network(network) => network.arguments(name, version),
            // Columns, rows, the number of ports and the emergency register (VIRTIO 1.3, 5.3.4).
            Self::Console(socket, queue_count) => {
                let properties = format!("virtio-id=3,num_vqs={queue_count},config_size=12");
                of_any_kind(name, socket, &properties)
            }
            // All of `struct virtio_net_config` (VIRTIO 1.3, 5.1.4) but what comes with features that nobody offers.
            Self::NetworkAsItIs(socket, queue_pairs) => {
                let properties = format!(
                    "virtio-id=1,num_vqs={},vq_size={NETWORK_QUEUE_SIZE},config_size=28",
                    2 * queue_pairs + 1
                );
                of_any_kind(name, socket, &properties)
            }
            Self::Own(options) => options.iter().copied().map(str::to_owned).collect(),
        }
    }
}

/// QEMU's device for back ends of any kind: which it is (VIRTIO 1.3, 5), its queues, the length of its configuration space.
fn of_any_kind(name: &str, socket: &Path, properties: &str) -> Vec<String> {
    [
        "-chardev".into(),
        format!("socket,id={name},path={}", socket.display()),
        "-device".into(),
        format!("vhost-user-test-device-pci,chardev={name},{properties}"),
    ]
    .into()
}

impl Network<'_> {
    fn arguments(&self, name: &str, version: Version) -> Vec<String> {
        let Self { socket, queue_pairs, properties } = self;
        let (reconnect, vectors) = (version.reconnect(), version.vectors(*queue_pairs));
        // Its firmware would boot from the network: no test does.
        let mut device = format!("virtio-net-pci,netdev={name},vectors={vectors},romfile=");
        if *queue_pairs > 1 {
            device += ",mq=on";
        }
        for property in *properties {
            device = device + "," + property;
        }
        [
            "-chardev".into(),
            format!("socket,id={name},path={},{reconnect}", socket.display()),
            "-netdev".into(),
            format!("vhost-user,id={name},chardev={name},queues={queue_pairs}"),
            "-device".into(),
            device,
        ]
        .into()
    }
}

/// Starts a machine whose kernel comes as far as the guest's first program, and whose emulator bears it to load its drivers; and
/// says how many did not before.
///
/// # Panics
/// If none of [`STARTS_MAX`] does.
pub(crate) fn start_up(limit: Duration, command: impl Fn() -> Command) -> (Machine, u64) {
    for failed in 0..STARTS_MAX {
        let mut machine = Machine::start(command(), limit);
        let is_up = machine.look_for(guest::UP, UP_LIMIT);
        if is_up == Seen::Line {
            machine.look_for(guest::EQUIPPED, UP_LIMIT);
        }
        if is_up != Seen::Silence && !machine.console().contains(EMULATOR_FAULT) {
            return (machine, failed);
        }
        eprintln!("a machine did not come up, and is started again:\n{}", machine.console());
    }
    panic!("none of {STARTS_MAX} machines came up");
}

/// What all machines share: the kernel, the initial RAM disk, the monitor's path.
#[derive(Debug)]
pub(crate) struct Emulator {
    rig: Rig,
    version: Version,
    release: KernelRelease,
    processors: u16,
    failed_starts: Cell<u64>,
    directory: TempDir,
}

impl Emulator {
    /// Prepares an initial RAM disk with the guest's checks, these programs of the rig, and modules beyond those of its devices.
    /// `None`: this cannot run here, and has said why.
    pub(crate) fn new(programs: &[&str], modules: &[&str]) -> Option<Self> {
        Self::of(Version::Usual, programs, modules)
    }

    /// The same of one of the versions of QEMU.
    pub(crate) fn of(version: Version, programs: &[&str], modules: &[&str]) -> Option<Self> {
        let rig = Rig::find()?;
        let release = KernelRelease::Stable;
        let modules: Vec<_> =
            MODULES.iter().chain(modules).map(|name| rig.kernel_module(release, name)).collect();
        Some(Self::prepare(rig, version, release, &modules, programs))
    }

    /// The same of the newest QEMU, whose machines can have consoles that somebody else serves, with one of the kernels.
    pub(crate) fn newest(release: KernelRelease) -> Option<Self> {
        let rig = Rig::find()?;
        let modules: &[_] = match release {
            KernelRelease::New => &[],
            KernelRelease::Old => &OLD_CONSOLE_MODULES,
            KernelRelease::Stable => &CONSOLE_MODULES,
        };
        let modules: Vec<_> = modules.iter().map(|name| rig.kernel_module(release, name)).collect();
        let prepared = Self::prepare(rig, Version::New, release, &modules, &[]);
        Some(Self { processors: NEWEST_PROCESSORS, ..prepared })
    }

    /// The same with the newest kernel, for networks.
    pub(crate) fn newest_with_network(programs: &[&str]) -> Option<Self> {
        let rig = Rig::find()?;
        let release = KernelRelease::New;
        let modules = NEW_NETWORK_MODULES.map(|name| rig.kernel_module(release, name));
        let prepared = Self::prepare(rig, Version::New, release, &modules, programs);
        Some(Self { processors: NEWEST_PROCESSORS, ..prepared })
    }

    fn prepare(
        rig: Rig,
        version: Version,
        release: KernelRelease,
        modules: &[PathBuf],
        programs: &[&str],
    ) -> Self {
        let directory = temp_dir();
        let mut initrd = Initrd::with_guest(&rig, modules);
        for program in programs {
            initrd.program(&rig, program);
        }
        initrd.write(&directory.path().join("initrd"));
        Self {
            rig,
            version,
            release,
            processors: QUEUE_COUNT,
            failed_starts: Cell::new(0),
            directory,
        }
    }

    /// How many processors a machine has.
    pub(crate) fn processors(&self) -> u16 {
        self.processors
    }

    /// What the machines are made of.
    pub(crate) fn rig(&self) -> &Rig {
        &self.rig
    }

    /// Boots a machine with these devices; the emulator puts the kernel into its memory.
    pub(crate) fn boot(
        &self,
        devices: &[Device<'_>],
        words: &str,
        on_restart: OnRestart,
    ) -> Machine {
        let (machine, failed) = start_up(LIMIT, || {
            let mut command = self.machine(devices, on_restart);
            command.arg("-kernel").arg(self.rig.kernel(self.release));
            command.arg("-initrd").arg(self.initrd());
            command.arg("-append").arg(format!("{KERNEL_WORDS} {words}"));
            command
        });
        self.failed_starts.set(self.failed_starts.get() + failed);
        machine
    }

    /// How many machines have not come up: each has had a session with a back end.
    pub(crate) fn failed_starts(&self) -> u64 {
        self.failed_starts.get()
    }

    /// Boots a machine that is given nothing but the disk behind `socket`: its firmware reads the boot loader from there.
    pub(crate) fn boot_from_disk(&self, socket: &Path, on_restart: OnRestart) -> Machine {
        Machine::start(self.machine(&[Device::Block(socket)], on_restart), LIMIT)
    }

    /// Makes a disk at `image` that boots to the check in `words`.
    pub(crate) fn make_boot_disk(&self, image: &Path, words: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/boot-disk");
        let output = Command::new(&script)
            .arg(self.rig.kernel(self.release))
            .arg(self.initrd())
            .arg(format!("{KERNEL_WORDS} {words}"))
            .arg(image)
            .env("OUTBOARD_RIG_DIR", self.rig.path(".."))
            .output()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", script.display()));
        assert!(output.status.success(), "boot-disk: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Has the emulator carry out a command of its monitor's: `system_reset` is the machine's reset button.
    pub(crate) fn command(&self, command: &Value) {
        let monitor = UnixStream::connect(self.monitor())
            .expect("the emulator listens on its monitor's socket");
        monitor.set_read_timeout(Some(MONITOR_LIMIT)).expect("a socket takes a time limit");
        let mut replies = BufReader::new(&monitor).lines();
        for command in [&json!({ "execute": "qmp_capabilities" }), command] {
            writeln!(&monitor, "{command}").expect("the monitor reads its commands");
            loop {
                let line = replies
                    .next()
                    .expect("the monitor answers")
                    .expect("the monitor answers in time");
                let reply: Value = serde_json::from_str(&line).expect("the monitor speaks JSON");
                assert!(reply.get("error").is_none(), "{command}: {reply}");
                // The greeting and the events come between the replies.
                if reply.get("return").is_some() {
                    break;
                }
            }
        }
    }

    fn initrd(&self) -> PathBuf {
        self.directory.path().join("initrd")
    }

    fn monitor(&self) -> PathBuf {
        self.directory.path().join("monitor")
    }

    fn machine(&self, devices: &[Device<'_>], on_restart: OnRestart) -> Command {
        let mut command = self.rig.tool(self.version.launcher());
        if self.version == Version::Old {
            // Newer ones look beside their program file, too.
            command.env("QEMU_MODULE_DIR", self.rig.path(OLD_PARTS));
        }
        command
            .args([
                "-accel",
                "tcg",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-serial",
                "stdio",
            ])
            .args([
                "-m",
                MEMORY,
                "-smp",
                &self.processors.to_string(),
                "-machine",
                "q35,memory-backend=memory",
            ])
            // The daemon maps the machine's memory, so it must be a file that both can share.
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=memory,size={MEMORY},share=on"))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", self.monitor().display()));
        for (index, device) in devices.iter().enumerate() {
            command.args(device.arguments(&format!("device{index}"), self.version));
        }
        if on_restart == OnRestart::End {
            command.arg("-no-reboot");
        }
        command
    }
}
