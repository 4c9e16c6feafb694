//! The daemon's side: what is at the other end of a guest's ports.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use guest::pattern;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::{Daemon, DaemonCommand, TempDir, temp_dir};

use crate::control;
use crate::statistics::Statistics;

/// Time in which whatever is waited for has long happened: a guest boots and is heard within seconds.
pub(super) const LIMIT: Duration = Duration::from_secs(30);
/// What is read or written at once.
const STEP_BYTES: usize = 256 << 10;
/// What counts faults of a front end or a driver.
const FAULTS: [&str; 2] = ["protocol_errors", "broken_sessions"];

/// A daemon whose endpoints are in a directory of its own.
pub(crate) struct Server {
    daemon: Daemon,
    // Last: the daemon's files are in it.
    directory: TempDir,
}

impl Server {
    /// Starts a daemon with these ports, in whose descriptions `@` stands for the directory, and with further options.
    pub(crate) fn start(ports: &[&str], options: &[&str]) -> Self {
        Self::start_through(ports, options, |_| Vec::new())
    }

    /// The same, by a program that becomes the daemon; its command line is made for the directory.
    pub(crate) fn start_through(
        ports: &[&str],
        options: &[&str],
        launcher: impl FnOnce(&Path) -> Vec<String>,
    ) -> Self {
        let directory = temp_dir();
        let place = directory.path().to_str().expect("our own name");
        let ports: Vec<_> = ports.iter().map(|port| port.replace('@', place)).collect();
        let ports: Vec<_> = ports.iter().map(String::as_str).collect();
        let command = DaemonCommand::console(&ports)
            .through(launcher(directory.path()))
            .argument("--control")
            .argument(directory.path().join("control"));
        let daemon = options.iter().fold(command, DaemonCommand::argument).start();
        Self { daemon, directory }
    }

    /// The vhost-user socket.
    pub(crate) fn socket(&self) -> &Path {
        self.daemon.socket()
    }

    pub(crate) fn id(&self) -> u32 {
        self.daemon.id()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What is in a file of the directory.
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn hang_up(&self) {
        self.daemon.signal(Signal::HUP);
    }

    pub(crate) fn log(&self) -> String {
        self.daemon.log()
    }

    /// Has a command of the control socket's done.
    pub(crate) fn ask(&self, command: &Value) -> Value {
        control::ask(&self.path("control"), command)
    }

    pub(crate) fn resize(&self, port: &str, columns: u16, rows: u16) {
        self.ask(&json!({ "command": "size", "port": port, "columns": columns, "rows": rows }));
    }

    /// A port, as the daemon describes it.
    pub(crate) fn port(&self, id: u64) -> Value {
        let ports = self.ask(&json!({ "command": "ports" }));
        let found = ports.as_array().and_then(|ports| ports.iter().find(|port| port["id"] == id));
        found.cloned().unwrap_or_else(|| panic!("there is no port {id} in {ports}"))
    }

    /// Waits until the description of a port is as wanted, and returns it.
    pub(crate) fn wait_for(&self, id: u64, wanted: impl Fn(&Value) -> bool) -> Value {
        let port = wait_for(|| Some(self.port(id)).filter(&wanted));
        port.unwrap_or_else(|| panic!("{}\n{}", self.port(id), self.log()))
    }

    /// Waits until a file of the directory has so many bytes.
    pub(crate) fn wait_for_file(&self, name: &str, len_bytes: u64) {
        let path = self.path(name);
        let len = || fs::metadata(&path).map_or(0, |found| found.len());
        let found = wait_for(|| (len() >= len_bytes).then_some(()));
        found.unwrap_or_else(|| panic!("{name} has {} bytes of {len_bytes}", len()));
    }

    /// Waits until the daemon has said this.
    pub(crate) fn wait_for_log(&self, text: &str) {
        let found = wait_for(|| self.log().contains(text).then_some(()));
        found.unwrap_or_else(|| panic!("no {text:?} in the log:\n{}", self.log()));
    }

    pub(crate) fn statistics(&self) -> Statistics {
        Statistics::ask(&self.path("control"))
    }

    /// Connects to an endpoint.
    pub(crate) fn connect(&self, name: &str) -> Client {
        Client::connect(&self.path(name))
    }

    /// Ends the daemon as an operator would, after a look at its counters: nobody was at fault.
    pub(crate) fn expect_clean_end(self) {
        let statistics = self.statistics();
        for counter in FAULTS {
            assert_eq!(statistics.daemon(counter), 0, "{counter} in {statistics:?}");
        }
        assert_eq!(statistics.all_queues("broken"), 0, "{statistics:?}");
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
    }
}

/// Looks until there is something, or the time is over.
pub(crate) fn wait_for<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match look() {
            None if Instant::now() < deadline => thread::yield_now(),
            found => return found,
        }
    }
}

/// A connection to an endpoint: a viewer of a console, or the client of a data port.
pub(crate) struct Client {
    stream: UnixStream,
    /// What has come.
    seen: Vec<u8>,
    /// Up to where it has been searched.
    looked_at: usize,
}

impl Client {
    /// Connects to a socket.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path);
        let stream = stream.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        stream.set_read_timeout(Some(LIMIT)).expect("a socket takes a time limit");
        stream.set_write_timeout(Some(LIMIT)).expect("a socket takes a time limit");
        Self { stream, seen: Vec::new(), looked_at: 0 }
    }

    /// All that has come.
    pub(crate) fn seen(&self) -> &[u8] {
        &self.seen
    }

    pub(crate) fn type_text(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the daemon reads");
    }

    /// Reads up to and including the next `text`.
    pub(crate) fn expect(&mut self, text: &str) {
        loop {
            let unread = &self.seen[self.looked_at..];
            let found = unread.windows(text.len()).position(|part| part == text.as_bytes());
            if let Some(at) = found {
                self.looked_at += at + text.len();
                return;
            }
            self.take_some(text);
        }
    }

    /// Reads until so much has come since the beginning.
    pub(crate) fn expect_bytes(&mut self, count: usize) {
        while self.seen.len() < count {
            self.take_some(&format!("byte {count}"));
        }
    }

    fn take_some(&mut self, wanted: &str) {
        let mut buffer = [0; 4096];
        let why = match self.stream.read(&mut buffer) {
            Ok(0) => "the end".to_owned(),
            Ok(count) => return self.seen.extend_from_slice(&buffer[..count]),
            Err(error) => error.to_string(),
        };
        panic!("{why} instead of {wanted:?} after {:?}", String::from_utf8_lossy(&self.seen));
    }

    /// Reads a pattern, and nothing else.
    pub(crate) fn expect_pattern(&mut self, seed: u64, len_bytes: u64) {
        let (mut read, mut wanted) = (vec![0; STEP_BYTES], vec![0; STEP_BYTES]);
        let mut offset = 0;
        while offset < len_bytes {
            let step = usize::try_from(len_bytes - offset).unwrap_or(STEP_BYTES).min(STEP_BYTES);
            let (read, wanted) = (&mut read[..step], &mut wanted[..step]);
            let came = self.stream.read_exact(read);
            came.unwrap_or_else(|error| panic!("{error} after {offset} bytes"));
            pattern::fill(wanted, seed, offset);
            let other = read.iter().zip(&*wanted).position(|(read, wanted)| read != wanted);
            assert_eq!(other, None, "byte {offset} and so many is another");
            offset += step as u64;
        }
    }

    /// Writes a pattern.
    pub(crate) fn send_pattern(&mut self, seed: u64, len_bytes: u64) {
        pattern::write(&mut self.stream, seed, len_bytes).expect("the daemon reads");
    }

    /// The same connection once more, for another thread.
    pub(crate) fn another(&self) -> Self {
        let stream = self.stream.try_clone().expect("a descriptor can be duplicated");
        Self { stream, seen: Vec::new(), looked_at: 0 }
    }

    /// The socket itself.
    pub(crate) fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// Whether the other end has closed the connection, or nothing.
    pub(crate) fn expect_end(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error} instead of the end"),
        }
        self.seen.extend(rest);
    }
}
