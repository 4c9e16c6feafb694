//! The engine's other side, played by the test: it holds operations until the test ends them.
//!
//! Contract: an operation is never lost and ends once. Watches, calls and their cancellations behave
//! as the kernel's do, with what is left to chance there drawn from the seed: a watch may have to be
//! set anew, a cancellation may come too late. A kick stays readable for ever, as a counter does that
//! nobody reads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;

use super::channels::Channels;
use super::random::Random;
use crate::engine::{
    ChannelIndex, Engine, Event, FileIndex, Op, Readiness, Subject, Token, Wait, Zeroing,
};
use crate::memory::HostBuffer;

/// What an operation is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Fill the buffers from `offset` on.
    Read {
        /// Byte offset.
        offset: u64,
    },
    /// Write the buffers at `offset`.
    Write {
        /// Byte offset.
        offset: u64,
        /// It is stable when it ends.
        durable: bool,
    },
    /// Make stable what has ended before.
    Sync,
    /// Let a range read as zeros.
    Zero {
        /// Byte offset.
        offset: u64,
        /// How far.
        len_bytes: u64,
        /// In which way.
        zeroing: Zeroing,
    },
}

/// An operation that the engine has been given.
#[derive(Clone, Debug)]
pub struct Operation {
    /// Its place among all operations, from 0.
    pub number: u64,
    /// The queue that submitted it.
    pub queue: u16,
    /// The slot, and so the head, of the chain that it serves.
    pub slot: u16,
    /// The file.
    pub file: FileIndex,
    /// What it is to do.
    pub work: Work,
    step: u16,
    buffers: Vec<HostBuffer>,
}

impl Operation {
    /// Bytes in its buffers.
    pub fn len_bytes(&self) -> usize {
        self.buffers.iter().map(HostBuffer::len).sum()
    }

    /// Its buffers: addresses in this process and lengths.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, usize)> {
        self.buffers.iter().map(|buffer| (buffer.address(), buffer.len()))
    }

    /// What its buffers hold.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len_bytes()];
        let mut done = 0;
        for buffer in &self.buffers {
            done += buffer.read(0, &mut bytes[done..]);
        }
        bytes
    }

    /// Puts bytes into its buffers, from the first on.
    pub fn fill(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for buffer in &self.buffers {
            rest = &rest[buffer.write(0, rest)..];
        }
    }
}

/// What a test holds of the simulated engine.
pub struct Kernel {
    state: Rc<RefCell<State>>,
}

struct State {
    random: Random,
    /// By their numbers: what has not ended.
    held: BTreeMap<u64, Operation>,
    submitted: u64,
    /// What the next turn brings.
    arrived: Vec<Event>,
    /// By queue: the kick.
    kicks: BTreeMap<u16, Watch>,
    /// By queue: calls that were made.
    calls: BTreeMap<u16, u64>,
    /// By queue: times that its error was told.
    errors: BTreeMap<u16, u64>,
    channels: Channels,
}

/// A kick descriptor.
#[derive(Default)]
struct Watch {
    watched: bool,
    /// Somebody has kicked: it is readable from then on.
    readable: bool,
}

/// The engine that goes with a [`Kernel`].
pub(super) struct SimulatedEngine {
    state: Rc<RefCell<State>>,
}

impl Kernel {
    pub(super) fn new(seed: u64) -> (Self, SimulatedEngine) {
        let state = Rc::new(RefCell::new(State {
            random: Random::new(seed),
            held: BTreeMap::new(),
            submitted: 0,
            arrived: Vec::new(),
            kicks: BTreeMap::new(),
            calls: BTreeMap::new(),
            errors: BTreeMap::new(),
            channels: Channels::default(),
        }));
        (Self { state: Rc::clone(&state) }, SimulatedEngine { state })
    }

    /// The operations that have not ended, in the order in which they were submitted.
    pub fn held(&self) -> Vec<Operation> {
        self.state.borrow().held.values().cloned().collect()
    }

    /// How many operations have been submitted.
    pub fn submitted(&self) -> u64 {
        self.state.borrow().submitted
    }

    /// Ends an operation with this many bytes, or this error.
    ///
    /// # Panics
    /// It has ended already.
    pub fn end(&self, number: u64, result: Result<u32, Errno>) {
        let mut state = self.state.borrow_mut();
        let operation = state.held.remove(&number).expect("an operation that is held");
        let Operation { queue, slot, step, .. } = operation;
        let result = match result {
            Ok(bytes) => i32::try_from(bytes).expect("fewer than 2^31 bytes"),
            Err(errno) => -errno.raw_os_error(),
        };
        state.arrive(Subject::Operation { queue, token: Token { slot, step } }, result, false);
    }

    /// Calls that were made to a queue's driver so far.
    pub fn calls(&self, queue: u16) -> u64 {
        self.state.borrow().calls.get(&queue).copied().unwrap_or(0)
    }

    /// Times that a queue's error was told so far.
    pub fn errors(&self, queue: u16) -> u64 {
        self.state.borrow().errors.get(&queue).copied().unwrap_or(0)
    }

    /// The driver kicks a queue.
    pub fn kick(&self, queue: u16) {
        let mut state = self.state.borrow_mut();
        let watch = state.kicks.entry(queue).or_default();
        watch.readable = true;
        if watch.watched {
            state.fire(queue);
        }
    }

    /// A frame comes in over a channel.
    pub fn deliver(&self, channel: ChannelIndex, frame: Vec<u8>) {
        let mut state = self.state.borrow_mut();
        state.channels.deliver(channel, frame);
        state.tell_of_channels();
    }

    /// The frames that were sent over a channel since this was asked the last time.
    pub fn take_sent(&self, channel: ChannelIndex) -> Vec<Vec<u8>> {
        self.state.borrow_mut().channels.take_sent(channel)
    }

    /// How many frames have come in over a channel and were not received yet.
    pub fn waiting(&self, channel: ChannelIndex) -> usize {
        self.state.borrow().channels.waiting(channel)
    }

    /// From now on so many frames find room in a channel; `None`: any number.
    pub fn set_room(&self, channel: ChannelIndex, room: Option<usize>) {
        let mut state = self.state.borrow_mut();
        state.channels.set_room(channel, room);
        state.tell_of_channels();
    }

    /// From now on every transfer over a channel fails so; `None`: none does.
    pub fn set_fault(&self, channel: ChannelIndex, fault: Option<Errno>) {
        let mut state = self.state.borrow_mut();
        state.channels.set_fault(channel, fault);
        state.tell_of_channels();
    }

    /// A queue gets another kick descriptor.
    pub(super) fn replace_kick(&self, queue: u16) {
        self.state.borrow_mut().kicks.insert(queue, Watch::default());
    }

    /// The mailbox is rung.
    pub(super) fn mail(&self) {
        self.state.borrow_mut().arrive(Subject::Mail, libc::POLLIN.into(), true);
    }
}

impl State {
    fn arrive(&mut self, subject: Subject, result: i32, more: bool) {
        self.arrived.push(Event { subject, result, more });
    }

    /// Tells those whose channel is ready.
    fn tell_of_channels(&mut self) {
        while let Some(queue) = self.channels.next_ready() {
            self.arrive(Subject::Channel { queue }, libc::POLLIN.into(), false);
        }
    }

    /// A watch fires; now and then for the last time, as it does when the kernel is out of room.
    fn fire(&mut self, queue: u16) {
        let goes_on = !self.random.once_in(8);
        self.kicks.entry(queue).or_default().watched = goes_on;
        self.arrive(Subject::Kick { queue }, libc::POLLIN.into(), goes_on);
    }
}

impl Engine for SimulatedEngine {
    fn submit(&mut self, queue: u16, token: Token, op: Op<'_>) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let (file, work, buffers) = match op {
            Op::Read { file, offset, into } => (file, Work::Read { offset }, Some(into)),
            Op::Write { file, offset, from, durable } => {
                (file, Work::Write { offset, durable }, Some(from))
            }
            Op::Sync { file } => (file, Work::Sync, None),
            Op::Zero { file, offset, len_bytes, zeroing } => {
                (file, Work::Zero { offset, len_bytes, zeroing }, None)
            }
        };
        let buffers = buffers.map(|buffers| buffers.iter().collect()).unwrap_or_default();
        let number = state.submitted;
        state.submitted += 1;
        let Token { slot, step } = token;
        state.held.insert(number, Operation { number, queue, slot, file, work, step, buffers });
        Ok(())
    }

    fn receive(&mut self, channel: ChannelIndex, into: &[HostBuffer]) -> Result<usize, Errno> {
        self.state.borrow_mut().channels.receive(channel, into)
    }

    fn send_to(&mut self, channel: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno> {
        self.state.borrow_mut().channels.send(channel, from)
    }

    fn await_channel(
        &mut self,
        queue: u16,
        channel: ChannelIndex,
        readiness: Readiness,
    ) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.channels.wait(queue, channel, readiness);
        state.tell_of_channels();
        Ok(())
    }

    fn watch(&mut self, subject: Subject, _fd: &OwnedFd) -> io::Result<()> {
        let Subject::Kick { queue } = subject else { return Ok(()) };
        let mut state = self.state.borrow_mut();
        let watch = state.kicks.entry(queue).or_default();
        assert!(!watch.watched, "the kick of queue {queue} is watched twice");
        watch.watched = true;
        if watch.readable {
            state.fire(queue);
        }
        Ok(())
    }

    fn signal(&mut self, subject: Subject, _fd: &OwnedFd) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let heard = match subject {
            Subject::Call { .. } => &mut state.calls,
            Subject::Error { .. } => &mut state.errors,
            other => unreachable!("{other:?} is nobody to signal"),
        };
        *heard.entry(subject.queue()).or_default() += 1;
        state.arrive(subject, 8, false);
        Ok(())
    }

    fn call_off(&mut self, what: Subject) -> io::Result<()> {
        let queue = what.queue();
        let mut state = self.state.borrow_mut();
        let watched = matches!(what, Subject::Kick { .. })
            && state.kicks.get(&queue).is_some_and(|watch| watch.watched);
        let told = Subject::CalledOff { queue };
        if matches!(what, Subject::Channel { .. }) {
            let found = state.channels.call_off(queue);
            if found {
                state.arrive(what, -libc::ECANCELED, false);
            }
            state.arrive(told, if found { 0 } else { -libc::ENOENT }, false);
        } else if !watched {
            state.arrive(told, -libc::ENOENT, false);
        } else if state.random.once_in(4) {
            // It was just firing.
            state.arrive(what, libc::POLLIN.into(), true);
            state.arrive(told, -libc::EALREADY, false);
        } else {
            state.kicks.insert(queue, Watch::default());
            state.arrive(what, -libc::ECANCELED, false);
            state.arrive(told, 0, false);
        }
        Ok(())
    }

    fn has_events(&mut self) -> bool {
        !self.state.borrow().arrived.is_empty()
    }

    fn send(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn turn(&mut self, _wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        events.append(&mut self.state.borrow_mut().arrived);
        Ok(())
    }
}
