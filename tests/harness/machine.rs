//! A guest as a process of the host: User-Mode Linux or an emulator, with its console captured and a deadline for all of it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use guest::announcement::Announcement;
use guest::verdict::Verdict;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::deadline::wait_for_exit;

/// A running guest. Dropping it kills its whole process group: an emulator's or UML's helpers go with it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    console: String,
    deadline: Instant,
}

/// What came of a look at a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The line.
    Line,
    /// Not yet the line.
    Silence,
    /// The guest's end, without it.
    End,
}

impl Machine {
    /// Starts `command`, whose stdout and stderr are the console and whose stdin is [`Machine::type_line`]'s. It must have
    /// done its work within `limit`: generous, since only a hanging guest reaches it.
    ///
    /// # Panics
    /// If the command cannot be started.
    pub fn start(mut command: Command, limit: Duration) -> Self {
        let (reader, writer) = io::pipe().expect("a pipe can be made");
        let stderr = writer.try_clone().expect("a descriptor can be duplicated");
        command.stdin(Stdio::piped()).stdout(writer).stderr(stderr).process_group(0);
        let mut child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        // The command holds the pipe's writing end: without it the console ends when the guest does.
        drop(command);
        let stdin = child.stdin.take();
        let (sender, lines) = channel();
        thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut line = Vec::new();
            // A console may emit any bytes; a line that is not UTF-8 is still a line.
            while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
                if sender.send(text).is_err() {
                    return;
                }
                line.clear();
            }
        });
        Self { child, stdin, lines, console: String::new(), deadline: Instant::now() + limit }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the guest has printed, as far as it has been read.
    pub fn console(&self) -> &str {
        &self.console
    }

    /// Waits for the first line that contains `text`, but no longer than this.
    pub fn look_for(&mut self, text: &str, time: Duration) -> Seen {
        let until = Instant::now() + time;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.take(&line);
                    if line.contains(text) {
                        return Seen::Line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return Seen::Silence,
                Err(RecvTimeoutError::Disconnected) => return Seen::End,
            }
        }
    }

    /// Types a line on the console.
    ///
    /// # Panics
    /// If the guest has closed its console.
    pub fn type_line(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is ours until the end");
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .expect("the guest reads its console");
    }

    /// Reads the console up to and including the first line that contains `text`, and returns that line.
    ///
    /// # Panics
    /// If the guest ends or the deadline passes before; the message has the console.
    pub fn wait_for(&mut self, text: &str) -> String {
        loop {
            match self.next_line() {
                Ok(line) if line.contains(text) => return line,
                Ok(_) => {}
                Err(why) => panic!("{why} before {text:?} was on the console:\n{}", self.console),
            }
        }
    }

    /// Reads the console until there was a line with each of these texts, in any order, and returns the first such lines.
    ///
    /// # Panics
    /// As [`Machine::wait_for`].
    pub fn wait_for_each<const N: usize>(&mut self, texts: [&str; N]) -> [String; N] {
        let mut found: [Option<String>; N] = [const { None }; N];
        while found.iter().any(Option::is_none) {
            let line = self.next_line().unwrap_or_else(|why| {
                panic!("{why} before {texts:?} were on the console:\n{}", self.console)
            });
            for (text, found) in texts.iter().zip(&mut found) {
                if found.is_none() && line.contains(text) {
                    *found = Some(line.clone());
                }
            }
        }
        found.map(Option::unwrap_or_default)
    }

    /// Reads the console up to the verdict of the guest's check, and returns its details.
    ///
    /// # Panics
    /// If the verdict is "fail", or there is none; the message has the console.
    pub fn expect_pass(&mut self) -> String {
        let line = self.wait_for(guest::verdict::MARK);
        match Verdict::parse(&line) {
            Some(Verdict::Pass(details)) => details,
            Some(Verdict::Fail(reason)) => {
                panic!("the check failed in the guest: {reason}\n{}", self.console)
            }
            None => panic!("no verdict in {line:?}\n{}", self.console),
        }
    }

    /// Reads the console up to the next announcement.
    ///
    /// # Panics
    /// If a verdict or the guest's end comes before, or the deadline passes; the message has the console.
    pub fn expect_announcement(&mut self) -> Announcement {
        loop {
            let line = self.next_line().unwrap_or_else(|why| {
                panic!("{why} before an announcement was on the console:\n{}", self.console)
            });
            if let Some(announcement) = Announcement::parse(&line) {
                return announcement;
            }
            if let Some(verdict) = Verdict::parse(&line) {
                panic!("instead of an announcement there was {verdict}\n{}", self.console);
            }
        }
    }

    /// Lets the guest run on for this time, or to its end, and takes what it prints meanwhile.
    pub fn run_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => self.take(&line),
                Err(_) => return,
            }
        }
    }

    /// Ends the guest as pulling its plug would, by SIGKILL, and returns all that it has ever printed.
    pub fn kill(mut self) -> String {
        self.end();
        while self.next_line().is_ok() {}
        std::mem::take(&mut self.console)
    }

    /// Reads the rest of the console and waits for the guest's process to end. An unhappy end shows the console.
    ///
    /// # Panics
    /// If it does not end before the deadline; the message has the console.
    pub fn wait(mut self) -> ExitStatus {
        while self.next_line().is_ok() {}
        let left = self.deadline.saturating_duration_since(Instant::now());
        let status = wait_for_exit(&mut self.child, left).expect("our own child can be waited for");
        let status = status
            .unwrap_or_else(|| panic!("the guest runs on after its deadline:\n{}", self.console));
        if !status.success() {
            eprintln!("the guest ended with {status}; its console:\n{}", self.console);
        }
        status
    }

    fn next_line(&mut self) -> Result<String, &'static str> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                self.take(&line);
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err("the deadline passed"),
            Err(RecvTimeoutError::Disconnected) => Err("the guest ended"),
        }
    }

    fn take(&mut self, line: &str) {
        self.console.push_str(line);
        self.console.push('\n');
    }

    fn end(&mut self) {
        // Fails only where the group is gone already.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}
