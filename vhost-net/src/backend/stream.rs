//! A stream socket to another program that has the network (passt, QEMU): the protocol of QEMU's `-netdev stream`.
//!
//! Contract: the daemon starts whether or not there is a peer; without one the link is down. [`Stream::watch`] connects,
//! or accepts, one peer after another for ever, and raises the link's generation for each. A queue that finds another
//! generation than it knows [adopts](Stream::adopt) the connection: only then does its descriptor lead there. It does so on
//! its own thread, between two writes, because the rest of a frame that was begun on one connection must never be written
//! to the next: no other thread can know that moment. [`framing`] says what to read and write.
//!
//! A connection ends when the peer closes it, or when a queue [gives it up](Stream::give_up) over what the peer sent.
//!
//! What it deliberately does not do: no virtio header and no offloads, which the protocol does not have; no second queue
//! pair; no second peer: who connects while there is one waits until that has gone.

pub(crate) mod framing;

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::daemon::listener::{self, Listener};
use common::sandbox::calls::CONNECT;
use common::sandbox::{Access, Call, Needs, Place};
use nix::libc;
use rustix::event::epoll;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;
use tracing::{info, warn};

use super::error::OpenError;
use super::link::{Link, LinkEvent};
use super::{Settings, descriptor};

const OPTION: &str = "socket=PATH";

/// Pause after a peer has gone, and before one that is not there is tried again; then each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest pause: a guest's network is back this soon after its peer, at the latest.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A queue adopts a connection, or gives it up.
pub(super) const QUEUE_CALLS: &[Call] = &[descriptor::REPLACE, Call::any(libc::SYS_shutdown)];

/// Which of the two descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Receive,
    Transmit,
}

/// A peer at the other end of a socket, now or later.
#[derive(Debug)]
pub(crate) struct Stream {
    path: PathBuf,
    /// Where peers come to us; none where we go to the peer.
    listener: Option<Listener>,
    /// What queues read from and write to: the connection that each has adopted, at first a silent one.
    receive: OwnedFd,
    transmit: OwnedFd,
    #[expect(dead_code, reason = "held, not read: closing it would be an end to read")]
    silence: OwnedFd,
    /// Locked when a peer comes, by the main thread and by each queue once.
    current: Mutex<Option<Connection>>,
    link: Link,
}

#[derive(Clone, Debug)]
struct Connection {
    socket: Arc<OwnedFd>,
    generation: u32,
}

impl Stream {
    pub(super) fn open(path: &Path, server: bool, settings: &Settings) -> Result<Self, OpenError> {
        if settings.pairs != 1 {
            return Err(OpenError::OnePair { option: OPTION, pairs: settings.pairs });
        }
        let listen = || listener::listen_private("--backend socket=PATH,server", path);
        let listener = server.then(listen).transpose().map_err(OpenError::Listen)?;
        let failed = |errno: rustix::io::Errno| OpenError::Descriptors {
            option: OPTION,
            source: errno.into(),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (receive, silence) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let transmit = rustix::io::fcntl_dupfd_cloexec(&receive, 0).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            receive,
            transmit,
            silence,
            current: Mutex::new(None),
            link: Link::default(),
        })
    }

    /// Each connection is watched, and those that we make are made.
    pub(super) fn needs(&self) -> Needs {
        let file = self.listener.as_ref().and_then(|listener| listener.file.as_ref());
        let places =
            file.map(|file| Place::around(file.path(), Access::Remove)).into_iter().collect();
        let connect = if self.listener.is_none() { CONNECT } else { &[] };
        let calls = [&[Call::any(libc::SYS_epoll_create1)], connect].concat();
        Needs { places, calls, ..Needs::default() }
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    pub(crate) fn file(&self, side: Side) -> BorrowedFd<'_> {
        match side {
            Side::Receive => self.receive.as_fd(),
            Side::Transmit => self.transmit.as_fd(),
        }
    }

    /// Puts the peer's connection under the descriptor of this side, and says of which generation it is: frames start anew
    /// on it. On the thread that uses the descriptor, while it does not.
    pub(crate) fn adopt(&self, side: Side) -> rustix::io::Result<u32> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match current {
            None => Ok(0),
            Some(Connection { socket, generation }) => {
                descriptor::replace(self.file(side), socket.as_fd())?;
                Ok(generation)
            }
        }
    }

    /// Ends the connection that this side has adopted: nothing that comes from there can be understood any more.
    pub(crate) fn give_up(&self, side: Side) {
        // It may have ended already, which is as well.
        let _ = shutdown(self.file(side), Shutdown::Both);
    }

    /// Has a peer, one after another.
    pub(crate) async fn watch(&self, mut on_change: impl FnMut(LinkEvent)) -> Infallible {
        let mut peers = self.peers();
        loop {
            let socket = peers.next(&self.path).await;
            let Ok(gone) = hangup(socket.as_fd()) else {
                warn!("no descriptors are left for the peer at {:?}", self.path);
                sleep(PAUSE_MAX).await;
                continue;
            };
            info!("connected with the peer at {:?}", self.path);
            let generation = self.link.generation().wrapping_add(1);
            let connection = Connection { socket: Arc::clone(&socket), generation };
            // Before the generation rises: who sees that finds the connection.
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
            self.link.renew();
            self.link.set_up(true);
            on_change(self.link.state());
            wait(&gone).await;
            self.link.set_up(false);
            // For the peer, too: a queue that does not run may hold on to the connection.
            let _ = shutdown(&*socket, Shutdown::Both);
            on_change(self.link.state());
            info!("the peer at {:?} has gone", self.path);
            // One that comes and goes all the time costs us little, and the log few lines.
            sleep(PAUSE_MIN).await;
        }
    }

    fn peers(&self) -> Peers {
        let Some(listener) = &self.listener else { return Peers::There };
        let ours = listener.socket.try_clone();
        match ours.and_then(UnixListener::from_std) {
            Ok(listener) => Peers::Come(listener),
            Err(cause) => {
                warn!(%cause, "cannot wait for peers at {:?}", self.path);
                Peers::Nowhere
            }
        }
    }
}

/// Where peers are from.
enum Peers {
    /// They listen.
    There,
    /// They connect.
    Come(UnixListener),
    Nowhere,
}

impl Peers {
    /// The next one; its socket does not block.
    async fn next(&mut self, path: &Path) -> Arc<OwnedFd> {
        let mut pause = PAUSE_MIN;
        let mut complaint = None;
        loop {
            let connected = match self {
                Self::There => UnixStream::connect(path).await,
                Self::Come(listener) => listener.accept().await.map(|(stream, _)| stream),
                Self::Nowhere => std::future::pending().await,
            };
            match connected.and_then(UnixStream::into_std) {
                Ok(stream) => return Arc::new(stream.into()),
                Err(cause) => {
                    // Told once, however often it is tried.
                    if complaint.replace(cause.kind()) != Some(cause.kind()) {
                        warn!(%cause, "no peer at {path:?} yet");
                    }
                }
            }
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(PAUSE_MAX);
        }
    }
}

/// Becomes readable when the peer has closed the connection, and not before.
///
/// An epoll instance within the runtime's: that would ask for what comes, too, and the main thread would be woken for each
/// frame that a queue reads.
fn hangup(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&watch, socket, epoll::EventData::new_u64(0), epoll::EventFlags::RDHUP)?;
    Ok(watch)
}

async fn wait(gone: &OwnedFd) {
    match descriptor::readable(gone.as_fd()) {
        Ok(watched) => {
            // An error is that the runtime ends, and all of this with it.
            let _ = watched.readable().await;
        }
        Err(cause) => {
            warn!(%cause, "cannot watch the connection with the peer");
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::time::{Duration, Instant};

    use rustix::io::{Errno, read, write};
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::{PAUSE_MIN, Side, Stream};
    use crate::backend::{LinkEvent, Settings};

    /// Far longer than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn open(path: &Path, server: bool) -> Stream {
        let settings = Settings { pairs: 1, mtu: None, bridge: None, address: None };
        Stream::open(path, server, &settings).unwrap()
    }

    fn directory() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("net.sock");
        (directory, path)
    }

    struct Events(mpsc::UnboundedReceiver<LinkEvent>);

    impl Events {
        async fn next_is(&mut self, up: bool, generation: u32) {
            let event = timeout(PATIENCE, self.0.recv()).await.expect("an event").unwrap();
            assert_eq!(event, LinkEvent { up, generation });
        }

        /// What has just been done is no event.
        async fn nothing_comes(&mut self) {
            let event = timeout(Duration::from_millis(100), self.0.recv()).await;
            assert!(event.is_err(), "{event:?}");
        }
    }

    /// Runs `script` while the stream is watched.
    fn watched(stream: &Stream, script: impl AsyncFnOnce(Events)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (send, receive) = mpsc::unbounded_channel();
        runtime.block_on(async {
            tokio::select! {
                never = stream.watch(|event| send.send(event).unwrap()) => match never {},
                () = script(Events(receive)) => {}
            }
        });
    }

    /// Bytes travel both ways on the descriptors.
    fn assert_connected(stream: &Stream, peer: &mut UnixStream) {
        assert_eq!(write(stream.file(Side::Transmit), b"out"), Ok(3));
        let mut bytes = [0; 3];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"out");
        peer.write_all(b"in").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(read(stream.file(Side::Receive), &mut bytes), Ok(2));
        assert_eq!(read(stream.file(Side::Receive), &mut bytes), Err(Errno::AGAIN));
    }

    #[test]
    fn peer_that_listens_later_and_again_is_found() {
        let (_directory, path) = directory();
        let stream = open(&path, false);
        assert!(!stream.link().is_up());
        let numbers = [Side::Receive, Side::Transmit].map(|side| stream.file(side).as_raw_fd());
        watched(&stream, async |mut events| {
            for generation in 1..4 {
                let listener = UnixListener::bind(&path).unwrap();
                events.next_is(true, generation).await;
                let (mut peer, _) = listener.accept().unwrap();
                assert_eq!(stream.adopt(Side::Receive), Ok(generation));
                assert_eq!(stream.adopt(Side::Transmit), Ok(generation));
                assert_connected(&stream, &mut peer);
                // A frame that nobody has read yet does not concern the main thread.
                peer.write_all(b"unread").unwrap();
                events.nothing_comes().await;
                drop(listener);
                std::fs::remove_file(&path).unwrap();
                drop(peer);
                events.next_is(false, generation).await;
            }
        });
        let after = [Side::Receive, Side::Transmit].map(|side| stream.file(side).as_raw_fd());
        assert_eq!(after, numbers);
    }

    #[test]
    fn peers_that_connect_are_served_one_after_another() {
        let (_directory, path) = directory();
        let stream = open(&path, true);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        watched(&stream, async |mut events| {
            let mut first = UnixStream::connect(&path).unwrap();
            events.next_is(true, 1).await;
            let mut second = UnixStream::connect(&path).unwrap();
            assert_eq!(stream.adopt(Side::Receive), Ok(1));
            assert_eq!(stream.adopt(Side::Transmit), Ok(1));
            assert_connected(&stream, &mut first);
            drop(first);
            events.next_is(false, 1).await;
            let gone = Instant::now();
            events.next_is(true, 2).await;
            assert!(gone.elapsed() >= PAUSE_MIN / 2, "peers that come and go keep us busy");
            assert_eq!(stream.adopt(Side::Receive), Ok(2));
            assert_eq!(stream.adopt(Side::Transmit), Ok(2));
            assert_connected(&stream, &mut second);
        });
        drop(stream);
        assert!(!path.exists());
    }

    #[test]
    fn half_a_frame_is_never_followed_by_another_connection() {
        let (_directory, path) = directory();
        let stream = open(&path, true);
        watched(&stream, async |mut events| {
            let first = UnixStream::connect(&path).unwrap();
            events.next_is(true, 1).await;
            stream.adopt(Side::Transmit).unwrap();
            let mut second = UnixStream::connect(&path).unwrap();
            drop(first);
            events.next_is(false, 1).await;
            events.next_is(true, 2).await;
            // A queue that has not looked yet.
            assert_eq!(write(stream.file(Side::Transmit), b"rest"), Err(Errno::PIPE));
            stream.adopt(Side::Transmit).unwrap();
            assert_eq!(write(stream.file(Side::Transmit), b"new"), Ok(3));
            let mut bytes = [0; 8];
            assert_eq!(second.read(&mut bytes).unwrap(), 3);
        });
    }

    #[test]
    fn connection_that_a_queue_gives_up_ends_for_all() {
        let (_directory, path) = directory();
        let stream = open(&path, true);
        watched(&stream, async |mut events| {
            let mut peer = UnixStream::connect(&path).unwrap();
            events.next_is(true, 1).await;
            stream.adopt(Side::Receive).unwrap();
            stream.give_up(Side::Receive);
            events.next_is(false, 1).await;
            assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
        });
    }

    #[test]
    fn silence_before_the_first_peer() {
        let (_directory, path) = directory();
        let stream = open(&path, false);
        assert_eq!(read(stream.file(Side::Receive), &mut [0; 8]), Err(Errno::AGAIN));
        assert_eq!(stream.adopt(Side::Receive), Ok(0));
    }
}
