//! A descriptor of the front end that is written to wake somebody: a ring's call, or its error.
//!
//! Contract: ringing never blocks the worker and never fails the ring. The front end chooses what
//! the descriptor is (an eventfd, a pipe, a socket), whether it is blocking, and whether it still
//! has room; so the engine writes to it, one write at a time, and the kernel, not the worker, waits
//! for room. Who rings while a write is under way is heard when it ends; who rings again by then
//! adds nothing, because whoever reads a full descriptor is awake. A bell that is called off ends
//! its write at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::engine::{Subject, Uring};

/// What became of a ring of the bell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rung {
    /// It was written, or will be.
    Yes,
    /// It was dropped: the descriptor is full, or is gone.
    Dropped,
}

/// See the module's head.
pub(super) struct Bell {
    subject: Subject,
    target: Option<Arc<OwnedFd>>,
    /// What is being written to: open until the kernel is through with it.
    writing: Option<Arc<OwnedFd>>,
    /// Somebody rang while it was being written to.
    again: bool,
}

impl Bell {
    /// A bell whose writes come back from the engine as `subject`; without a target it is mute.
    pub(super) fn new(subject: Subject, target: Option<Arc<OwnedFd>>) -> Self {
        Self { subject, target, writing: None, again: false }
    }

    /// Rings once.
    pub(super) fn ring(&mut self, engine: &mut Uring) -> std::io::Result<Rung> {
        let Some(target) = &self.target else { return Ok(Rung::Yes) };
        if self.writing.is_none() {
            engine.signal(self.subject, target)?;
            self.writing = Some(Arc::clone(target));
        } else if std::mem::replace(&mut self.again, true) {
            return Ok(Rung::Dropped);
        }
        Ok(Rung::Yes)
    }

    /// A write has ended.
    pub(super) fn written(
        &mut self,
        result: Result<u32, Errno>,
        engine: &mut Uring,
    ) -> std::io::Result<Rung> {
        self.writing = None;
        if std::mem::take(&mut self.again) {
            self.ring(engine)?;
        }
        Ok(if result.is_ok() { Rung::Yes } else { Rung::Dropped })
    }

    /// Uses another target from the next ring on; a write that waits at the old one is called off.
    pub(super) fn set_target(
        &mut self,
        target: Option<Arc<OwnedFd>>,
        engine: &mut Uring,
    ) -> std::io::Result<()> {
        self.target = target;
        if self.is_idle() { Ok(()) } else { engine.call_off(self.subject) }
    }

    /// Falls silent: what was rung is written now or never.
    pub(super) fn silence(&mut self, engine: &mut Uring) -> std::io::Result<()> {
        self.target = None;
        self.again = false;
        if self.is_idle() { Ok(()) } else { engine.call_off(self.subject) }
    }

    /// Whether nothing is being written.
    pub(super) fn is_idle(&self) -> bool {
        self.writing.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::pipe::pipe;

    use super::{Bell, Rung};
    use crate::engine::{Event, Subject, Uring, Wait};

    const SUBJECT: Subject = Subject::Call { queue: 0 };

    fn bell(fd: OwnedFd) -> (Bell, Uring) {
        (Bell::new(SUBJECT, Some(Arc::new(fd))), Uring::new(Vec::new()).unwrap())
    }

    /// Turns once; what became of the writes that ended.
    fn turn(bell: &mut Bell, engine: &mut Uring, wait: Wait) -> Vec<Rung> {
        let mut events: Vec<Event> = Vec::new();
        engine.turn(wait, &mut events).unwrap();
        let written = events.iter().filter(|event| event.subject == SUBJECT);
        written.map(|event| bell.written(event.outcome(), engine).unwrap()).collect()
    }

    #[test]
    fn bell_is_heard_at_an_eventfd() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let (mut bell, mut engine) = bell(fd.try_clone().unwrap());
        for _ in 0..3 {
            assert_eq!(bell.ring(&mut engine).unwrap(), Rung::Yes);
            assert_eq!(turn(&mut bell, &mut engine, Wait::Forever), [Rung::Yes]);
        }
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 3);
    }

    #[test]
    fn full_blocking_eventfd_holds_nobody_up_and_is_rung_when_it_has_room() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (mut bell, mut engine) = bell(fd.try_clone().unwrap());
        let mut rung = Vec::new();
        for _ in 0..3 {
            rung.push(bell.ring(&mut engine).unwrap());
            assert_eq!(turn(&mut bell, &mut engine, Wait::No), []);
        }
        assert_eq!(rung, [Rung::Yes, Rung::Yes, Rung::Dropped]);
        rustix::io::read(&fd, &mut [0; 8]).unwrap();
        while !bell.is_idle() {
            turn(&mut bell, &mut engine, Wait::Forever);
        }
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    }

    #[test]
    fn silenced_bell_ends_its_write() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (mut bell, mut engine) = bell(fd);
        bell.ring(&mut engine).unwrap();
        bell.ring(&mut engine).unwrap();
        turn(&mut bell, &mut engine, Wait::No);
        bell.silence(&mut engine).unwrap();
        let mut ended = Vec::new();
        while !bell.is_idle() {
            ended.extend(turn(&mut bell, &mut engine, Wait::Forever));
        }
        assert_eq!(ended, [Rung::Dropped]);
    }

    #[test]
    fn other_target_is_rung_in_place_of_a_full_one() {
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (mut bell, mut engine) = bell(full);
        bell.ring(&mut engine).unwrap();
        turn(&mut bell, &mut engine, Wait::No);
        let other = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        bell.set_target(Some(Arc::new(other.try_clone().unwrap())), &mut engine).unwrap();
        assert_eq!(bell.ring(&mut engine).unwrap(), Rung::Yes);
        while !bell.is_idle() {
            turn(&mut bell, &mut engine, Wait::Forever);
        }
        let mut count = [0; 8];
        rustix::io::read(&other, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }

    #[test]
    fn pipe_whose_reader_is_gone_drops_the_ring() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (mut bell, mut engine) = bell(writer);
        bell.ring(&mut engine).unwrap();
        assert_eq!(turn(&mut bell, &mut engine, Wait::Forever), [Rung::Dropped]);
    }
}
