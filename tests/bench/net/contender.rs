//! What is compared: how each is started for a cell.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tests::{Daemon, DaemonCommand, Machine, Namespace, Tap, TempDir, program, temp_dir};

use crate::sample::{Bench, Cell, MORTAL, Over, Way};

/// The back end that ratios refer to.
pub(crate) const PEER: &str = "testpmd net_vhost";
/// The interface of all namespaces.
pub(crate) const TAP: &str = "tap0";
/// The guest's address on the link.
pub(crate) const GUEST_MAC: &str = "52:54:00:00:00:02";
/// Longer than any sample.
const TESTPMD_LIMIT: Duration = Duration::from_secs(300);
/// What testpmd says once front ends can connect.
const LISTENING: &str = "binding succeeded";

/// See the module's head.
pub(crate) enum Contender {
    /// Our daemon.
    Ours { name: String, program: PathBuf },
    /// DPDK's back end, which forwards to its own tap.
    Testpmd,
    /// No back end: a loop that reads or writes the tap a frame at a time, which shows what the tap can.
    Loop,
}

/// Our daemons and all others.
pub(crate) fn all(ours: &[PathBuf]) -> io::Result<Vec<Contender>> {
    let default = [program("vhost-net")];
    let programs = if ours.is_empty() { &default[..] } else { ours };
    let mut contenders = Vec::new();
    for program in programs {
        let name = if ours.len() < 2 { "vhost-net".into() } else { program.display().to_string() };
        // Where it is started from is another directory.
        let program = program.canonicalize()?;
        contenders.push(Contender::Ours { name, program });
    }
    contenders.extend([Contender::Testpmd, Contender::Loop]);
    Ok(contenders)
}

/// A back end that runs. Dropping it ends it.
pub(crate) enum BackEnd {
    Daemon(Daemon),
    Testpmd { process: Machine, directory: TempDir },
}

impl BackEnd {
    pub(crate) fn id(&self) -> u32 {
        match self {
            Self::Daemon(daemon) => daemon.id(),
            Self::Testpmd { process, .. } => process.id(),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        match self {
            Self::Daemon(daemon) => daemon.socket().to_owned(),
            Self::Testpmd { directory, .. } => directory.path().join("socket"),
        }
    }
}

impl Contender {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Ours { name, .. } => name,
            Self::Testpmd => PEER,
            Self::Loop => "a loop on the tap",
        }
    }

    /// Whether a front end can connect to it.
    pub(crate) fn is_back_end(&self) -> bool {
        !matches!(self, Self::Loop)
    }

    pub(crate) fn is_able(&self, cell: Cell) -> bool {
        self.is_back_end() || cell.over == Over::Tap
    }

    /// Starts it in a namespace, on the back end's CPU; `cell` is `None` where there are to be no frames. Its tap is up then.
    pub(crate) fn start(
        &self,
        bench: &Bench,
        namespace: &Namespace,
        cell: Option<Cell>,
    ) -> Option<BackEnd> {
        let back_end = match self {
            Self::Ours { program, .. } => {
                if matches!(cell, Some(Cell { over: Over::Tap, .. })) {
                    namespace.add_tap(TAP, Tap::SingleQueue);
                }
                BackEnd::Daemon(start_ours(bench, namespace, program, &backend(cell)))
            }
            Self::Testpmd => start_testpmd(bench, namespace, cell),
            Self::Loop => return None,
        };
        Some(back_end)
    }
}

/// Starts our daemon with this `--backend`, on the back end's CPU.
pub(crate) fn start_ours(
    bench: &Bench,
    namespace: &Namespace,
    program: &Path,
    backend: &str,
) -> Daemon {
    let launcher = namespace.launcher().into_iter().chain(bench.pinned_to_back_end());
    DaemonCommand::new(program).through(launcher).argument("--backend").argument(backend).start()
}

/// The value of `--backend` for a cell.
fn backend(cell: Option<Cell>) -> String {
    match cell {
        Some(Cell { over: Over::Tap, .. }) => format!("tap={TAP}"),
        Some(Cell { way: Way::Receives, frame_bytes, .. }) => format!("null={frame_bytes}"),
        Some(Cell { way: Way::Sends, .. }) | None => "null".into(),
    }
}

fn start_testpmd(bench: &Bench, namespace: &Namespace, cell: Option<Cell>) -> BackEnd {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let mode = match cell {
        Some(Cell { over: Over::Tap, .. }) => "io",
        Some(Cell { way: Way::Receives, .. }) => "txonly",
        Some(Cell { way: Way::Sends, .. }) | None => "rxonly",
    };
    let is_tap = matches!(cell, Some(Cell { over: Over::Tap, .. }));
    let mut devices = vec![format!("net_vhost0,queues=1,iface={}", socket.display())];
    devices.extend(is_tap.then(|| format!("net_tap0,iface={TAP}")));
    let mut command = testpmd(bench, namespace, bench.cpus[0], &directory, &devices);
    command.arg(format!("--forward-mode={mode}")).arg("--disable-link-check");
    if let Some(cell) = cell {
        command.arg(format!("--txpkts={}", cell.frame_bytes));
    }
    let mut process = Machine::start(command, TESTPMD_LIMIT);
    process.wait_for(LISTENING);
    if is_tap {
        namespace.ip(&format!("link set {TAP} up"));
    }
    BackEnd::Testpmd { process, directory }
}

/// Starts the front end, which does what the cell says.
pub(crate) fn start_front_end(
    bench: &Bench,
    namespace: &Namespace,
    socket: &Path,
    cell: Option<Cell>,
) -> (Machine, TempDir) {
    let directory = temp_dir();
    let mode = match cell {
        Some(Cell { way: Way::Sends, .. }) => "txonly",
        Some(Cell { way: Way::Receives, .. }) | None => "rxonly",
    };
    let device = format!(
        "net_virtio_user0,path={},queues=1,queue_size=1024,mac={GUEST_MAC}",
        socket.display()
    );
    let mut command = testpmd(bench, namespace, bench.cpus[1], &directory, &[device]);
    command.arg(format!("--forward-mode={mode}")).args(["--stats-period", "1"]);
    if let Some(cell) = cell {
        command.arg(format!("--txpkts={}", cell.frame_bytes));
    }
    (Machine::start(command, TESTPMD_LIMIT), directory)
}

/// testpmd with these devices, on a CPU of its own, as far as to its own options.
fn testpmd(
    bench: &Bench,
    namespace: &Namespace,
    cpu: usize,
    directory: &TempDir,
    devices: &[String],
) -> Command {
    let [program, words @ ..] = MORTAL;
    let mut command = namespace.command(program);
    command
        .args(words)
        .arg(bench.rig.tool("dpdk-testpmd").get_program())
        // It would leave files in the system's.
        .env("RUNTIME_DIRECTORY", directory.path())
        // One thread for its command line, one that polls.
        .args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--no-huge", "-m", "512", "--no-pci"])
        .arg("--no-shconf")
        .args(devices.iter().map(|device| format!("--vdev={device}")))
        .args(["--", "--total-num-mbufs=32768", "--auto-start"]);
    command
}
