//! Where input comes from: stdin, a terminal or not.
//!
//! Contract: bytes come in order and whole, in pieces as they are read. A thread reads, since stdin may be anything (a file
//! cannot be waited for), and is not made non-blocking, because others share it. It reads no further than one
//! piece ahead of what was taken. Where the session ends first, the thread ends with the process.

use std::io;
use std::thread;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::stdio::stdin;
use tokio::sync::mpsc;

use super::screen::wait;

/// What is read at once: a terminal has 4 KiB, a pipe 64 KiB.
const PIECE_BYTES: usize = 64 << 10;

/// Pieces that are read, and not yet taken.
const PIECES_MAX: usize = 1;

/// What is typed; it ends with the input.
#[derive(Debug)]
pub(super) struct Keyboard {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
}

impl Keyboard {
    pub(super) fn start() -> io::Result<Self> {
        let (typed, pieces) = mpsc::channel(PIECES_MAX);
        thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
            while let Some(piece) = read().transpose() {
                let is_last = piece.is_err();
                if typed.blocking_send(piece).is_err() || is_last {
                    return;
                }
            }
        })?;
        Ok(Self { pieces })
    }

    /// The next piece, never empty; none at the end of input. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.pieces.recv().await
    }
}

fn read() -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; PIECE_BYTES];
    loop {
        match rustix::io::read(stdin(), &mut bytes) {
            Ok(0) => return Ok(None),
            Ok(length) => {
                bytes.truncate(length);
                return Ok(Some(bytes));
            }
            Err(Errno::INTR) => {}
            // Somebody else has made it non-blocking.
            Err(Errno::AGAIN) => wait(stdin(), PollFlags::IN)?,
            Err(error) => return Err(error.into()),
        }
    }
}
