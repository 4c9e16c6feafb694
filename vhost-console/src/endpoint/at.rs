//! Where an endpoint is: at which port, of which device.
//!
//! Contract: an endpoint has one of these, and reaches its port by it alone. A data port is open to the guest while there
//! is a client at one of its endpoints: those that have clients say so by [`At::come`], [`At::take_no_output`] and
//! [`At::leave`]. All on the main thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::config::Size;
use crate::device::Shared;
use crate::port::Port;
use crate::transcript::{Cursor, KeeperId, Read};

/// See the module's head.
#[derive(Clone)]
pub(crate) struct At {
    shared: Arc<Shared>,
    id: u16,
    is_console: bool,
    clients: Arc<Clients>,
}

/// The clients at all endpoints of a data port. Only the main thread counts; the atomics are for the compiler.
#[derive(Default)]
struct Clients {
    /// There are so many.
    present: AtomicU32,
    /// So many of them take output: a client that has hung up may have left input behind.
    take_output: AtomicU32,
}

impl At {
    pub(crate) fn new(shared: Arc<Shared>, id: u16, is_console: bool) -> Self {
        Self { shared, id, is_console, clients: Arc::default() }
    }

    pub(crate) fn port(&self) -> &Port {
        &self.shared.ports()[usize::from(self.id)]
    }

    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// How large a terminal at this port is.
    pub(crate) fn size(&self) -> Option<Size> {
        self.shared.conversation().plugged(self.id).map(|plugged| plugged.size)
    }

    /// Whether people are at the other end, who look on: nobody waits for them.
    pub(crate) fn is_console(&self) -> bool {
        self.is_console
    }

    /// A port whose endpoints need no client is open.
    pub(crate) fn open(&self) {
        self.shared.set_host_open(self.id, true);
    }

    /// A client has come.
    pub(crate) fn come(&self) {
        add(&self.clients.take_output);
        if add(&self.clients.present) == 0 || !self.port().takes_output() {
            self.open();
        }
    }

    /// A client takes no more output: without another one what the guest writes waits in its ring.
    pub(crate) fn take_no_output(&self) {
        if subtract(&self.clients.take_output) == 1 {
            self.port().set_takes_output(false);
        }
    }

    /// A client that took no more output has gone.
    pub(crate) fn leave(&self) {
        subtract(&self.clients.present);
    }

    /// Tells the guest that the port is closed when it has read all that came, unless a client comes before that.
    pub(crate) async fn tell_closed(&self) {
        while self.clients.present.load(Ordering::Relaxed) == 0 {
            if self.port().inbox().len_bytes() == 0 {
                self.shared.set_host_open(self.id, false);
                return;
            }
            self.port().news().await;
        }
    }

    /// Gives the guest all of this, as fast as it reads.
    pub(crate) async fn give(&self, mut bytes: &[u8]) {
        loop {
            bytes = bytes.get(self.port().push(bytes)..).unwrap_or_default();
            if bytes.is_empty() {
                return;
            }
            self.port().news().await;
        }
    }
}

fn add(count: &AtomicU32) -> u32 {
    count.fetch_add(1, Ordering::Relaxed)
}

fn subtract(count: &AtomicU32) -> u32 {
    count.fetch_sub(1, Ordering::Relaxed)
}

/// A reader for whom the guest waits, until this is dropped, or as long as it [insists](Self::insist).
pub(crate) struct Keeper<'a> {
    at: &'a At,
    id: Option<KeeperId>,
    cursor: Cursor,
}

impl<'a> Keeper<'a> {
    /// One that starts with what comes next.
    pub(crate) fn new(at: &'a At) -> Self {
        let mut keeper = Self { at, id: None, cursor: at.port().transcript().now() };
        keeper.insist();
        keeper
    }

    /// Copies what comes next; it is waited for no longer.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Read {
        let read = self.peek(into);
        self.pass(read.lost_bytes + read.count as u64);
        read
    }

    /// Copies what comes next; it stays there until it was [passed](Self::pass).
    pub(crate) fn peek(&self, into: &mut [u8]) -> Read {
        let mut cursor = self.cursor;
        self.at.port().transcript().read(&mut cursor, into)
    }

    /// Is done with the bytes that come next, or has lost them.
    pub(crate) fn pass(&mut self, bytes: u64) {
        self.cursor.pass(bytes);
        if let (Some(id), 1..) = (self.id, bytes) {
            self.at.port().transcript().keep(id, self.cursor);
            self.at.port().made_room();
        }
    }

    /// The guest waits for it from here on.
    pub(crate) fn insist(&mut self) {
        if self.id.is_none() {
            self.id = Some(self.at.port().transcript().add_keeper(self.cursor));
        }
    }

    /// The guest does not wait for it any more.
    pub(crate) fn forgo(&mut self) {
        if let Some(id) = self.id.take() {
            self.at.port().transcript().remove_keeper(id);
            self.at.port().made_room();
        }
    }

    /// Bytes that it has not read.
    pub(crate) fn unread_bytes(&self) -> u64 {
        self.at.port().transcript().unread_bytes(self.cursor)
    }

    /// Bytes of the port's that it is done with.
    pub(crate) fn offset(&self) -> u64 {
        self.cursor.offset()
    }
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        self.forgo();
    }
}
