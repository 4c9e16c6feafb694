//! A network namespace: a host of its own for the interfaces, addresses and servers of a test.
//!
//! Contract: it lasts as long as its value, or this process where that is killed: a child that waits for the end of its input
//! holds it. With it go its interfaces. Tests in different ones cannot meet, whatever names and addresses they choose.
//!
//! What is run in it also sees its own `/sys`, which has the interfaces' attributes there. Files are the same everywhere.
//!
//! Deliberately absent: namespaces without root. A user namespace would give them, but neither taps (`/dev/net/tun` is often
//! root's) nor captures.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::requirement::{cannot_run, lacks_root};
use crate::{Rig, tap};

/// Waits for its input to end, once `/sys` shows the namespace's own interfaces.
const HOLDER: &str = "mount -t sysfs sysfs /sys && echo ready && exec cat";
/// Macvtaps that one process may make: their numbers are apart from other processes' by so much.
const MACVTAPS_OF_A_PROCESS: u32 = 64;
/// Interface numbers below are those that the kernel gives by itself.
const FIRST_MACVTAP: u32 = 100_000;

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    rig: Rig,
    holder: Child,
}

/// How a tap is opened: so must be whoever serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// By one queue.
    SingleQueue,
    /// By any number of queues.
    MultiQueue,
}

impl Namespace {
    /// A namespace whose only interface is its loopback, which is up. `None`, and why on stderr, where there cannot be one.
    ///
    /// # Panics
    /// If root cannot make one where all tests must run.
    pub fn new(rig: &Rig) -> Option<Self> {
        if lacks_root("a network namespace") {
            return None;
        }
        let started = Command::new("unshare")
            .args(["--net", "--mount", "sh", "-c", HOLDER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let holder = match started {
            Ok(holder) => holder,
            Err(error) => {
                cannot_run(&format!("cannot run unshare: {error}"));
                return None;
            }
        };
        let mut namespace = Self { rig: rig.clone(), holder };
        let mut line = String::new();
        let stdout = namespace.holder.stdout.take().expect("it was piped");
        BufReader::new(stdout).read_line(&mut line).expect("a pipe can be read");
        if line.trim_end() != "ready" {
            let why = namespace.holder.stderr.take().expect("it was piped");
            let why: Vec<_> = BufReader::new(why).lines().map_while(Result::ok).collect();
            cannot_run(&format!("there is no network namespace: {}", why.join("; ")));
            return None;
        }
        namespace.ip("link set lo up");
        Some(namespace)
    }

    /// A command that runs a program of the host in the namespace. Its path must be absolute or in the search path, for the
    /// program starts in `/`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut words = self.launcher().into_iter();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).arg(program);
        command
    }

    /// The same with a tool of the rig.
    pub fn tool(&self, name: &str) -> Command {
        self.command(self.rig.tool(name).get_program())
    }

    /// What a command line begins with that is to run in the namespace: for [`crate::DaemonCommand::through`].
    pub fn launcher(&self) -> Vec<OsString> {
        ["nsenter".into(), self.handle("--net", "net"), self.handle("--mount", "mnt"), "--".into()]
            .into()
    }

    /// Does `work` on a thread in the namespace: sockets that it makes are the namespace's wherever they are used, and it sees
    /// the namespace's `/proc/sys/net`.
    ///
    /// # Panics
    /// If `work` does.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/proc/{}/ns/net", self.holder.id());
        let namespace = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let inside = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("root may enter a namespace");
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Runs `ip` with these words: `link set eth0 mtu 9000`, `address add 10.0.0.1/24 dev eth0`, `link delete eth0`.
    ///
    /// # Panics
    /// If it fails; the message has what it said.
    pub fn ip(&self, words: &str) {
        self.succeed("ip", words);
    }

    /// Runs `ethtool` with these words: `--offload eth0 tx off tso off`.
    ///
    /// # Panics
    /// If it fails; the message has what it said.
    pub fn ethtool(&self, words: &str) {
        self.succeed("ethtool", words);
    }

    /// Makes a tap, which is up. It stays when nobody has it open; then it has no carrier.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_tap(&self, name: &str, tap: Tap) {
        let queues = if tap == Tap::MultiQueue { " multi_queue" } else { "" };
        self.ip(&format!("tuntap add dev {name} mode tap vnet_hdr{queues}"));
        self.ip(&format!("link set {name} up"));
    }

    /// Opens a tap of one queue, as whoever passes one to a daemon does, or whoever is at its other end. Reads do not block.
    /// Before each frame there is a `struct virtio_net_hdr` of 10 bytes.
    ///
    /// # Panics
    /// If it cannot be opened.
    pub fn open_tap(&self, name: &str) -> File {
        self.run(|| tap::open(name)).unwrap_or_else(|error| panic!("the tap {name}: {error}"))
    }

    /// Makes a pair of interfaces, each of which receives what is sent by the other, and sets both up: `name` is here and
    /// `peer_name` in `peer`.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_veth(&self, name: &str, peer: &Self, peer_name: &str) {
        let there = peer.holder.id();
        self.ip(&format!("link add {name} type veth peer name {peer_name} netns {there}"));
        self.ip(&format!("link set {name} up"));
        peer.ip(&format!("link set {peer_name} up"));
    }

    /// Makes a bridge of these interfaces, which is up.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_bridge(&self, name: &str, ports: &[&str]) {
        self.ip(&format!("link add {name} type bridge"));
        for port in ports {
            self.ip(&format!("link set {port} master {name}"));
        }
        self.ip(&format!("link set {name} up"));
    }

    /// Makes a macvtap on `parent`, which is up. Its number, after which the node in `/dev` is named, is no other
    /// namespace's: `/dev` has the nodes of all.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn add_macvtap(&self, name: &str, parent: &str) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        assert!(count < MACVTAPS_OF_A_PROCESS, "more than {MACVTAPS_OF_A_PROCESS} macvtaps");
        let index = FIRST_MACVTAP + std::process::id() * MACVTAPS_OF_A_PROCESS + count;
        self.ip(&format!(
            "link add link {parent} name {name} index {index} type macvtap mode bridge"
        ));
        self.ip(&format!("link set {name} up"));
    }

    /// The number of an interface.
    ///
    /// # Panics
    /// If there is no such interface.
    pub fn index(&self, interface: &str) -> u32 {
        let path = format!("/sys/class/net/{interface}/ifindex");
        let output = self.command("cat").arg(&path).output().expect("cat is there");
        let index = String::from_utf8_lossy(&output.stdout);
        index.trim().parse().unwrap_or_else(|_| panic!("{path}: {output:?}"))
    }

    /// Whether a macvtap can be made on `parent`; says so where the kernel has none.
    ///
    /// # Panics
    /// Where all tests must run.
    pub fn has_macvtaps(&self, parent: &str) -> bool {
        let words = format!("link add link {parent} name probe type macvtap mode bridge");
        let made = self.tool("ip").args(words.split_whitespace()).output();
        let made = made.expect("the rig has ip");
        if made.status.success() {
            self.ip("link delete probe");
        } else {
            let error = String::from_utf8_lossy(&made.stderr);
            cannot_run(&format!("this kernel makes no macvtap: {}", error.trim()));
        }
        made.status.success()
    }

    /// Gives an interface an address, with its prefix length. An IPv6 address is of use at once: nobody is asked whether it is
    /// taken.
    ///
    /// # Panics
    /// If it cannot be added.
    pub fn add_address(&self, interface: &str, address: &str) {
        let unasked = if address.contains(':') { " nodad" } else { "" };
        self.ip(&format!("address add {address} dev {interface}{unasked}"));
    }

    fn succeed(&self, tool: &str, words: &str) {
        let output = self.tool(tool).args(words.split_whitespace()).output();
        let output = output.unwrap_or_else(|error| panic!("cannot run {tool}: {error}"));
        assert!(
            output.status.success(),
            "{tool} {words}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn handle(&self, option: &str, kind: &str) -> OsString {
        format!("{option}=/proc/{}/ns/{kind}", self.holder.id()).into()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for already.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::path::Path;

    use super::{Namespace, Tap};
    use crate::Rig;

    #[test]
    fn sockets_and_interfaces_of_namespaces_are_their_own() {
        let Some(rig) = Rig::find() else { return };
        let (Some(one), Some(other)) = (Namespace::new(&rig), Namespace::new(&rig)) else { return };
        one.add_veth("eth0", &other, "eth0");
        one.add_address("eth0", "198.51.100.1/24");
        other.add_address("eth0", "198.51.100.2/24");
        let listener =
            one.run(|| TcpListener::bind("198.51.100.1:7")).expect("the address is there");
        let mut sent = other.run(|| TcpStream::connect("198.51.100.1:7")).expect("both are up");
        sent.write_all(b"x").expect("they are connected");
        let (mut received, from) = listener.accept().expect("it was connected to");
        assert_eq!(from.ip().to_string(), "198.51.100.2");
        let mut byte = [0];
        received.read_exact(&mut byte).expect("a byte was sent");
        assert_eq!(&byte, b"x");
        let error = TcpListener::bind("198.51.100.1:8").expect_err("the host has no such address");
        assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
    }

    #[test]
    fn programs_see_the_attributes_of_interfaces_until_the_end() {
        let Some(rig) = Rig::find() else { return };
        let Some(namespace) = Namespace::new(&rig) else { return };
        namespace.add_tap("tap0", Tap::MultiQueue);
        namespace.add_tap("tap1", Tap::SingleQueue);
        namespace.add_bridge("br0", &["tap0", "tap1"]);
        namespace.ip("link set tap0 mtu 9000");
        let seen = namespace
            .command("cat")
            .args(["/sys/class/net/tap0/mtu", "/sys/class/net/tap1/brport/state"])
            .output()
            .expect("cat is there");
        assert_eq!(String::from_utf8_lossy(&seen.stdout), "9000\n0\n", "{seen:?}");
        let holder = format!("/proc/{}", namespace.holder.id());
        drop(namespace);
        assert!(!Path::new(&holder).exists());
        assert!(!Path::new("/sys/class/net/tap0").exists());
    }

    #[test]
    fn nodes_of_macvtaps_are_told_apart() {
        let Some(rig) = Rig::find() else { return };
        let indexes = [(); 2].map(|()| {
            let namespace = Namespace::new(&rig)?;
            namespace.add_veth("up0", &namespace, "up1");
            namespace.add_macvtap("macvtap0", "up0");
            let index = namespace.index("macvtap0");
            let node = format!("/dev/tap{index}");
            // Where `/dev` is the kernel's own, it has a node for each.
            let kernel_s = fs::metadata("/dev/loop-control").is_ok();
            assert!(!kernel_s || Path::new(&node).exists(), "{node} is missing");
            Some((namespace, index))
        });
        if let [Some((_one, first)), Some((_other, second))] = indexes {
            assert_ne!(first, second);
        }
    }
}
