//! What went over an interface, frame by frame, with times in nanoseconds.
//!
//! Contract: a capture has everything that passed from [`Capture::start`]'s return to [`Capture::stop`]'s call, and fails where
//! the kernel had to drop some of it: a capture with holes proves nothing. A load at full speed is more than it takes: that is
//! for the filter to keep out. Frames are as the kernel has them at that place: where the sender leaves checksums or
//! segmentation to the interface, they are unfinished and large. `ethtool --offload` makes a veth's frames those of a wire.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Frame, Namespace, Rig};

/// Time in which tcpdump has long started or answered, even on a machine busy with emulated guests.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Of a file with times in nanoseconds, written on a machine of this byte order (pcap-savefile(5)).
const MAGIC: u32 = 0xa1b2_3c4d;
const HEADER_BYTES: usize = 24;
const RECORD_BYTES: usize = 16;
/// The longest frame that is taken whole: 64 KiB that are yet to be cut into segments, with their headers. The kernel's buffer
/// has places of this size, unless the interface leaves nothing to others.
const FRAME_BYTES_MAX: usize = 66_000;
/// The kernel's buffer: four thousand such places, for tcpdump to be away from its processor for a while.
const BUFFER_KIB: usize = 256 << 10;

/// A capture under way.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    said: Receiver<String>,
    frames: Option<JoinHandle<Vec<Frame>>>,
    /// Frames that passed before the filter did its work: the kernel counts them as received, and nobody captures them.
    unfiltered: usize,
}

/// What tcpdump has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    captured: usize,
    received: usize,
}

impl Capture {
    /// Captures what goes over an interface, in both directions, and passes `filter`: an expression of pcap-filter(7), or
    /// nothing for all.
    ///
    /// # Panics
    /// If it cannot; the message has tcpdump's reason.
    pub fn start(namespace: &Namespace, interface: &str, filter: &str) -> Self {
        let mut tcpdump = namespace
            .tool("tcpdump")
            .args([
                "-i",
                interface,
                "-w",
                "-",
                "--packet-buffered",
                "--immediate-mode",
                "-Z",
                "root",
            ])
            .arg("--time-stamp-precision=nano")
            .arg(format!("--snapshot-length={FRAME_BYTES_MAX}"))
            .arg(format!("--buffer-size={BUFFER_KIB}"))
            .arg(filter)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("nsenter can be run");
        let stdout = tcpdump.stdout.take().expect("it was piped");
        let stderr = tcpdump.stderr.take().expect("it was piped");
        let (sender, said) = channel();
        thread::spawn(move || {
            // Nobody listens any more once the test has failed.
            BufReader::new(stderr)
                .lines()
                .map_while(Result::ok)
                .all(|line| sender.send(line).is_ok())
        });
        let frames = Some(thread::spawn(move || read_frames(stdout)));
        let mut capture = Self { tcpdump, said, frames, unfiltered: 0 };
        capture.hear("listening on ");
        let ahead = |counters: Counters| counters.received - counters.captured;
        let mut unfiltered = ahead(capture.count());
        // One that is on its way is captured by and by.
        while unfiltered != std::mem::replace(&mut capture.unfiltered, unfiltered) {
            unfiltered = ahead(capture.count());
        }
        capture
    }

    /// Ends the capture and returns the frames in the order in which they passed.
    ///
    /// # Panics
    /// If frames were dropped, or tcpdump has ended by itself.
    pub fn stop(mut self) -> Vec<Frame> {
        let began = Instant::now();
        let mut counters = self.count();
        // What the kernel has counted may still be on its way.
        while counters.captured + self.unfiltered < counters.received {
            assert!(began.elapsed() < ANSWER_LIMIT, "{counters:?}, {} unfiltered", self.unfiltered);
            counters = self.count();
        }
        let captured = counters.captured;
        self.signal(Signal::TERM);
        let frames = self.frames.take().expect("it is taken once").join();
        let frames = frames.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(frames.len() >= captured, "{captured} captured, {} written", frames.len());
        frames
    }

    /// The frames in a file that tcpdump can read, in their order.
    ///
    /// # Panics
    /// If it cannot.
    pub fn read(rig: &Rig, file: &Path) -> Vec<Frame> {
        let mut tcpdump = rig
            .tool("tcpdump")
            .args(["--time-stamp-precision=nano", "-Z", "root", "-w", "-", "-r"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the rig has tcpdump");
        let frames = read_frames(tcpdump.stdout.take().expect("it was piped"));
        let status = tcpdump.wait().expect("our own child can be waited for");
        assert!(status.success(), "tcpdump cannot read {}: {status}", file.display());
        frames
    }

    /// Asks tcpdump for its counters: "4 packets captured, 5 packets received by filter, …".
    fn count(&self) -> Counters {
        self.signal(Signal::USR1);
        let counters = self.hear(" received by filter, ");
        let counters: Vec<usize> =
            counters.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        match *counters {
            [captured, received, 0] => Counters { captured, received },
            _ => panic!("a capture with holes: captured, received, dropped: {counters:?}"),
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.tcpdump), signal).expect("our own child is signalled");
    }

    /// The next line of tcpdump's that has this in it.
    fn hear(&self, text: &str) -> String {
        let mut before = String::new();
        loop {
            match self.said.recv_timeout(ANSWER_LIMIT) {
                Ok(line) if line.contains(text) => return line,
                Ok(line) => before = before + &line + "\n",
                Err(RecvTimeoutError::Timeout) => panic!("no {text:?} from tcpdump: {before}"),
                Err(RecvTimeoutError::Disconnected) => panic!("tcpdump has ended: {before}"),
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for already.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
    }
}

fn read_frames(from: ChildStdout) -> Vec<Frame> {
    let mut from = BufReader::new(from);
    let mut header = [0; HEADER_BYTES];
    if from.read_exact(&mut header).is_err() {
        // It has said why on stderr.
        return Vec::new();
    }
    assert_eq!(field(&header, 0), MAGIC, "no capture with nanoseconds: {header:x?}");
    let mut frames = Vec::new();
    let mut record = [0; RECORD_BYTES];
    while from.read_exact(&mut record).is_ok() {
        let [seconds, nanoseconds, len, wire_len] = [0, 4, 8, 12].map(|at| field(&record, at));
        assert_eq!(len, wire_len, "a frame was cut off");
        let len = len as usize;
        assert!(len <= FRAME_BYTES_MAX, "a frame of {len} bytes");
        let mut bytes = vec![0; len];
        if from.read_exact(&mut bytes).is_err() {
            break;
        }
        let time_ns = u64::from(seconds) * 1_000_000_000 + u64::from(nanoseconds);
        frames.push(Frame::new(time_ns, bytes));
    }
    frames
}

fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::Capture;
    use crate::{Checksum, Namespace, Rig};

    #[test]
    fn every_frame_is_there_with_its_checksums() {
        const COUNT: usize = 200;
        let Some(rig) = Rig::find() else { return };
        let (Some(here), Some(there)) = (Namespace::new(&rig), Namespace::new(&rig)) else {
            return;
        };
        here.add_veth("eth0", &there, "eth0");
        here.add_address("eth0", "10.0.0.1/24");
        there.add_address("eth0", "10.0.0.2/24");
        let socket = here.run(|| UdpSocket::bind("10.0.0.1:0")).expect("the address is there");
        let from = socket.local_addr().expect("it is bound");
        let peer = there.run(|| UdpSocket::bind("10.0.0.2:7")).expect("the address is there");
        for finished in [false, true] {
            if finished {
                here.ethtool("--offload eth0 tx off");
            }
            let capture = Capture::start(&here, "eth0", "udp");
            let mut buffer = [0; 1000];
            for number in 0..COUNT {
                socket.send_to(&vec![7; 10 + number], "10.0.0.2:7").expect("both are up");
                peer.recv(&mut buffer).expect("it was sent");
            }
            let frames = capture.stop();
            let packets = frames.iter().map(|frame| frame.packet().expect("it is whole"));
            let datagrams: Vec<_> = packets
                .filter_map(|packet| packet.transport)
                .filter(|transport| transport.ports == Some((from.port(), 7)))
                .collect();
            assert_eq!(datagrams.len(), COUNT);
            // A veth leaves the checksum to whoever needs one.
            let expected = if finished { Checksum::Good } else { Checksum::Unfinished };
            for (number, datagram) in datagrams.iter().enumerate() {
                assert_eq!(datagram.payload.len(), 10 + number);
                assert_eq!(datagram.checksum, expected, "{datagram:?}");
            }
            assert!(frames.is_sorted_by_key(crate::Frame::time_ns));
        }
    }

    #[test]
    fn capture_that_begins_amid_other_traffic_comes_to_its_end() {
        let Some(rig) = Rig::find() else { return };
        let (Some(here), Some(there)) = (Namespace::new(&rig), Namespace::new(&rig)) else {
            return;
        };
        here.add_veth("eth0", &there, "eth0");
        here.add_address("eth0", "10.0.0.1/24");
        there.add_address("eth0", "10.0.0.2/24");
        let socket = here.run(|| UdpSocket::bind("10.0.0.1:0")).expect("the address is there");
        let has_begun = AtomicBool::new(false);
        let capture = thread::scope(|scope| {
            scope.spawn(|| {
                while !has_begun.load(Ordering::Relaxed) {
                    // Nobody is there, and says so.
                    let _refused = socket.send_to(b"other", "10.0.0.2:9");
                }
            });
            let capture = Capture::start(&here, "eth0", "udp port 7");
            has_begun.store(true, Ordering::Relaxed);
            capture
        });
        while socket.send_to(b"wanted", "10.0.0.2:7").is_err() {}
        assert_eq!(capture.stop().len(), 1);
    }
}
