//! A daemon in a test that answers as it should, but for one message that it answers as it is told.
//!
//! Contract: it speaks the protocol in bytes, without the `vhost` package, and does no I/O. Each connection is told to the
//! test by its messages; one that has been served as far as the last ring is enabled is told as served.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::IoSlice;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub(super) const SET_FEATURES: u32 = 2;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message as the front end sent it.
pub(super) struct Message {
    pub(super) request: u32,
    flags: u32,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What a daemon does about one message in place of answering it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lie {
    /// It hangs up.
    HangUp,
    /// It says nothing.
    Silence,
    /// It stops in the middle of its answer's header.
    Stump,
    /// It hangs up in the middle of its answer.
    HalfAnswer,
    /// It answers another request.
    OtherRequest,
    /// Its answer is not marked as one.
    NoReplyFlag,
    /// Its answer claims to be longer than any may be.
    Huge,
    /// Its answer is shorter than it should be.
    Short,
    /// It says no, or gives all ones.
    Ones,
    /// Its answer has a descriptor that does not belong to it.
    ExtraFd,
    /// Bytes that are no message at all.
    Noise,
}

pub(super) const LIES: [Lie; 11] = [
    Lie::HangUp,
    Lie::Silence,
    Lie::Stump,
    Lie::HalfAnswer,
    Lie::OtherRequest,
    Lie::NoReplyFlag,
    Lie::Huge,
    Lie::Short,
    Lie::Ones,
    Lie::ExtraFd,
    Lie::Noise,
];

/// What it offers when it tells the truth.
#[derive(Clone)]
pub(super) struct Truth {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queue_count: u64,
    pub(super) config: Vec<u8>,
    /// The size of its record of requests in flight.
    pub(super) inflight_bytes: u64,
}

impl Default for Truth {
    fn default() -> Self {
        Self {
            features: 1 << 32 | 1 << 30 | 1 << 29,
            // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE
            protocol: 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13,
            queue_count: 2,
            config: (0..60).collect(),
            inflight_bytes: 8192,
        }
    }
}

/// A connection from its first message to its last.
#[derive(Default)]
pub(super) struct Connection {
    pub(super) messages: Vec<Message>,
}

impl Connection {
    pub(super) fn requests(&self) -> Vec<u32> {
        self.messages.iter().map(|message| message.request).collect()
    }

    pub(super) fn first(&self, request: u32) -> Option<&Message> {
        self.messages.iter().find(|message| message.request == request)
    }
}

/// What the daemon tells the test.
pub(super) enum Event {
    /// The rings that the front end has are enabled. With the channel for requests, and a ring's kick.
    Served {
        channel: UnixStream,
        kick: OwnedFd,
    },
    Ended(Connection),
}

/// What the daemon does with one connection.
#[derive(Clone)]
pub(super) struct Script {
    pub(super) truth: Truth,
    /// The number of a message, from 0, and what is done about it.
    pub(super) lie: Option<(usize, Lie)>,
    /// How many rings are enabled when it is served.
    pub(super) rings: usize,
    /// It hangs up when it has served.
    pub(super) ends_when_served: bool,
}

impl Default for Script {
    fn default() -> Self {
        Self { truth: Truth::default(), lie: None, rings: 2, ends_when_served: false }
    }
}

/// A daemon that takes one connection for each of its scripts, and more by the last one.
pub(super) struct Scripted {
    pub(super) events: Receiver<Event>,
    _thread: JoinHandle<()>,
}

impl Scripted {
    /// Listens at `path` from now on.
    pub(super) fn new(path: &Path, scripts: Vec<Script>) -> Self {
        let _nothing_there = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).expect("a socket");
        let (sender, events) = channel();
        let thread = std::thread::spawn(move || {
            let last = scripts.last().cloned();
            for script in scripts.into_iter().chain(std::iter::from_fn(|| last.clone())) {
                let Ok((socket, _)) = listener.accept() else { return };
                let connection = serve(&socket, &script, &sender);
                if sender.send(Event::Ended(connection)).is_err() {
                    return;
                }
            }
        });
        Self { events, _thread: thread }
    }

    /// Waits until a connection has been served, or has ended.
    pub(super) fn next(&self) -> Event {
        self.events.recv_timeout(super::driver::LIMIT).expect("something happens in time")
    }

    /// Waits until a connection is served; those that ended before are forgotten.
    pub(super) fn wait_served(&self) -> (UnixStream, OwnedFd) {
        loop {
            if let Event::Served { channel, kick } = self.next() {
                return (channel, kick);
            }
        }
    }

    /// Waits until a connection has ended.
    pub(super) fn wait_ended(&self) -> Connection {
        loop {
            if let Event::Ended(connection) = self.next() {
                return connection;
            }
        }
    }
}

fn serve(socket: &UnixStream, script: &Script, events: &Sender<Event>) -> Connection {
    let mut connection = Connection::default();
    let mut enabled = 0;
    while let Some(message) = receive(socket) {
        let lie = script.lie.filter(|(at, _)| *at == connection.messages.len());
        let answer = answer(&message, &script.truth);
        let goes_on = match lie {
            Some((_, lie)) => tell(socket, &message, answer, lie),
            None => answer.is_none_or(|(payload, fd)| {
                send(socket, message.request, &payload, fd.as_ref()).is_some()
            }),
        };
        if message.request == SET_VRING_ENABLE {
            enabled += if message.payload[4] == 1 { 1 } else { -1 };
        }
        let is_served =
            message.request == SET_VRING_ENABLE && enabled == script.rings as i32 && lie.is_none();
        connection.messages.push(message);
        if is_served {
            let descriptor = |request| {
                let fd = &connection.first(request).expect("it was sent").fds[0];
                fd.try_clone().expect("a descriptor")
            };
            let channel = UnixStream::from(descriptor(SET_BACKEND_REQ_FD));
            let kick = descriptor(SET_VRING_KICK);
            let _test_is_over = events.send(Event::Served { channel, kick });
        }
        if !goes_on || is_served && script.ends_when_served {
            break;
        }
    }
    connection
}

/// The right answer to a message, if it wants one.
fn answer(message: &Message, truth: &Truth) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let number = |value: u64| Some((value.to_le_bytes().to_vec(), None));
    match message.request {
        GET_FEATURES => number(truth.features),
        GET_PROTOCOL_FEATURES => number(truth.protocol),
        GET_QUEUE_NUM => number(truth.queue_count),
        GET_VRING_BASE => Some((message.payload.clone(), None)),
        GET_CONFIG => {
            let len = message.payload.len() - 12;
            let config = truth.config.iter().copied().chain(std::iter::repeat(0)).take(len);
            let header = message.payload[..12].iter().copied();
            Some((header.chain(config).collect(), None))
        }
        GET_INFLIGHT_FD => {
            let file = memfd_create("inflight", MemfdFlags::CLOEXEC).expect("a memfd");
            ftruncate(&file, 8192).expect("room");
            let size = truth.inflight_bytes.to_le_bytes();
            let payload = [&size[..], &[0; 8], &message.payload[16..]].concat();
            Some((payload, Some(file)))
        }
        _ if message.flags & NEED_REPLY != 0 => number(0),
        _ => None,
    }
}

/// Lies; says whether the connection goes on.
fn tell(
    mut socket: &UnixStream,
    message: &Message,
    answer: Option<(Vec<u8>, Option<OwnedFd>)>,
    lie: Lie,
) -> bool {
    // A message that wants no answer gets one all the same, if the lie is one.
    let (payload, fd) = answer.unwrap_or_else(|| (vec![0; 8], None));
    let request = message.request;
    let sent = match lie {
        Lie::HangUp => return false,
        Lie::Silence => Some(()),
        Lie::Stump => socket.write_all(&request.to_le_bytes()).ok(),
        Lie::HalfAnswer => {
            let bytes = [&header(request, VERSION | REPLY, payload.len())[..], &payload[..1]];
            let _gone = socket.write_all(&bytes.concat());
            return false;
        }
        Lie::OtherRequest => send(socket, request + 1, &payload, fd.as_ref()),
        Lie::NoReplyFlag => {
            let bytes = [&header(request, VERSION, payload.len())[..], &payload].concat();
            socket.write_all(&bytes).ok()
        }
        Lie::Huge => {
            let bytes = [&header(request, VERSION | REPLY, 0x7fff_ffff)[..], &payload].concat();
            socket.write_all(&bytes).ok()
        }
        Lie::Short => send(socket, request, &payload[..payload.len() / 2], fd.as_ref()),
        Lie::Ones => send(socket, request, &vec![0xff; payload.len()], fd.as_ref()),
        Lie::ExtraFd => {
            let file = File::open("/dev/null").expect("there is one").into();
            match fd {
                // One is right, so that none is the lie.
                Some(_) => send(socket, request, &payload, None),
                None => send(socket, request, &payload, Some(&file)),
            }
        }
        Lie::Noise => socket.write_all(&[0x5a; 64]).ok(),
    };
    sent.is_some()
}

fn header(request: u32, flags: u32, len: usize) -> Vec<u8> {
    [request, flags, len as u32].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn send(socket: &UnixStream, request: u32, payload: &[u8], fd: Option<&OwnedFd>) -> Option<()> {
    let bytes = [&header(request, VERSION | REPLY, payload.len())[..], payload].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL);
    sent.ok().filter(|sent| *sent == bytes.len()).map(drop)
}

fn receive(mut socket: &UnixStream) -> Option<Message> {
    let mut head = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut head)];
    let received = recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    if received.bytes != 12 {
        return None;
    }
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let fds = fds.collect();
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let mut payload = vec![0; word(8) as usize];
    socket.read_exact(&mut payload).ok()?;
    Some(Message { request: word(0), flags: word(4), payload, fds })
}
