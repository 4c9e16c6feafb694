//! One port of the device: what it puts out, what is on its way to the guest, and who is to be told.
//!
//! Contract: a [`Port`] is a *place* for a port, made when the device is opened and there until it ends; which port is
//! plugged in there is the [conversation](crate::control)'s business. The two queues and the main thread share it without a lock on any
//! byte's way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::doorbell::Doorbell;
use crate::inbox::Inbox;
use crate::transcript::{Author, Transcript};

/// Emergency bytes that wait for the transmit queue, which is about to take them.
const EMERGENCY_BYTES_MAX: usize = 4096;

/// See the module's head.
pub(crate) struct Port {
    transcript: Transcript,
    inbox: Inbox,
    /// The guest has opened it: what it is given is read.
    is_guest_open: AtomicBool,
    /// There is somebody for what the guest puts out.
    takes_output: AtomicBool,
    /// What the guest puts out is not for the port that is plugged in here, if there is one.
    discards_output: AtomicBool,
    /// Wakes the receive queue: there is input, or the guest has opened the port.
    input_bell: Doorbell,
    /// Wakes the transmit queue: there is room.
    room_bell: Doorbell,
    /// Wakes the endpoints on the main thread: they are to look again at whatever they wait for.
    news: Notify,
    ends: Mutex<Ends>,
}

/// What the transmit queue has while it runs. The lock is taken where a ring starts or stops, and for the emergency register.
struct Ends {
    /// `None` while a queue has it.
    author: Option<Author>,
    /// What was written to the emergency register meanwhile.
    emergency: Vec<u8>,
}

impl Port {
    pub(crate) fn new(replay_bytes: u64) -> rustix::io::Result<Self> {
        Ok(Self {
            transcript: Transcript::new(replay_bytes),
            inbox: Inbox::new(),
            is_guest_open: AtomicBool::new(false),
            takes_output: AtomicBool::new(false),
            discards_output: AtomicBool::new(true),
            input_bell: Doorbell::new()?,
            room_bell: Doorbell::new()?,
            news: Notify::new(),
            ends: Mutex::new(Ends { author: Some(Author::new()), emergency: Vec::new() }),
        })
    }

    pub(crate) fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    pub(crate) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(crate) fn input_bell(&self) -> &Doorbell {
        &self.input_bell
    }

    pub(crate) fn room_bell(&self) -> &Doorbell {
        &self.room_bell
    }

    pub(crate) fn is_guest_open(&self) -> bool {
        self.is_guest_open.load(Ordering::Acquire)
    }

    pub(crate) fn takes_output(&self) -> bool {
        self.takes_output.load(Ordering::Acquire)
    }

    /// Whether what the guest puts out is thrown away: nothing is plugged in, or it is for the port that was before.
    ///
    /// Linux takes its buffers back when it hears that a port is removed, and they must not come back used after that; and the
    /// driver of a console looks for the used entry and does nothing else.
    pub(crate) fn discards_output(&self) -> bool {
        self.discards_output.load(Ordering::Acquire)
    }

    /// What the guest puts out is for the port that is plugged in here, or is not.
    pub(crate) fn set_discards_output(&self, discards: bool) {
        self.discards_output.store(discards, Ordering::Release);
        self.room_bell.ring_if_armed();
    }

    /// Another port is plugged in here. On the main thread.
    pub(crate) fn begin_anew(&self) {
        self.transcript.begin_anew();
        self.inbox.clear();
        self.input_bell.ring_if_armed();
    }

    /// The guest has opened or closed the port.
    pub(crate) fn set_guest_open(&self, is_open: bool) {
        self.is_guest_open.store(is_open, Ordering::Release);
        self.input_bell.ring_if_armed();
    }

    /// There is somebody for what the guest puts out, or no longer. On the main thread.
    pub(crate) fn set_takes_output(&self, takes: bool) {
        self.takes_output.store(takes, Ordering::Release);
        self.room_bell.ring_if_armed();
    }

    /// Gives bytes to the guest as far as there is room, and wakes whoever hands them over; how many. On the main thread.
    pub(crate) fn push(&self, from: &[u8]) -> usize {
        let count = self.inbox.push(from);
        self.input_bell.ring_if_armed();
        count
    }

    /// Whether the receive queue has something to hand over.
    pub(crate) fn has_input(&self) -> bool {
        self.is_guest_open() && self.inbox.len_bytes() > 0
    }

    /// Whether the transmit queue may go on.
    pub(crate) fn has_room(&self) -> bool {
        self.discards_output() || (self.takes_output() && self.transcript.room() > 0)
    }

    /// A keeper has moved: the transmit queue may have room. On the main thread.
    pub(crate) fn made_room(&self) {
        self.room_bell.ring_if_armed();
    }

    /// Has all who wait for news of this port look again. On the main thread.
    pub(crate) fn look(&self) {
        self.news.notify_waiters();
    }

    /// Waits for news. Whoever waits looks first; on the main thread nothing comes between the look and this.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }

    /// The transmit queue starts: the author is its own until it [leaves him](Self::leave_author).
    pub(crate) fn take_author(&self) -> Author {
        // There is one queue at a time.
        self.ends().author.take().unwrap_or_else(Author::new)
    }

    /// The transmit queue ends. What the emergency register was given since it has last looked comes now; whether there was
    /// anything.
    pub(crate) fn leave_author(&self, mut author: Author) -> bool {
        let ends = &mut *self.ends();
        let mut has_news = false;
        for byte in ends.emergency.drain(..) {
            has_news |= author.append_byte(&self.transcript, byte);
        }
        ends.author = Some(author);
        has_news
    }

    /// The driver starts anew: what it sends has not been seen in part.
    pub(crate) fn forget_driver(&self) {
        if let Some(author) = &mut self.ends().author {
            author.forget_chain();
        }
    }

    /// A byte of the emergency register. What finds no room is lost: there is no other moment to take it.
    pub(crate) fn emergency(&self, byte: u8) {
        let ends = &mut *self.ends();
        match &mut ends.author {
            Some(author) => {
                author.append_byte(&self.transcript, byte);
            }
            None if ends.emergency.len() < EMERGENCY_BYTES_MAX => {
                ends.emergency.push(byte);
            }
            None => {}
        }
    }

    /// What the emergency register was given while the transmit queue ran.
    pub(crate) fn take_emergency(&self) -> Vec<u8> {
        std::mem::take(&mut self.ends().emergency)
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        // A panic elsewhere leaves these as whole as they were.
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
