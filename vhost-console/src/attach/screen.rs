//! Where things are shown: the console's output on stdout, and what `attach` itself has to say on stderr, in order.
//!
//! Contract: nothing is dropped and nothing overtakes. A thread writes, because a terminal may take its time (or none at
//! all), and the session must see its signals and keys meanwhile. Who shows waits for room, so the daemon's socket fills,
//! and it is the daemon that then decides what a slow viewer loses.
//!
//! The descriptors are left as they are: to make them non-blocking would make them so for whoever shares them.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::{stderr, stdout};
use tokio::sync::{mpsc, oneshot};

/// Pieces on their way to the thread: one that is written, one that waits.
const PIECES_MAX: usize = 1;

enum Piece {
    Output(Vec<u8>),
    Notice(Vec<u8>),
}

/// The way to the screen.
#[derive(Debug)]
pub(super) struct Screen {
    pieces: mpsc::Sender<Piece>,
    /// A terminal that is raw: a line's end does not begin the next one.
    is_raw: bool,
}

/// Tells that everything is shown, or why it cannot be.
pub(super) type Shown = oneshot::Receiver<io::Result<()>>;

impl Screen {
    /// The thread ends once all of the screen's owners are gone and everything is shown, or once something cannot be.
    pub(super) fn start(is_raw: bool) -> io::Result<(Self, Shown)> {
        let (pieces, mut queue) = mpsc::channel(PIECES_MAX);
        let (tell, shown) = oneshot::channel();
        thread::Builder::new().name("screen".to_owned()).spawn(move || {
            let mut show = || -> io::Result<()> {
                while let Some(piece) = queue.blocking_recv() {
                    match piece {
                        Piece::Output(bytes) => write_all(stdout(), &bytes)?,
                        Piece::Notice(bytes) => write_all(stderr(), &bytes)?,
                    }
                }
                Ok(())
            };
            let ended = show();
            // The session may have ended without waiting.
            let _nobody = tell.send(ended);
        })?;
        Ok((Self { pieces, is_raw }, shown))
    }

    /// Shows output. If that cannot be any more, `Shown` tells why.
    pub(super) async fn output(&self, bytes: Vec<u8>) {
        let _told = self.pieces.send(Piece::Output(bytes)).await;
    }

    /// Shows lines of `attach`'s own, below what was shown before.
    pub(super) async fn notice(&self, lines: &[String]) {
        let text: String = if self.is_raw {
            let lines = lines.iter().map(|line| format!("{line}\r\n"));
            std::iter::once("\r\n".to_owned()).chain(lines).collect()
        } else {
            lines.iter().map(|line| format!("vhost-console attach: {line}\n")).collect()
        };
        let _told = self.pieces.send(Piece::Notice(text.into_bytes())).await;
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Somebody else has made it non-blocking.
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until a descriptor can be read or written.
pub(super) fn wait(on: BorrowedFd<'_>, what: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(on, what)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
