//! Bytes to and from a descriptor, without blocking the main thread.
//!
//! Contract: a [`Wire`] waits for its descriptor by the runtime where the kernel has such a thing; a regular file, which is
//! always ready and blocks all the same, is read and written on another thread. What travels over it is for
//! three loops, which all endpoints with a peer share: [`show`] for who looks on, [`deliver`] for who is waited for, and
//! [`hear`] for what comes back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::epoll;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{spawn_blocking, yield_now};

use super::at::{At, Keeper};
use crate::transcript::Cursor;
use crate::watch::watch;

/// What a viewer is shown at once. There are many, each with as much memory.
const SHOW_BYTES: usize = 16 << 10;
/// What a client is sent at once: half of the least that a transcript holds, so that the guest goes on meanwhile.
const DELIVER_BYTES: usize = 128 << 10;
/// What is heard at once: as much as an inbox holds.
const HEAR_BYTES: usize = crate::inbox::INBOX_BYTES as usize;
/// With less room than this nothing is read: a stream comes in pieces that are worth a turn.
const ROOM_MIN: usize = 16 << 10;
/// What one endpoint sends before others have their turn.
const TURN_BYTES: usize = 1 << 20;

/// See the module's head.
pub(crate) struct Wire(Way);

enum Way {
    /// The runtime tells when it is ready. It does not block.
    Watched(AsyncFd<OwnedFd>),
    /// It is always ready, and may block.
    Blocking(Arc<OwnedFd>),
}

impl Wire {
    /// A descriptor that does not block, or that cannot be waited for.
    pub(crate) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let both = Interest::READABLE.add(Interest::WRITABLE);
        match watch(descriptor.try_clone()?, both) {
            Ok(watched) => Ok(Self(Way::Watched(watched))),
            // The kernel's word for files that are always ready.
            Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                Ok(Self(Way::Blocking(Arc::new(descriptor))))
            }
            Err(error) => Err(error),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Way::Watched(watched) => watched.get_ref().as_fd(),
            Way::Blocking(file) => file.as_fd(),
        }
    }

    /// Reads up to as much as `limit` says at the moment when there is something; 0 bytes at the end, `None` if the limit
    /// is 0.
    pub(crate) async fn read(
        &self,
        into: &mut [u8],
        limit: impl Fn() -> usize,
    ) -> io::Result<Option<usize>> {
        match &self.0 {
            Way::Watched(watched) => loop {
                let mut ready = watched.readable().await?;
                let was_hung_up = ready.ready().is_read_closed();
                let limit = limit().min(into.len());
                let Some(into) = into.get_mut(..limit).filter(|into| !into.is_empty()) else {
                    return Ok(None);
                };
                let read = |fd: &AsyncFd<OwnedFd>| Ok(rustix::io::read(fd.get_ref(), &mut *into)?);
                match ready.try_io(read) {
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(read) => return read.map(Some),
                    // A terminal that was hung up and opened again: to the runtime it is ready for ever.
                    Err(_would_block) if was_hung_up => return Ok(Some(0)),
                    Err(_would_block) => {}
                }
            },
            Way::Blocking(file) => {
                let limit = limit().min(into.len());
                if limit == 0 {
                    return Ok(None);
                }
                let (file, mut bytes) = (Arc::clone(file), vec![0; limit]);
                let read = spawn_blocking(move || {
                    rustix::io::read(&file, &mut bytes).map(|count| (bytes, count))
                });
                let (bytes, count) = read.await??;
                into.iter_mut()
                    .zip(bytes.iter().take(count))
                    .for_each(|(into, from)| *into = *from);
                Ok(Some(count))
            }
        }
    }

    /// Writes some of this, at least one byte.
    async fn write(&self, from: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Way::Watched(watched) => loop {
                let mut ready = watched.writable().await?;
                let is_hung_up = ready.ready().is_write_closed();
                let write = |fd: &AsyncFd<OwnedFd>| Ok(rustix::io::write(fd.get_ref(), from)?);
                match ready.try_io(write) {
                    Ok(written) => return written,
                    // A terminal that is hung up: to the runtime it is ready for ever.
                    Err(_would_block) if is_hung_up => {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                    Err(_would_block) => {}
                }
            },
            Way::Blocking(file) => {
                let (file, bytes) = (Arc::clone(file), from.to_vec());
                let written = spawn_blocking(move || rustix::io::write(&file, &bytes));
                Ok(written.await??)
            }
        }
    }

    /// Writes all of this, as far as `rest` says afterwards.
    pub(crate) async fn write_all(&self, from: &[u8], rest: &mut u64) -> io::Result<()> {
        let mut from = from;
        *rest = from.len() as u64;
        while !from.is_empty() {
            let count = match self.write(from).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            from = from.get(count..).unwrap_or_default();
            *rest = from.len() as u64;
        }
        Ok(())
    }

    /// Waits until the other end is closed altogether, which a peer that has only ended what it sends has not done. Never
    /// for a file.
    pub(crate) async fn hung_up(&self) {
        let watched = match hangup(self.fd()) {
            Ok(watched) => watched,
            // Who cannot be watched is found to be gone when there is something to write.
            Err(_) => return std::future::pending().await,
        };
        if watched.readable().await.is_err() {
            std::future::pending().await
        }
    }
}

/// A descriptor that is readable when the other end of this one is closed, whatever else that one is ready for.
fn hangup(of: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let hangups = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    // Of errors and hang-ups the kernel always tells.
    epoll::add(&hangups, of, epoll::EventData::new_u64(0), epoll::EventFlags::empty())?;
    watch(hangups, Interest::READABLE)
}

/// Shows who looks on what the port puts out from `cursor` on. Nobody waits for him: what he is too slow for he is told
/// the size of. Ends when he cannot be written to.
pub(crate) async fn show(
    at: &At,
    mut cursor: Cursor,
    wire: &Wire,
    lost_bytes: &AtomicU64,
) -> io::Error {
    let mut scratch = vec![0; SHOW_BYTES];
    let mut rest = 0;
    loop {
        let read = at.port().transcript().read(&mut cursor, &mut scratch);
        if read.lost_bytes > 0 {
            lost_bytes.fetch_add(read.lost_bytes, Ordering::Relaxed);
            let notice = format!("\r\n[{} bytes lost]\r\n", read.lost_bytes);
            if let Err(error) = wire.write_all(notice.as_bytes(), &mut rest).await {
                return error;
            }
        }
        if read.count == 0 {
            at.port().news().await;
            continue;
        }
        let bytes = scratch.get(..read.count).unwrap_or_default();
        if let Err(error) = wire.write_all(bytes, &mut rest).await {
            return error;
        }
    }
}

/// What [`deliver`] has yet to do; whoever drops it there knows what was lost.
pub(crate) struct Delivery<'a> {
    keeper: Keeper<'a>,
    rest: u64,
}

impl<'a> Delivery<'a> {
    /// From here on the guest waits for it.
    pub(crate) fn new(at: &'a At) -> Self {
        Self { keeper: Keeper::new(at), rest: 0 }
    }

    /// Bytes that the guest has put out and that have not been written.
    pub(crate) fn undelivered_bytes(&self) -> u64 {
        self.rest.saturating_add(self.keeper.unread_bytes())
    }
}

/// Delivers all that the port puts out, and has the guest wait for it. Ends when it cannot be written.
pub(crate) async fn deliver(at: &At, wire: &Wire, delivery: &mut Delivery<'_>) -> io::Error {
    let mut scratch = vec![0; DELIVER_BYTES];
    let mut turn = 0;
    loop {
        let read = delivery.keeper.read(&mut scratch);
        if read.count == 0 {
            at.port().news().await;
            turn = 0;
            continue;
        }
        let bytes = scratch.get(..read.count).unwrap_or_default();
        if let Err(error) = wire.write_all(bytes, &mut delivery.rest).await {
            return error;
        }
        turn += read.count;
        if turn >= TURN_BYTES {
            yield_now().await;
            turn = 0;
        }
    }
}

/// Gives the guest what comes over the wire, as fast as it reads; while `may_type` says no, that is thrown away.
/// Ends at the end of what comes, or when nothing can be read any more.
pub(crate) async fn hear(at: &At, wire: &Wire, may_type: impl Fn() -> bool) -> io::Result<()> {
    let mut scratch = vec![0; HEAR_BYTES];
    // Asked when there is something to read: who may type and how much room there is changes meanwhile.
    let limit = || match may_type() {
        true => Some(at.port().inbox().room()).filter(|room| *room >= ROOM_MIN).unwrap_or(0),
        false => HEAR_BYTES,
    };
    let mut turn = 0;
    loop {
        if limit() == 0 {
            at.port().news().await;
            turn = 0;
            continue;
        }
        let Some(count) = wire.read(&mut scratch, limit).await? else { continue };
        if count == 0 {
            return Ok(());
        }
        if may_type() {
            at.give(scratch.get(..count).unwrap_or_default()).await;
        }
        turn += count;
        if turn >= TURN_BYTES {
            yield_now().await;
            turn = 0;
        }
    }
}
