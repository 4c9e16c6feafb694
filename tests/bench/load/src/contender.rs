//! The daemons that are compared: how each is started, what it has used, how it is ended.
//!
//! Each runs in a session of its own, so that a Ctrl-C at the terminal does not reach it in the middle of a sample, and
//! under a parent-death signal, so that none outlives the bench, however that ends. It is only ever ended by its own
//! process id.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use load::Client;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::disk::{Aio, Disk, path_of};

/// Time in which a daemon listens, even on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Pause between two attempts to connect: short beside the warm-up of a sample.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);
/// Time for a clean end after SIGTERM, before SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Unit of the CPU times in `/proc/PID/stat`: the kernel's USER_HZ, 100 in the ABI of every architecture we build for.
const TICKS_PER_SECOND: f64 = 100.0;
/// Room for 128 requests of three descriptors each.
const QUEUE_SIZE: u16 = 512;

/// How a program wants to be told its socket, disk, cache mode and engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Our daemon.
    Ours(Aio),
    /// The stock daemon, which has one engine: none.
    Stock,
    /// `qemu-storage-daemon`.
    StorageDaemon(Aio),
}

/// A program under comparison.
#[derive(Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    /// The name of the contender that this one's ratios refer to, which may not be there.
    pub(crate) peer: String,
    pub(crate) program: PathBuf,
    pub(crate) dialect: Dialect,
}

/// Why there is no daemon to measure, or no more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("cannot start {program} (by setsid, taskset and setpriv of util-linux)")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("ended; its log: {log}")]
    Ended { log: String },
    #[error("no connection at {socket}; the daemon's log: {log}")]
    Connect { socket: PathBuf, log: String, source: io::Error },
    #[error("cannot read {path}")]
    Accounting { path: String, source: io::Error },
}

/// A daemon that has been started. Dropping it ends it.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Contender {
    /// Starts the daemon with its socket and log in `directory`, on one CPU only if that is given.
    pub(crate) fn start(
        &self,
        disk: &Disk,
        directory: &Path,
        cpu: Option<usize>,
    ) -> Result<Daemon, DaemonError> {
        let (socket, log) = (directory.join("socket"), directory.join("log"));
        let spawn = || {
            let mut command = Command::new("setsid");
            if let Some(cpu) = cpu {
                command.args(["taskset", "--cpu-list", &cpu.to_string()]);
            }
            command
                .args(["setpriv", "--pdeathsig", "TERM"])
                .arg(&self.program)
                .args(self.arguments(disk, &socket))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log)?)
                .spawn()
        };
        let child = spawn()
            .map_err(|source| DaemonError::Spawn { program: self.program.clone(), source })?;
        Ok(Daemon { child, socket, log })
    }

    fn arguments(&self, disk: &Disk, socket: &Path) -> Vec<OsString> {
        let socket = socket.display();
        let words = match self.dialect {
            Dialect::Ours(aio) => {
                let mut words = vec![
                    format!("--socket-path={socket}"),
                    plain_disk(disk),
                    format!("--aio={}", aio.name()),
                ];
                if let Disk::File { cache, .. } = disk {
                    words.push(format!("--cache={}", cache.name()));
                }
                words
            }
            Dialect::Stock => {
                let mut words = vec![format!("--socket-path={socket}"), plain_disk(disk)];
                if let Disk::File { cache, .. } = disk {
                    words.extend(cache.is_direct().then(|| "--direct".into()));
                    words.extend(cache.is_write_through().then(|| "--write-through".into()));
                }
                words
            }
            Dialect::StorageDaemon(aio) => {
                let mut export = format!(
                    "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},writable=on,\
                     iothread=thread"
                );
                if matches!(disk, Disk::File { cache, .. } if cache.is_write_through()) {
                    export.push_str(",writethrough=on");
                }
                vec![
                    "--object=iothread,id=thread".into(),
                    format!("--blockdev={}", node(disk, aio)),
                    format!("--export={export}"),
                ]
            }
        };
        words.into_iter().map(OsString::from).collect()
    }
}

/// The disk, as our daemon and the stock one want to be told it.
fn plain_disk(disk: &Disk) -> String {
    match disk {
        Disk::Null(len_bytes) => format!("--disk=null:{len_bytes}"),
        Disk::File { image, .. } => format!("--disk=file:{}", path_of(image).display()),
    }
}

/// The disk as a node of QEMU's block layer. Its null disk has no engine.
fn node(disk: &Disk, aio: Aio) -> String {
    let switch = |is_on| if is_on { "on" } else { "off" };
    match disk {
        Disk::Null(len_bytes) => format!("null-co,node-name=disk,size={len_bytes},read-zeroes=off"),
        Disk::File { image, cache } => format!(
            "file,node-name=disk,filename={},cache.direct={},cache.no-flush={},aio={}",
            path_of(image).display(),
            switch(cache.is_direct()),
            switch(cache.is_unsafe()),
            aio.name(),
        ),
    }
}

impl Daemon {
    /// Connects a client with one queue, as soon as the daemon listens.
    pub(crate) fn connect(&self, buffer_bytes: usize) -> Result<Client, DaemonError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match Client::connect(&self.socket, 1, QUEUE_SIZE, buffer_bytes) {
                Ok(client) => return Ok(client),
                Err(_) if self.ends_within(CONNECT_PAUSE) => {
                    return Err(DaemonError::Ended { log: self.log() });
                }
                Err(error) if is_early(&error) && Instant::now() < deadline => {}
                Err(source) => {
                    return Err(DaemonError::Connect {
                        socket: self.socket.clone(),
                        log: self.log(),
                        source,
                    });
                }
            }
        }
    }

    /// CPU time of all its threads since its start, in seconds, in user space and in the kernel.
    pub(crate) fn cpu_seconds(&self) -> Result<f64, DaemonError> {
        // proc(5): utime and stime are fields 14 and 15; the second, the program's name, ends at the last parenthesis.
        let stat = self.accounting("stat")?;
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ticks: u64 =
            fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(ticks as f64 / TICKS_PER_SECOND)
    }

    /// The most memory it has ever had, in MiB, shared guest memory included.
    pub(crate) fn peak_mib(&self) -> Result<f64, DaemonError> {
        let status = self.accounting("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
        Ok(kib / 1024.0)
    }

    fn accounting(&self, file: &str) -> Result<String, DaemonError> {
        let path = format!("/proc/{}/{file}", self.child.id());
        fs::read_to_string(&path).map_err(|source| DaemonError::Accounting { path, source })
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| format!("({error})"))
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let wait = || {
            let ended = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
            let limit =
                Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
            poll(&mut [PollFd::new(&ended.as_fd(), PollFlags::IN)], Some(&limit))
        };
        // An error: the process has been waited for, or a signal came, which is as good as a moment more.
        wait().is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // All three fail only for a process that is gone already.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        if !self.ends_within(END_LIMIT) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}

/// Whether a failed connection only says that the daemon does not listen yet.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{Contender, Dialect};
    use crate::disk::{Aio, Cache, Disk};

    /// What a daemon of this dialect is told, in one line.
    fn told(dialect: Dialect, cache: Cache) -> String {
        let contender = Contender {
            name: String::new(),
            peer: String::new(),
            program: PathBuf::new(),
            dialect,
        };
        let disk = Disk::file(&std::env::temp_dir(), 0, cache).expect("there is room for nothing");
        let words = contender.arguments(&disk, Path::new("socket"));
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_mode_is_told_to_each_daemon() {
        let modes = [
            (Cache::None, true, false, false),
            (Cache::Writeback, false, false, false),
            (Cache::Writethrough, false, true, false),
            (Cache::Directsync, true, true, false),
            (Cache::Unsafe, false, false, true),
        ];
        for (cache, direct, write_through, ignores_flushes) in modes {
            let ours = told(Dialect::Ours(Aio::Threads), cache);
            assert!(ours.contains(&format!("--aio=threads --cache={}", cache.name())), "{ours}");
            let stock = told(Dialect::Stock, cache);
            assert_eq!(stock.contains("--direct"), direct, "{stock}");
            assert_eq!(stock.contains("--write-through"), write_through, "{stock}");
            let peer = told(Dialect::StorageDaemon(Aio::IoUring), cache);
            assert!(peer.contains("aio=io_uring"), "{peer}");
            assert_eq!(peer.contains("cache.direct=on"), direct, "{peer}");
            assert_eq!(peer.contains("writethrough=on"), write_through, "{peer}");
            assert_eq!(peer.contains("cache.no-flush=on"), ignores_flushes, "{peer}");
        }
    }
}
