//! `vhost-console attach` at a real terminal, with a daemon that does what a test says.
//!
//! Contract: the program is started as a user would, on a pseudoterminal of the test's own; the daemon is two sockets,
//! a raw one and one of JSON lines. Each test waits for what it expects, under a deadline that only a broken program reaches.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon's sockets.
struct Daemon {
    directory: TempDir,
    console: UnixListener,
    commands: Option<mpsc::Receiver<Value>>,
    /// The role that `who` answers with; take-over and release change it.
    role: Arc<Mutex<&'static str>>,
}

impl Daemon {
    fn start(role: &'static str) -> Self {
        let mut daemon = Self::without_control();
        *daemon.role.lock().unwrap() = role;
        let control = UnixListener::bind(daemon.directory.path().join("control.sock")).unwrap();
        let (told, commands) = mpsc::channel();
        let role = Arc::clone(&daemon.role);
        // It ends with the test's process.
        thread::spawn(move || {
            for client in control.incoming() {
                let mut client = BufReader::new(client.unwrap());
                let mut line = String::new();
                client.read_line(&mut line).unwrap();
                let command: Value = serde_json::from_str(&line).unwrap();
                let mut role = role.lock().unwrap();
                let answer = match command["command"].as_str().unwrap() {
                    "who" => {
                        let you = &command["viewer"];
                        let viewers = json!([
                            { "id": "7", "pid": 17, "role": if *role == "writer" { "watcher" } else { "writer" } },
                            { "id": you, "pid": 18, "role": *role },
                        ]);
                        json!({ "ok": { "port": { "id": 0, "name": "" }, "role": *role, "viewers": viewers } })
                    }
                    "take-over" => {
                        *role = "writer";
                        json!({ "ok": {} })
                    }
                    "release" => {
                        *role = "watcher";
                        json!({ "ok": {} })
                    }
                    "size" => json!({ "ok": {} }),
                    other => json!({ "error": other }),
                };
                // Whoever waits for the command finds it answered or about to be.
                let _test_over = told.send(command);
                let _gone = client.get_mut().write_all(format!("{answer}\n").as_bytes());
            }
        });
        daemon.commands = Some(commands);
        daemon
    }

    fn without_control() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let console = UnixListener::bind(directory.path().join("console.sock")).unwrap();
        Self { directory, console, commands: None, role: Arc::new(Mutex::new("writer")) }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("console.sock")
    }

    /// The next client, with the name that it has bound its socket to.
    fn accept(&self) -> (UnixStream, String) {
        let (stream, address) = self.console.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let name = address.as_abstract_name().expect("it is bound");
        (stream, String::from_utf8(name.to_vec()).unwrap())
    }

    /// Waits for a command of that name.
    fn wait_for(&self, name: &str) -> Value {
        let commands = self.commands.as_ref().expect("it has a control socket");
        loop {
            let command = commands.recv_timeout(PATIENCE).expect(name);
            if command["command"] == name {
                return command;
            }
        }
    }
}

/// The program at a terminal.
struct Seat {
    child: Child,
    keyboard_and_screen: OwnedFd,
    /// The program's end.
    terminal: OwnedFd,
    modes_before: String,
    shown: Vec<u8>,
    /// How much of that earlier waits have been for.
    seen: usize,
}

impl Seat {
    fn take(daemon: &Daemon, options: &[&str]) -> Self {
        let (user, terminal) = pseudoterminal();
        resize(&user, 100, 30);
        let end = || Stdio::from(terminal.try_clone().unwrap());
        let modes_before = modes(&terminal);
        let child = attach()
            .arg(daemon.path())
            .args(options)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        Self {
            child,
            keyboard_and_screen: user,
            terminal,
            modes_before,
            shown: Vec::new(),
            seen: 0,
        }
    }

    fn type_keys(&self, mut keys: &[u8]) {
        while !keys.is_empty() {
            let typed = rustix::io::write(&self.keyboard_and_screen, keys).unwrap();
            keys = &keys[typed..];
        }
    }

    /// Reads what is shown until it ends in these bytes.
    fn wait_for_bytes(&mut self, wanted: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        let mut byte = [0];
        while !self.shown[self.seen..].ends_with(wanted) {
            let shown = || String::from_utf8_lossy(&self.shown);
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
            let mut screen = [PollFd::new(&self.keyboard_and_screen, PollFlags::IN)];
            let ready = poll(&mut screen, Some(&left)).unwrap();
            assert!(ready > 0, "{wanted:?} is not shown, only this: {}", shown());
            rustix::io::read(&self.keyboard_and_screen, &mut byte).unwrap();
            self.shown.extend(byte);
        }
        self.seen = self.shown.len();
    }

    fn wait_for(&mut self, wanted: &str) {
        self.wait_for_bytes(wanted.as_bytes());
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the program's end, and finds the terminal as it was.
    fn wait_restored(&mut self) -> ExitStatus {
        let status = wait(&mut self.child);
        assert_eq!(modes(&self.terminal), self.modes_before, "the terminal's modes");
        status
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // A test that has failed must not leave it.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn attach() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-console"));
    command.arg("attach");
    command
}

fn pseudoterminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let user = openpt(flags).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let terminal = ioctl_tiocgptpeer(&user, flags).unwrap();
    (user, terminal)
}

fn resize(user: impl AsFd, columns: u16, rows: u16) {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(user, size).unwrap();
}

fn modes(terminal: impl AsFd) -> String {
    format!("{:?}", tcgetattr(terminal).unwrap())
}

/// Waits for a process, by its descriptor.
fn wait(child: &mut Child) -> ExitStatus {
    let descriptor =
        rustix::process::pidfd_open(Pid::from_child(child), rustix::process::PidfdFlags::empty())
            .unwrap();
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&patience)).unwrap();
    assert!(ready > 0, "the program does not end");
    child.wait().unwrap()
}

fn read_exactly(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Bytes in an order that shows when some are lost or change places.
fn numbered_lines(bytes: usize) -> Vec<u8> {
    let lines = (0..).flat_map(|line: u32| format!("{line:07}\n").into_bytes());
    lines.take(bytes).collect()
}

#[test]
fn every_byte_passes_both_ways_and_detaching_restores_the_terminal() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &[]);
    let (mut stream, name) = daemon.accept();
    seat.wait_for("escape is ^]; ^] ? for help\r\n");
    let asked = daemon.wait_for("who");
    let id = name.strip_prefix("outboard/write/").expect(&name);
    assert_eq!(asked["viewer"], id);

    let all: Vec<u8> = (0..=255).collect();
    let typed = all.iter().flat_map(|byte| vec![*byte; if *byte == 0x1d { 2 } else { 1 }]);
    seat.type_keys(&typed.collect::<Vec<u8>>());
    assert_eq!(read_exactly(&mut stream, 256), all);
    stream.write_all(&all).unwrap();
    seat.wait_for_bytes(&all);
    seat.type_keys(b"\x1dsh");
    assert_eq!(read_exactly(&mut stream, 2), b"\x0fh");

    seat.type_keys(b"last\x1dd");
    seat.wait_for("detached\r\n");
    assert_eq!(seat.wait_restored().code(), Some(0));
    let mut last = String::new();
    stream.read_to_string(&mut last).unwrap();
    assert_eq!(last, "last");
}

#[test]
fn signals_restore_the_terminal() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let daemon = Daemon::start("writer");
        let mut seat = Seat::take(&daemon, &[]);
        let _stream = daemon.accept();
        daemon.wait_for("who");
        assert_ne!(modes(&seat.terminal), seat.modes_before, "it is raw meanwhile");
        seat.signal(signal);
        assert_eq!(seat.wait_restored().code(), Some(128 + signal.as_raw()));
    }
}

#[test]
fn end_of_the_daemon_is_told_after_all_that_was_said() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &[]);
    let (mut stream, _) = daemon.accept();
    daemon.wait_for("who");
    let said = numbered_lines(200 << 10);
    let reader = thread::spawn(move || {
        seat.wait_for_bytes(b"takes no more clients\r\n");
        seat
    });
    stream.write_all(&said).unwrap();
    drop(stream);
    let mut seat = reader.join().unwrap();
    assert_eq!(seat.wait_restored().code(), Some(1));
    assert!(seat.shown.windows(said.len()).any(|shown| shown == said), "something is missing");
    let shown = String::from_utf8_lossy(&seat.shown);
    assert!(shown.contains(&*daemon.path().to_string_lossy()));
}

#[test]
fn daemon_with_unread_input_ends_the_session_too() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &[]);
    let (stream, _) = daemon.accept();
    daemon.wait_for("who");
    seat.type_keys(b"\x1d?unread");
    seat.wait_for("itself\r\n");
    drop(stream);
    seat.wait_for("takes no more clients\r\n");
    assert_eq!(seat.wait_restored().code(), Some(1));
}

#[test]
fn window_size_is_told_by_the_writer_only() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &[]);
    let _stream = daemon.accept();
    let size = |columns: u16, rows: u16| json!({ "command": "size", "port": "0", "columns": columns, "rows": rows });
    assert_eq!(daemon.wait_for("size"), size(100, 30));
    resize(&seat.keyboard_and_screen, 132, 43);
    seat.signal(Signal::WINCH);
    assert_eq!(daemon.wait_for("size"), size(132, 43));

    seat.type_keys(b"\x1dr");
    seat.wait_for("released: process 17 types, you watch; ^] t takes over\r\n");
    resize(&seat.keyboard_and_screen, 20, 10);
    seat.signal(Signal::WINCH);
    daemon.wait_for("who");
    resize(&seat.keyboard_and_screen, 80, 25);
    seat.type_keys(b"\x1dt");
    // Not 20 by 10: a watcher keeps his window's size to himself.
    assert_eq!(daemon.wait_for("size"), size(80, 25));
    seat.wait_for("you type now\r\n");
}

#[test]
fn commands_are_answered_below_what_is_shown() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &["--escape", "^A"]);
    let (mut stream, name) = daemon.accept();
    daemon.wait_for("who");
    stream.write_all(b"login: ").unwrap();
    seat.wait_for("login: ");
    seat.type_keys(b"\x01?");
    seat.wait_for("\r\n  ^A ?       this help\r\n");
    seat.wait_for("  ^A ^A      ^A itself\r\n");
    seat.type_keys(b"\x01w");
    let id = name.strip_prefix("outboard/write/").expect(&name);
    seat.wait_for("  7              17  watcher\r\n");
    seat.wait_for(&format!("  {}       18  writer  (you)\r\n", &id[..8]));
    seat.type_keys(b"\x01x");
    seat.wait_for("^A x means nothing; ^A ? for help\r\n");
    seat.type_keys(b"\x01.");
    assert_eq!(seat.wait_restored().code(), Some(0));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "a command was sent as input");
}

#[test]
fn who_does_not_type_is_told_that_nothing_is_sent() {
    let daemon = Daemon::start("watcher");
    let mut seat = Seat::take(&daemon, &[]);
    let (mut stream, _) = daemon.accept();
    seat.wait_for("process 17 types, you watch; ^] t takes over\r\n");
    // Once a second at most it is said again; until then a key is silently kept back.
    let told = "not sent: process 17 types, you watch; ^] t takes over\r\n";
    let deadline = Instant::now() + PATIENCE;
    while !String::from_utf8_lossy(&seat.shown).contains(told) {
        assert!(Instant::now() < deadline, "nobody says that nothing is sent");
        seat.type_keys(b"lost\x1dx");
        seat.wait_for("^] x means nothing; ^] ? for help\r\n");
    }
    seat.type_keys(b"\x1dt");
    seat.wait_for("you type now\r\n");
    seat.type_keys(b"sent\x1dd");
    assert_eq!(seat.wait_restored().code(), Some(0));
    let mut sent = String::new();
    stream.read_to_string(&mut sent).unwrap();
    assert_eq!(sent, "sent");
}

#[test]
fn only_watching_sends_nothing_and_takes_nothing_over() {
    let daemon = Daemon::start("watcher");
    let mut seat = Seat::take(&daemon, &["--watch"]);
    let (mut stream, name) = daemon.accept();
    assert!(name.starts_with("outboard/watch/"), "{name}");
    stream.write_all(b"output").unwrap();
    seat.wait_for("output");
    seat.type_keys(b"keys\x1dsb");
    seat.wait_for("not sent: --watch only watches\r\n");
    seat.type_keys(b"\x1dt");
    seat.wait_for("--watch only watches\r\n");
    seat.type_keys(b"\x1dd");
    assert_eq!(seat.wait_restored().code(), Some(0));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "something was sent");
    assert_eq!(*daemon.role.lock().unwrap(), "watcher");
}

#[test]
fn without_a_control_socket_only_the_extras_are_missing() {
    let daemon = Daemon::without_control();
    let mut seat = Seat::take(&daemon, &["--control", "/nowhere/control.sock"]);
    let (mut stream, _) = daemon.accept();
    for key in [&b"\x1dw"[..], b"\x1dt", b"\x1dr"] {
        seat.type_keys(key);
        seat.wait_for("no control socket at /nowhere/control.sock: No such file or directory");
    }
    seat.type_keys(b"typed\x1dd");
    assert_eq!(seat.wait_restored().code(), Some(0));
    let mut typed = String::new();
    stream.read_to_string(&mut typed).unwrap();
    assert_eq!(typed, "typed");
}

#[test]
fn paste_that_nobody_reads_waits_and_the_escape_still_works() {
    let daemon = Daemon::start("writer");
    let mut seat = Seat::take(&daemon, &[]);
    let (mut stream, _) = daemon.accept();
    daemon.wait_for("who");
    // More than sockets hold; as it comes from a terminal, in small pieces.
    let paste = numbered_lines(768 << 10);
    seat.type_keys(&paste);
    seat.type_keys(b"\x1d?");
    seat.wait_for("itself\r\n");
    assert_eq!(read_exactly(&mut stream, paste.len()), paste);
    seat.type_keys(&paste);
    seat.type_keys(b"\x1dd");
    assert_eq!(seat.wait_restored().code(), Some(0));
}

#[test]
fn paste_of_a_mebibyte_and_more_arrives_whole() {
    let daemon = Daemon::start("writer");
    let seat = Seat::take(&daemon, &[]);
    let (mut stream, _) = daemon.accept();
    daemon.wait_for("who");
    let paste = numbered_lines(3 << 20);
    let wanted = paste.clone();
    let typing = thread::spawn(move || {
        seat.type_keys(&paste);
        seat
    });
    assert_eq!(read_exactly(&mut stream, wanted.len()), wanted);
    drop(typing.join().unwrap());
}

#[test]
fn terminal_that_goes_ends_the_session() {
    let daemon = Daemon::start("writer");
    let (user, terminal) = pseudoterminal();
    let end = || Stdio::from(terminal.try_clone().unwrap());
    let mut child =
        attach().arg(daemon.path()).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
    let _stream = daemon.accept();
    daemon.wait_for("who");
    drop((user, terminal));
    assert_eq!(wait(&mut child).code(), Some(1));
}

#[test]
fn script_copies_both_ways_to_the_end() {
    let daemon = Daemon::start("writer");
    let mut child = attach()
        .arg(daemon.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stream, _) = daemon.accept();
    // Escapes are bytes like any others.
    let sent: Vec<u8> = numbered_lines(2 << 20).into_iter().chain(*b"\x1d.\x1dd\x00").collect();
    let mut stdin = child.stdin.take().unwrap();
    let written = sent.clone();
    let writer = thread::spawn(move || stdin.write_all(&written).unwrap());
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent, "{} bytes of {} arrived", received.len(), sent.len());
    // The input has ended, and half of the connection; what is said now is still shown.
    let mut stdout = child.stdout.take().unwrap();
    let reader = thread::spawn(move || {
        let mut shown = Vec::new();
        stdout.read_to_end(&mut shown).map(|_| shown)
    });
    stream.write_all(&sent).unwrap();
    drop(stream);
    assert!(reader.join().unwrap().unwrap() == sent, "output is missing");
    assert_eq!(wait(&mut child).code(), Some(0));
    assert_eq!(io::read_to_string(child.stderr.take().unwrap()).unwrap(), "");
}

#[test]
fn script_that_loses_its_daemon_fails() {
    let daemon = Daemon::without_control();
    for options in [&[][..], &["--watch"]] {
        let mut child = attach()
            .arg(daemon.path())
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(daemon.accept());
        assert_eq!(wait(&mut child).code(), Some(1));
        let said = io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert!(said.contains("has closed the connection"), "{said}");
    }
}

#[test]
fn script_is_told_that_somebody_else_types() {
    let daemon = Daemon::start("watcher");
    let mut child = attach()
        .arg(daemon.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stream, _) = daemon.accept();
    child.stdin.take().unwrap().write_all(b"reboot\n").unwrap();
    let mut sent = String::new();
    stream.read_to_string(&mut sent).unwrap();
    assert_eq!(sent, "reboot\n");
    drop(stream);
    assert_eq!(wait(&mut child).code(), Some(0));
    let said = io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(said.contains("may discard the input: process 17 types"), "{said}");
}

#[test]
fn screen_that_cannot_be_written_to_fails_the_script() {
    let daemon = Daemon::without_control();
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut child = attach()
        .arg(daemon.path())
        .stdin(Stdio::piped())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stream, _) = daemon.accept();
    stream.write_all(b"output").unwrap();
    assert_eq!(wait(&mut child).code(), Some(1));
    let said = io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert!(said.contains("output cannot be written: Broken pipe"), "{said}");
}

#[test]
fn no_daemon_is_1_and_wrong_usage_is_2() {
    let output = attach().arg("/nowhere/console.sock").stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot connect to /nowhere/console.sock: No such file"), "{said}");
    for wrong in [&[][..], &["a", "b"], &["--escape", "no", "a"]] {
        let output = attach().args(wrong).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("--help"), "{wrong:?}: {said}");
    }
}
