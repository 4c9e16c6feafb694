//! What a guest's network device is connected to: our daemon on an interface, and hosts beyond.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tests::{Daemon, DaemonCommand, Namespace, Rig, Tap, TempDir, program, temp_dir};

use super::TAP;
use crate::statistics::Statistics;

/// Time in which what has been sent has long arrived.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(30);

/// A daemon, in a namespace mostly.
pub(crate) struct Port {
    daemon: Daemon,
    control: PathBuf,
    // Last: the daemon's files are in it.
    directory: TempDir,
}

impl Port {
    /// Starts a daemon that serves this back end, with further options, in a namespace or else here.
    pub(crate) fn open(namespace: Option<&Namespace>, backend: &str, options: &[&str]) -> Self {
        let directory = temp_dir();
        let daemon = command(namespace, directory.path(), options)
            .argument("--backend")
            .argument(backend)
            .start();
        Self { daemon, control: directory.path().join("control"), directory }
    }

    /// The same of a tap's or macvtap's queue that is open already.
    pub(crate) fn pass(namespace: &Namespace, queue: File, options: &[&str]) -> Self {
        let directory = temp_dir();
        let command = command(Some(namespace), directory.path(), options).stdin(queue);
        let daemon = command.argument("--tap-fd").argument("0").start();
        Self { daemon, control: directory.path().join("control"), directory }
    }

    /// Has the daemon die, and another one serve in its place. `meanwhile` there is none.
    pub(crate) fn restart(
        self,
        namespace: Option<&Namespace>,
        backend: &str,
        options: &[&str],
        meanwhile: impl FnOnce(),
    ) -> Self {
        let Self { daemon, control, directory } = self;
        // SIGKILL: its sockets stay.
        drop(daemon);
        meanwhile();
        let daemon = command(namespace, directory.path(), options)
            .argument("--backend")
            .argument(backend)
            .start();
        Self { daemon, control, directory }
    }

    /// The vhost-user socket.
    pub(crate) fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    pub(crate) fn statistics(&self) -> Statistics {
        Statistics::ask(&self.control)
    }

    /// Waits until the daemon's counters are as wanted, and returns them.
    pub(crate) fn wait_for(&self, wanted: impl Fn(&Statistics) -> bool) -> Statistics {
        let deadline = Instant::now() + ARRIVAL_LIMIT;
        loop {
            let statistics = self.statistics();
            if wanted(&statistics) {
                return statistics;
            }
            assert!(Instant::now() < deadline, "{statistics:?}\n{}", self.daemon.log());
        }
    }

    /// Waits until the daemon has logged this.
    pub(crate) fn wait_for_log(&self, text: &str) {
        let deadline = Instant::now() + ARRIVAL_LIMIT;
        while !self.daemon.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in the log:\n{}", self.daemon.log());
            thread::yield_now();
        }
    }

    /// How many rings of front ends that went at that moment have been found broken. As a kernel of User-Mode Linux ends, its
    /// driver resets the device and takes its buffers back, one after the other, out of rings that run: nobody has told the
    /// daemon of the reset (`vu_reset`). Who receives a frame just then sees available entries become fewer.
    fn unstopped_rings(&self) -> u64 {
        let log = self.daemon.log();
        let lines: Vec<_> = log.lines().collect();
        let is_last =
            |lines: &&[&str]| lines[0].contains(RETREAT) && lines[1].contains("front end hung up");
        lines.windows(2).filter(is_last).count() as u64
    }

    /// Ends the daemon as an operator would, after a look at its counters: no frame of a driver's was malformed, no
    /// front end was at fault.
    pub(crate) fn expect_clean_end(self) {
        let statistics = self.statistics();
        for counter in ["protocol_errors", "broken_sessions"] {
            assert_eq!(statistics.daemon(counter), 0, "{counter} in {statistics:?}");
        }
        for reason in MALFORMED {
            assert_eq!(statistics.drops(reason), 0, "{reason} in {statistics:?}");
        }
        assert_eq!(statistics.all_queues("broken"), self.unstopped_rings(), "{statistics:?}");
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
    }
}

/// What a ring is broken by whose available entries become fewer.
const RETREAT: &str = "ring is broken: available index jumped";

/// Why frames are dropped that no driver of good faith sends.
const MALFORMED: [&str; 10] = [
    "no_header",
    "runt",
    "giant",
    "not_negotiated",
    "gso_type",
    "gso_size",
    "gso_checksum",
    "gso_header",
    "checksum_outside",
    "checksum_in_ethernet",
];

fn command(namespace: Option<&Namespace>, directory: &Path, options: &[&str]) -> DaemonCommand {
    let command = DaemonCommand::new(&program("vhost-net"))
        .through(namespace.map(Namespace::launcher).unwrap_or_default())
        .socket(&directory.join("socket"))
        .argument("--control")
        .argument(directory.join("control"));
    options.iter().fold(command, DaemonCommand::argument)
}

/// A tap, and a host behind a bridge and a wire: frames come out of the wire as they would of a cable, with their checksums
/// and cut into segments.
pub(crate) struct Wire {
    /// Where the tap is.
    pub(crate) near: Namespace,
    /// The host, whose interface is [`Wire::FAR`].
    pub(crate) far: Namespace,
}

impl Wire {
    /// The host's interface.
    pub(crate) const FAR: &str = "eth0";
    /// The wire's other end, a port of the bridge.
    const NEAR: &str = "wire0";

    pub(crate) fn lay(rig: &Rig, tap: Tap) -> Option<Self> {
        let (near, far) = (Namespace::new(rig)?, Namespace::new(rig)?);
        near.add_tap(TAP, tap);
        near.add_veth(Self::NEAR, &far, Self::FAR);
        near.add_bridge("br0", &[TAP, Self::NEAR]);
        for (namespace, interface) in [(&near, Self::NEAR), (&far, Self::FAR)] {
            namespace.ethtool(&format!("--offload {interface} tx off tso off gso off"));
        }
        Some(Self { near, far })
    }
}
