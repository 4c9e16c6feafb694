//! Starting our daemon in ways that the harness does not: to fail, or with sockets that it
//! inherits.
//!
//! Inherited descriptors pass through a shell, which puts them at the right numbers and knows its
//! own process id: both must happen between fork and exec, and marking a descriptor of this process
//! as inheritable would leak it into the children of other tests.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tests::{program, wait_for_exit};

/// Time in which a daemon that cannot start has long said so.
const LIMIT: Duration = Duration::from_secs(20);

/// A child that is killed at the end of its test.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    /// Starts `command`, or says why it cannot be.
    pub(crate) fn spawn(command: &mut Command) -> std::io::Result<Self> {
        command.spawn().map(Process)
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("our own child can be waited for").is_none()
    }

    /// Waits until a socket at `path` accepts connections: programs of others say in no common way
    /// that they are ready.
    pub(crate) fn wait_for_socket(&mut self, path: &Path) {
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(path).is_err() {
            assert!(Instant::now() < deadline, "it does not listen at {}", path.display());
            assert!(self.is_running(), "it ended instead of listening at {}", path.display());
            std::thread::yield_now();
        }
    }

    /// The exit status, once the process has ended by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for_exit(&mut self.0, LIMIT)
            .expect("our own child can be waited for")
            .expect("the process ends")
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        let id = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(id, rustix::process::Signal::TERM)
            .expect("our own child can be signalled");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a daemon ended that was to end by itself.
pub(crate) struct Ending {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs our daemon with `arguments` until it ends.
pub(crate) fn run(arguments: &[&str]) -> Ending {
    to_its_end(Command::new(program("vhost-blk")).args(arguments))
}

/// Runs a command line until it ends.
pub(crate) fn to_its_end(command: &Command) -> Ending {
    let mut timeout = Command::new("timeout");
    // The daemon that serves where it should have refused must not keep the test waiting for the
    // end of its output.
    timeout.arg(LIMIT.as_secs().to_string()).arg(command.get_program()).args(command.get_args());
    let Output { status, stdout, stderr } =
        timeout.stdin(Stdio::null()).output().expect("coreutils are there");
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    Ending { code: status.code(), stdout, stderr }
}

/// A start that must fail with exit status `code`, and a message that has every one of `words`.
#[track_caller]
pub(crate) fn must_fail(arguments: &[&str], code: i32, words: &[&str]) {
    let ending = run(arguments);
    assert_eq!(ending.code, Some(code), "{arguments:?}: {}", ending.stderr);
    for word in words {
        assert!(
            ending.stderr.contains(word),
            "{arguments:?}: {word:?} is missing in: {}",
            ending.stderr
        );
    }
}

/// Starts our daemon on the image `disk` with descriptors 3 and, if there are two, 4.
pub(crate) fn with_descriptors(
    disk: &Path,
    descriptors: [Option<OwnedFd>; 2],
    (environment, arguments): (&str, &[&str]),
) -> Process {
    let script =
        format!("exec 3<&0 4>&1 0</dev/null 1>/dev/null; {environment} exec \"$0\" \"$@\"");
    let [third, fourth] = descriptors.map(|fd| fd.map_or_else(Stdio::null, Stdio::from));
    let mut command = Command::new("sh");
    command
        .args(["-c", &script])
        .arg(program("vhost-blk"))
        .arg("--blk-file")
        .arg(disk)
        .args(tests::engine_arguments())
        .args(arguments);
    Process::spawn(command.stdin(third).stdout(fourth)).expect("there is a shell")
}
