//! People at a guest's console, each at a terminal: `vhost-console attach` driven as they would, in tmux, at the guest of `make run`.
//!
//! Contract: what is typed goes to a window of tmux, and what is waited for stands on its screen. Whenever something was shown, the
//! screen is looked at again; nothing is looked at again and again.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use tests::{Rig, cannot_run, program, temp_dir};

/// A guest that boots takes seconds; this is for a machine that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn people_at_terminals_share_a_console() {
    let Some(rig) = Rig::find() else { return };
    if let Err(error) = rig.tool("tmux").arg("-V").output() {
        return cannot_run(&format!("cannot run tmux: {error}"));
    }
    let directory = temp_dir();
    let tmux = Tmux { rig, socket: directory.path().join("tmux") };

    let first = tmux.window(directory.path(), "first");
    first.type_line(r#""$RUN" "$DISK" "$NET" "$CONSOLE"; echo "ended: $?""#);
    first.wait_for("outboard:~#");
    first.resize(110, 32);
    first.type_line("stty size");
    first.wait_for("\n32 110\n");
    first.press(&["C-]", "?"]);
    first.wait_for("^] ?       this help");
    first.press(&["C-]", "w"]);
    first.wait_for("writer  (you)");

    let second = tmux.window(directory.path(), "second");
    let socket = console_socket(directory.path());
    second.type_line("stty -g >\"$TMPDIR/modes\"");
    second.type_line(&format!(
        "\"$CONSOLE\" attach {}; echo \"ended: $?\"; stty -g | cmp - \"$TMPDIR/modes\" && echo \"as before\"",
        socket.display()
    ));
    // Who comes late sees what was said before.
    second.wait_for("stty size\n32 110\n");
    second.wait_for("types, you watch; ^] t takes over");
    second.press(&["C-]", "t"]);
    second.wait_for("you type now");
    second.type_line("echo two''hands");
    second.wait_for("\ntwohands\n");
    first.wait_for("\ntwohands\n");
    second.resize(90, 25);
    second.type_line("stty size");
    second.wait_for("\n25 90\n");
    second.press(&["C-]", "s", "h"]);
    second.wait_for("sysrq: HELP");

    second.press(&["C-]", "d"]);
    second.wait_for("\nended: 0\nas before\n");
    first.press(&["C-]", "t"]);
    first.wait_for("you type now");
    first.type_line("poweroff");
    first.wait_for("file system is clean");
    first.wait_for("\nended: 0\n");
}

/// Where the guest's console is: `run` has it in a directory of its own.
fn console_socket(directory: &Path) -> PathBuf {
    let entries = fs::read_dir(directory).expect("it is ours");
    let sockets = entries.map(|entry| entry.expect("a listed entry").path().join("console.sock"));
    sockets.into_iter().find(|path| path.exists()).expect("a console that is shown has a socket")
}

/// A server of tmux, which ends with its owner.
struct Tmux {
    rig: Rig,
    socket: PathBuf,
}

impl Tmux {
    /// A window of 100 columns and 30 rows with a shell.
    fn window(&self, directory: &Path, name: &str) -> Window<'_> {
        let news = directory.join(name);
        mknodat(CWD, &news, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
        let flags = OFlags::NONBLOCK.bits() as i32;
        // Open for both, so that it never ends.
        let pipe = File::options().read(true).write(true).custom_flags(flags).open(&news);
        let window = Window { tmux: self, name: name.to_owned(), news: pipe.expect("our FIFO") };
        let shell = ["-d", "-x", "100", "-y", "30", "-s", name, "exec /bin/sh"];
        self.run(["new-session"].into_iter().chain(shell), directory);
        let copy = format!("exec cat >'{}'", news.display());
        self.run(["pipe-pane", "-t", name, &copy], directory);
        window
    }

    fn run(&self, words: impl IntoIterator<Item = impl AsRef<OsStr>>, directory: &Path) -> String {
        let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/run");
        let output = self
            .command()
            .args(words)
            .env("RUN", run)
            .env("DISK", program("vhost-blk"))
            .env("NET", program("vhost-net"))
            .env("CONSOLE", program("vhost-console"))
            .env("TMPDIR", directory)
            .env("PS1", "host: ")
            .output()
            .expect("tmux has been run before");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tmux: {}: {said}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn command(&self) -> Command {
        let mut command = self.rig.tool("tmux");
        command.args(["-f", "/dev/null", "-S"]).arg(&self.socket);
        command
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        // What runs in its windows is hung up. A test that has not come so far has none.
        let _none = self.command().arg("kill-server").output();
    }
}

struct Window<'a> {
    tmux: &'a Tmux,
    name: String,
    /// Can be read when something was shown.
    news: File,
}

impl Window<'_> {
    fn ask(&self, words: &[&str]) -> String {
        let (command, rest) = words.split_first().expect("a command of tmux");
        let words = [command, "-t", &self.name].into_iter().chain(rest.iter().copied());
        self.tmux.run(words, &std::env::temp_dir())
    }

    /// Presses keys, by tmux's names.
    fn press(&self, keys: &[&str]) {
        self.ask(&[&["send-keys"], keys].concat());
    }

    fn type_line(&self, line: &str) {
        self.ask(&["send-keys", "-l", line]);
        self.press(&["Enter"]);
    }

    fn resize(&self, columns: u16, rows: u16) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.ask(&["resize-window", "-x", &columns, "-y", &rows]);
    }

    /// Waits until the screen, or what has scrolled off it, has this text; lines that are wrapped count as one.
    fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let screen = self.ask(&["capture-pane", "-p", "-J", "-S", "-"]);
            let lines: Vec<&str> = screen.lines().map(str::trim_end).collect();
            if format!("\n{}\n", lines.join("\n")).contains(text) {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
            let shown = poll(&mut [PollFd::new(&self.news, PollFlags::IN)], Some(&left));
            assert!(shown.is_ok_and(|shown| shown > 0), "{text:?} is not shown:\n{screen}");
            self.drain();
        }
    }

    fn drain(&self) {
        let mut bytes = [0; 4096];
        loop {
            match (&self.news).read(&mut bytes) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("the FIFO cannot be read: {error}"),
            }
        }
    }
}
