//! The engine without io_uring: epoll, and a pool of threads for what may block.
//!
//! Contract: as [`Engine`] says. Nothing that a worker calls here waits for a file or for a front end:
//! operations are performed by the [`pool`]; calls are written when there is room, else when epoll
//! says that there is. The worker's sleep ends by epoll, which watches kicks, mail, calls without room
//! and the bell of [`completions`].
//!
//! A turn that has news already makes no system call, but for every [`UNSEEN_MAX`]th: what only epoll
//! tells (mail above all) must not wait for a pause in the work.
//!
//! A watch is edge-triggered: the eventfd is never read, each write to it is an edge. An entry leaves
//! the epoll set before the last event of its subject is given out, because from then on its
//! descriptor may close while the front end's copy would keep the entry alive.

#![allow(unsafe_code, reason = "descriptors in the epoll set are borrowed by number")]

mod completions;
mod job;
mod notification;
mod pool;

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use self::completions::Completions;
use self::job::Job;
use self::pool::{Limits, Pool};
use super::{ChannelIndex, Channels, Engine, Event, Op, Readiness, Subject, Token, Wait};
use crate::memory::HostBuffer;
use crate::sandbox::Call;
use crate::sandbox::calls::{EPOLL, START_THREADS};

/// Threads of a worker's pool. A disk that takes its time is kept busy by them; a fast one has its
/// data in the page cache, where even one thread is enough.
const THREADS_MAX: usize = 16;
/// A thread that nobody has needed for so long is needed no more: an idle daemon is small again.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Turns, or attempts at one, between two looks at epoll: some tens of microseconds of work.
const UNSEEN_MAX: u32 = 32;
/// Descriptors that epoll tells of at once; the others are told the next time.
const FOUND_MAX: usize = 64;
/// Stands for the bell of the completions in the epoll set; no subject has this number.
const BELL: u64 = u64::MAX;

/// The system calls of a worker with this engine, and of its pool: to wait, to start threads, and what [`Op`] names.
pub(super) fn calls() -> Vec<Call> {
    let set_up = [Call::any(libc::SYS_epoll_create1), Call::any(libc::SYS_eventfd2)];
    let of_ops = Op::KERNEL.iter().flat_map(|kernel| kernel.calls);
    set_up.iter().chain(EPOLL).chain(START_THREADS).chain(of_ops).copied().collect()
}

/// See the module's head.
pub(crate) struct Threads {
    epoll: OwnedFd,
    files: Vec<RawFd>,
    /// Goes first: its threads hold operations.
    pool: Pool<Job>,
    completions: Arc<Completions>,
    /// Jobs that the pool is yet to be given.
    outbox: Vec<Job>,
    /// Events that happened in this thread.
    news: Vec<Event>,
    watched: Vec<Entry>,
    /// Calls that wait for room.
    unwritten: Vec<Entry>,
    channels: Channels,
    /// Channels that are waited for.
    awaited: Vec<Entry>,
    /// Turns since the last look at epoll.
    unseen: u32,
    found: Vec<epoll::Event>,
}

/// A descriptor in the epoll set.
#[derive(Clone, Copy)]
struct Entry {
    subject: Subject,
    fd: RawFd,
}

impl Entry {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: whoever has it watched or written to keeps it open until the last event of the
        // subject; this entry is gone before that is given out.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Threads {
    /// Sets an engine up for the calling thread.
    ///
    /// # Errors
    /// No descriptors or threads are left.
    pub(crate) fn new(files: Vec<RawFd>, channels: Channels) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let completions = Arc::new(Completions::new()?);
        let edges = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, completions.bell(), EventData::new_u64(BELL), edges)?;
        let limits = Limits { thread_count: THREADS_MAX, idle: IDLE_MAX };
        let pool = Pool::start(limits, {
            let completions = Arc::clone(&completions);
            move |job: Job| completions.push(job.run())
        })?;
        Ok(Self {
            epoll,
            files,
            pool,
            completions,
            outbox: Vec::new(),
            news: Vec::new(),
            watched: Vec::new(),
            unwritten: Vec::new(),
            channels,
            awaited: Vec::new(),
            unseen: 0,
            found: Vec::with_capacity(FOUND_MAX),
        })
    }

    /// Something has ended.
    fn tell(&mut self, subject: Subject, result: Result<usize, Errno>) {
        let result = result.map_or_else(|error| -error.raw_os_error(), |moved| moved as i32);
        self.news.push(Event { subject, result, more: false });
    }

    /// Takes the entry of a subject out of the epoll set.
    fn forget(&mut self, subject: Subject) -> Option<()> {
        let list = match subject {
            Subject::Kick { .. } | Subject::Mail => &mut self.watched,
            Subject::Channel { .. } => &mut self.awaited,
            _ => &mut self.unwritten,
        };
        let place = list.iter().position(|entry| entry.subject == subject)?;
        let entry = list.swap_remove(place);
        let gone = epoll::delete(&self.epoll, entry.fd());
        // A channel that was opened anew meanwhile has left the set with its old self.
        let replaced = matches!(subject, Subject::Channel { .. }) && gone == Err(Errno::NOENT);
        assert!(gone.is_ok() || replaced, "a descriptor in the epoll set is open: {gone:?}");
        Some(())
    }

    /// A call without room may have some now.
    fn write_again(&mut self, subject: Subject) -> io::Result<()> {
        let Some(entry) = self.unwritten.iter().find(|entry| entry.subject == subject) else {
            return Ok(());
        };
        match notification::try_write(entry.fd()) {
            Some(result) => {
                self.forget(subject);
                self.tell(subject, result);
            }
            None => {
                let data = EventData::new_u64(subject.encode());
                epoll::modify(
                    &self.epoll,
                    entry.fd(),
                    data,
                    EventFlags::OUT | EventFlags::ONESHOT,
                )?;
            }
        }
        Ok(())
    }

    /// Gives out what is there without a system call; whether there was anything.
    fn take_news(&mut self, events: &mut Vec<Event>) -> bool {
        let before = events.len();
        events.append(&mut self.news);
        self.completions.take(events);
        events.len() > before
    }

    /// Asks epoll.
    fn look(&mut self, wait: Wait) -> io::Result<()> {
        self.unseen = 0;
        self.found.clear();
        let asked = match wait {
            Wait::No => self.ask_epoll(Some(Timespec::default())),
            Wait::Forever => self.ask_epoll(None),
            // epoll counts milliseconds, and its finer sibling is younger than io_uring.
            Wait::AtMost(limit) => {
                let seconds = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
                let limit = Timespec { tv_sec: seconds, tv_nsec: limit.subsec_nanos().into() };
                poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&limit))
                    .and_then(|_| self.ask_epoll(Some(Timespec::default())))
            }
        };
        match asked {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn ask_epoll(&mut self, limit: Option<Timespec>) -> Result<usize, Errno> {
        epoll::wait(&self.epoll, spare_capacity(&mut self.found), limit.as_ref())
    }

    /// Makes events of what epoll has found.
    fn take_found(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        let mut found = mem::take(&mut self.found);
        for ready in found.drain(..) {
            let (flags, data) = (ready.flags, ready.data);
            // The bell says only that there is something to take.
            if data.u64() == BELL {
                continue;
            }
            match Subject::decode(data.u64()) {
                subject @ (Subject::Kick { .. } | Subject::Mail) => {
                    events.push(Event { subject, result: flags.bits() as i32, more: true });
                }
                subject @ Subject::Channel { .. } => {
                    // One that was called off while it fired has had its event.
                    if self.forget(subject).is_some() {
                        events.push(Event { subject, result: flags.bits() as i32, more: false });
                    }
                }
                subject => self.write_again(subject)?,
            }
        }
        self.found = found;
        Ok(())
    }
}

impl Engine for Threads {
    fn submit(&mut self, queue: u16, token: Token, op: Op<'_>) -> io::Result<()> {
        self.outbox.push(Job::new(Subject::Operation { queue, token }, op, &self.files));
        Ok(())
    }

    fn receive(&mut self, channel: ChannelIndex, into: &[HostBuffer]) -> Result<usize, Errno> {
        self.channels.receive(channel, into)
    }

    fn send_to(&mut self, channel: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno> {
        self.channels.send(channel, from)
    }

    fn await_channel(
        &mut self,
        queue: u16,
        channel: ChannelIndex,
        readiness: Readiness,
    ) -> io::Result<()> {
        let subject = Subject::Channel { queue };
        let entry = Entry { subject, fd: self.channels.descriptor(channel) };
        let data = EventData::new_u64(subject.encode());
        let wanted = match readiness {
            Readiness::Readable => EventFlags::IN,
            Readiness::Writable => EventFlags::OUT,
        };
        match epoll::add(&self.epoll, entry.fd(), data, wanted | EventFlags::ONESHOT) {
            Ok(()) => self.awaited.push(entry),
            Err(error) => self.tell(subject, Err(error)),
        }
        Ok(())
    }

    fn watch(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()> {
        // What is readable already is an edge, too.
        let data = EventData::new_u64(subject.encode());
        match epoll::add(&self.epoll, fd, data, EventFlags::IN | EventFlags::ET) {
            Ok(()) => self.watched.push(Entry { subject, fd: fd.as_raw_fd() }),
            Err(error) => self.tell(subject, Err(error)),
        }
        Ok(())
    }

    fn signal(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()> {
        match notification::try_write(fd.as_fd()) {
            Some(result) => self.tell(subject, result),
            None => {
                let data = EventData::new_u64(subject.encode());
                match epoll::add(&self.epoll, fd, data, EventFlags::OUT | EventFlags::ONESHOT) {
                    Ok(()) => self.unwritten.push(Entry { subject, fd: fd.as_raw_fd() }),
                    Err(error) => self.tell(subject, Err(error)),
                }
            }
        }
        Ok(())
    }

    fn call_off(&mut self, what: Subject) -> io::Result<()> {
        let found = self.forget(what);
        if found.is_some() {
            self.tell(what, Err(Errno::CANCELED));
        }
        let own = Subject::CalledOff { queue: what.queue() };
        self.tell(own, found.map(|()| 0).ok_or(Errno::NOENT));
        Ok(())
    }

    fn has_events(&mut self) -> bool {
        !self.news.is_empty() || self.completions.has_any() || self.unseen >= UNSEEN_MAX
    }

    fn send(&mut self) -> io::Result<()> {
        self.unseen += 1;
        if !self.outbox.is_empty() {
            self.pool.hand_over(&mut self.outbox);
        }
        Ok(())
    }

    fn turn(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        self.send()?;
        let has_news = self.take_news(events);
        if has_news && self.unseen < UNSEEN_MAX {
            return Ok(());
        }
        let sleeps = !has_news && wait != Wait::No && self.completions.fall_asleep();
        self.look(if sleeps { wait } else { Wait::No })?;
        self.completions.wake_up();
        self.take_found(events)?;
        self.take_news(events);
        Ok(())
    }
}
