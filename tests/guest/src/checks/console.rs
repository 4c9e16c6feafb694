//! Consoles and data ports that do what the host types, line by line. It types on another console than those.
//!
//! | line | what is done before it is answered |
//! |---|---|
//! | `login DEVICE` | a login prompt is on a console from now on; root has no password |
//! | `await NAME` | there is a port of this name |
//! | `await-gone NAME` | there is none, and its device is gone |
//! | `open NAME` | a port, or a console such as `hvc0`, is open; a console gives and takes any bytes |
//! | `close NAME` | it is not |
//! | `send NAME SEED BYTES` | a pattern is written |
//! | `receive NAME SEED BYTES` | a pattern is read |
//! | `drain NAME` | all is read up to the end of file; the answer has how much |
//! | `reflect NAME COUNT` | that many bytes were sent back, each by itself |
//! | `write NAME BYTES STEP` | zeroes are written, a step at a time; the answer has the microseconds it took |
//! | `swallow NAME BYTES` | so much is read, whatever it is; the answer has the microseconds it took |
//! | `run SCRIPT` | a script of the shell's has succeeded |
//! | `count SCRIPT` | one has; the answer has the number that it printed |
//! | `begin LINE` | nothing yet: the line is done meanwhile |
//! | `finish` | the line that was begun first is done; its answer |
//! | `end` | the check passes |
//!
//! The first answer says that the drivers are loaded.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use guest::announcement::Announcement;
use guest::pattern;
use rustix::fs::OFlags;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketType, bind, recv, socket};

use super::network::BUSYBOX;
use super::{Failure, run_program};

/// Where the kernel lists ports.
const PORTS: &str = "/sys/class/virtio-ports";
/// The group of the kernel's own notices of devices.
const KERNEL_S: u32 = 1;
/// A notice is shorter, and what it says is looked up.
const NOTICE_BYTES: usize = 16 << 10;
/// What is read or written at once: more than the driver takes.
const STEP_BYTES: usize = 64 << 10;

pub(super) fn run() -> Result<String, Failure> {
    // Without a password, and at once.
    fs::create_dir_all("/etc")?;
    fs::write("/etc/passwd", "root::0:0:root:/:/bin/sh\n")?;
    install_commands()?;
    println!("{}", Announcement::Loaded);
    let mut files = HashMap::new();
    let mut begun = VecDeque::new();
    for (count, line) in io::stdin().lines().enumerate() {
        let line = line?;
        let answer = match line.split_once(' ').unwrap_or((&line, "")) {
            ("end", "") => return Ok(format!("{count} lines")),
            ("begin", rest) => Task::parse(rest, &mut files).map(|task| {
                begun.push_back(thread::spawn(move || task.run().map_err(|why| why.to_string())));
                Announcement::Done
            }),
            ("finish", "") => finish(begun.pop_front()),
            _ => Task::parse(&line, &mut files).and_then(Task::run),
        };
        println!("{}", answer.map_err(|error| format!("{line}: {error}"))?);
    }
    Err("the console is closed".into())
}

type Begun = JoinHandle<Result<Announcement, String>>;

fn finish(begun: Option<Begun>) -> Result<Announcement, Failure> {
    let begun = begun.ok_or("none was begun")?;
    Ok(begun.join().unwrap_or_else(|panic| resume_unwind(panic))?)
}

/// What a line asks for.
enum Task {
    /// It is done already.
    Nothing,
    Login(PathBuf),
    Await(String),
    AwaitGone(String),
    Send {
        to: Arc<File>,
        seed: u64,
        len_bytes: u64,
    },
    Receive {
        from: Arc<File>,
        seed: u64,
        len_bytes: u64,
    },
    Drain(Arc<File>),
    Reflect(Arc<File>, u64),
    Write {
        to: Arc<File>,
        len_bytes: usize,
        step_bytes: usize,
    },
    Swallow {
        from: Arc<File>,
        len_bytes: u64,
    },
    Run(String),
    Count(String),
}

impl Task {
    fn parse(line: &str, files: &mut HashMap<String, Arc<File>>) -> Result<Self, Failure> {
        let words: Vec<_> = line.split_whitespace().collect();
        let file = |name: &str| files.get(name).cloned().ok_or(format!("{name} is not open"));
        Ok(match &*words {
            ["login", device] => Self::Login(Path::new("/dev").join(device)),
            ["await", name] => Self::Await((*name).to_owned()),
            ["await-gone", name] => Self::AwaitGone((*name).to_owned()),
            ["open", name] => {
                files.insert((*name).to_owned(), Arc::new(open(name)?));
                Self::Nothing
            }
            ["close", name] => {
                files.remove(*name).ok_or("it is not open")?;
                Self::Nothing
            }
            ["send", name, seed, len_bytes] => {
                Self::Send { to: file(name)?, seed: seed.parse()?, len_bytes: len_bytes.parse()? }
            }
            ["receive", name, seed, len_bytes] => {
                let (seed, len_bytes) = (seed.parse()?, len_bytes.parse()?);
                Self::Receive { from: file(name)?, seed, len_bytes }
            }
            ["drain", name] => Self::Drain(file(name)?),
            ["reflect", name, count] => Self::Reflect(file(name)?, count.parse()?),
            ["write", name, len_bytes, step_bytes] => {
                let (len_bytes, step_bytes) = (len_bytes.parse()?, step_bytes.parse()?);
                Self::Write { to: file(name)?, len_bytes, step_bytes }
            }
            ["swallow", name, len_bytes] => {
                Self::Swallow { from: file(name)?, len_bytes: len_bytes.parse()? }
            }
            ["run", words @ ..] => Self::Run(words.join(" ")),
            ["count", words @ ..] => Self::Count(words.join(" ")),
            _ => return Err("nobody knows how".into()),
        })
    }

    fn run(self) -> Result<Announcement, Failure> {
        match self {
            Self::Nothing => {}
            Self::Login(device) => login(&device)?,
            Self::Await(name) => await_port(|| find(&name).is_some())?,
            Self::AwaitGone(name) => await_port(|| find(&name).is_none())?,
            Self::Send { to, seed, len_bytes } => pattern::write(&mut &*to, seed, len_bytes)?,
            Self::Receive { from, seed, len_bytes } => receive(&from, seed, len_bytes)?,
            Self::Drain(from) => return Ok(Announcement::Found(drain(&from)?)),
            Self::Reflect(file, count) => reflect(&file, count)?,
            Self::Write { to, len_bytes, step_bytes } => {
                return timed(|| write_zeroes(&to, len_bytes, step_bytes));
            }
            Self::Swallow { from, len_bytes } => return timed(|| swallow(&from, len_bytes)),
            Self::Run(script) => run_program(&mut shell(&script))?,
            Self::Count(script) => return Ok(Announcement::Found(count(&script)?)),
        }
        Ok(Announcement::Done)
    }
}

/// What scripts call, by its usual names.
pub(super) fn install_commands() -> Result<(), Failure> {
    run_program(Command::new(BUSYBOX).args(["--install", "-s", "/bin"]))
}

pub(super) fn shell(script: &str) -> Command {
    let mut command = Command::new(BUSYBOX);
    // The console that the host types on is ours.
    command.args(["sh", "-c", script]).env("PATH", "/bin").stdin(Stdio::null());
    command
}

fn count(script: &str) -> Result<u64, Failure> {
    let output = shell(script).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let number = said.trim().parse();
    Ok(number.map_err(|error| format!("{script:?} printed {said:?}: {error}"))?)
}

/// The program ends with the guest, or when somebody logs out; then there is no further prompt.
fn login(device: &Path) -> Result<(), Failure> {
    let mut getty = Command::new(BUSYBOX);
    getty.args(["getty", "-L", "0"]).arg(device).arg("vt100");
    getty.env("PATH", "/bin").stdin(Stdio::null()).spawn()?;
    Ok(())
}

/// The device of the port with this name.
fn find(name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(PORTS).ok()?;
    entries.filter_map(Result::ok).find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Waits until something holds of ports. The kernel tells of each change of a device.
fn await_port(holds: impl Fn() -> bool) -> Result<(), Failure> {
    let notices = socket(AddressFamily::NETLINK, SocketType::DGRAM, Some(KOBJECT_UEVENT))?;
    bind(&notices, &SocketAddrNetlink::new(0, KERNEL_S))?;
    let mut notice = vec![0; NOTICE_BYTES];
    while !holds() {
        recv(&notices, &mut *notice, RecvFlags::empty())?;
    }
    Ok(())
}

fn open(name: &str) -> Result<File, Failure> {
    let is_console = name.starts_with("hvc");
    let path = if is_console {
        Path::new("/dev").join(name)
    } else {
        find(name).ok_or("there is no port of this name")?
    };
    // It must not become this process's terminal.
    let flags = i32::try_from(OFlags::NOCTTY.bits())?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    let file = file.map_err(|error| format!("{}: {error}", path.display()))?;
    if is_console {
        // As long as it is open.
        let stdin = file.try_clone()?;
        run_program(Command::new(BUSYBOX).args(["stty", "raw", "-echo"]).stdin(stdin))?;
    }
    Ok(file)
}

fn receive(mut from: &File, seed: u64, len_bytes: u64) -> Result<(), Failure> {
    let (mut read, mut wanted) = (vec![0; STEP_BYTES], vec![0; STEP_BYTES]);
    let mut offset = 0;
    while offset < len_bytes {
        let step = usize::try_from(len_bytes - offset).unwrap_or(STEP_BYTES).min(STEP_BYTES);
        let (read, wanted) = (&mut read[..step], &mut wanted[..step]);
        from.read_exact(read).map_err(|error| format!("after {offset} bytes: {error}"))?;
        pattern::fill(wanted, seed, offset);
        if let Some(at) = read.iter().zip(&*wanted).position(|(read, wanted)| read != wanted) {
            return Err(format!("byte {} is another", offset + at as u64).into());
        }
        offset += step as u64;
    }
    Ok(())
}

fn drain(mut from: &File) -> io::Result<u64> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut len_bytes = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(len_bytes),
            count => len_bytes += count as u64,
        }
    }
}

fn reflect(mut file: &File, count: u64) -> io::Result<()> {
    let mut byte = [0];
    for _ in 0..count {
        file.read_exact(&mut byte)?;
        file.write_all(&byte)?;
    }
    Ok(())
}

fn write_zeroes(mut to: &File, len_bytes: usize, step_bytes: usize) -> io::Result<()> {
    let step = vec![0; step_bytes];
    let mut left = len_bytes;
    while left > 0 {
        let count = left.min(step_bytes);
        to.write_all(&step[..count])?;
        left -= count;
    }
    Ok(())
}

fn swallow(from: &File, len_bytes: u64) -> io::Result<()> {
    let count = io::copy(&mut from.take(len_bytes), &mut io::sink())?;
    if count < len_bytes { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> Result<Announcement, Failure> {
    let started = Instant::now();
    work()?;
    Ok(Announcement::Found(u64::try_from(started.elapsed().as_micros())?))
}
