//! A descriptor of the front end that is written to wake somebody: a ring's call, or its error.
//!
//! Contract: ringing never waits for room and never fails the ring. The front end chooses what the
//! descriptor is (an eventfd, a pipe, a socket), whether it is blocking, and whether it still has
//! room; so the engine writes to it, one write at a time, and the kernel, not the worker, waits for
//! room. Who rings while a write is under way is heard when it ends; who rings again by then adds
//! nothing, because whoever reads a full descriptor is awake. A bell that is called off ends its
//! write at once.
//!
//! A blocking eventfd is the exception: the kernel has no way to try a write to it, and would hand
//! each to a thread of its own, at many times the cost of the request (measured: 20 times). The
//! worker looks whether there is room and writes itself. A front end that fills it in between holds
//! its own guest's disk up until it reads it again.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use super::kick::is_nameless;
use crate::engine::{Engine, Subject};

/// What became of a ring of the bell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rung {
    /// There is nobody to hear it.
    Nobody,
    /// It was written.
    Written,
    /// It is being written: [`Bell::written`] will tell.
    Underway,
    /// It was dropped: the descriptor is full, or is gone.
    Dropped,
}

/// See the module's head.
pub(super) struct Bell {
    subject: Subject,
    target: Option<Target>,
    /// What is being written to: open until the kernel is through with it.
    writing: Option<Arc<OwnedFd>>,
    /// Somebody rang while it was being written to.
    again: bool,
}

struct Target {
    fd: Arc<OwnedFd>,
    /// An eventfd whose writes block.
    blocking_eventfd: bool,
}

impl Target {
    fn new(fd: Arc<OwnedFd>) -> Self {
        let blocking = fcntl_getfl(&*fd).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
        Self { blocking_eventfd: blocking && is_nameless(&fd), fd }
    }

    /// Writes if there is room.
    fn write(&self) -> Rung {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let has_room = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready == 1);
        let written = has_room && rustix::io::write(&self.fd, &1u64.to_ne_bytes()).is_ok();
        if written { Rung::Written } else { Rung::Dropped }
    }
}

impl Bell {
    /// A bell whose writes come back from the engine as `subject`; without a target it is mute.
    pub(super) fn new(subject: Subject, target: Option<Arc<OwnedFd>>) -> Self {
        Self { subject, target: target.map(Target::new), writing: None, again: false }
    }

    /// Rings once.
    pub(super) fn ring(&mut self, engine: &mut dyn Engine) -> std::io::Result<Rung> {
        let Some(target) = &self.target else { return Ok(Rung::Nobody) };
        if target.blocking_eventfd {
            return Ok(target.write());
        }
        if self.writing.is_none() {
            engine.signal(self.subject, &target.fd)?;
            self.writing = Some(Arc::clone(&target.fd));
        } else if std::mem::replace(&mut self.again, true) {
            return Ok(Rung::Dropped);
        }
        Ok(Rung::Underway)
    }

    /// A write has ended.
    pub(super) fn written(
        &mut self,
        result: Result<u32, Errno>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<Rung> {
        self.writing = None;
        if std::mem::take(&mut self.again) {
            self.ring(engine)?;
        }
        Ok(if result.is_ok() { Rung::Written } else { Rung::Dropped })
    }

    /// Uses another target from the next ring on; a write that waits at the old one is called off.
    pub(super) fn set_target(
        &mut self,
        target: Option<Arc<OwnedFd>>,
        engine: &mut dyn Engine,
    ) -> std::io::Result<()> {
        self.target = target.map(Target::new);
        if self.is_idle() { Ok(()) } else { engine.call_off(self.subject) }
    }

    /// Falls silent: what was rung is written now or never.
    pub(super) fn silence(&mut self, engine: &mut dyn Engine) -> std::io::Result<()> {
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
    use std::time::Duration;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::pipe::{PipeFlags, pipe, pipe_with};

    use super::{Bell, Rung};
    use crate::engine::tests::engines;
    use crate::engine::{Channels, Engine, EngineKind, Event, Subject, Wait};

    const SUBJECT: Subject = Subject::Call { queue: 0 };

    /// An eventfd that does not block, as QEMU's do not.
    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    /// A pipe that holds so much that nothing more goes in, and its reader.
    fn full_pipe() -> (OwnedFd, OwnedFd) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
        fcntl_setfl(&writer, OFlags::empty()).unwrap();
        (reader, writer)
    }

    fn bell(fd: OwnedFd, kind: EngineKind) -> (Bell, Box<dyn Engine>) {
        (
            Bell::new(SUBJECT, Some(Arc::new(fd))),
            kind.open(Vec::new(), Channels::default()).unwrap(),
        )
    }

    /// Longer than any write takes: a test that waits that long has failed.
    const PATIENCE: Wait = Wait::AtMost(Duration::from_secs(10));

    /// Turns until nothing is being written; what became of the writes.
    fn turn_until_idle(bell: &mut Bell, engine: &mut dyn Engine) -> Vec<Rung> {
        let mut ended = Vec::new();
        while !bell.is_idle() {
            let before = ended.len();
            ended.extend(turn(bell, engine, PATIENCE));
            // A cancellation has an event of its own, which may come first.
            if ended.len() == before {
                ended.extend(turn(bell, engine, PATIENCE));
            }
            assert!(ended.len() > before, "the write does not end");
        }
        ended
    }

    /// Turns once; what became of the writes that ended.
    fn turn(bell: &mut Bell, engine: &mut dyn Engine, wait: Wait) -> Vec<Rung> {
        let mut events: Vec<Event> = Vec::new();
        engine.turn(wait, &mut events).unwrap();
        let written = events.iter().filter(|event| event.subject == SUBJECT);
        written.map(|event| bell.written(event.outcome(), engine).unwrap()).collect()
    }

    #[test]
    fn bell_is_heard_at_an_eventfd() {
        for kind in engines() {
            let fd = event();
            let (mut bell, mut engine) = bell(fd.try_clone().unwrap(), kind);
            for _ in 0..3 {
                assert_eq!(bell.ring(&mut *engine).unwrap(), Rung::Underway);
                assert_eq!(turn_until_idle(&mut bell, &mut *engine), [Rung::Written]);
            }
            assert_eq!(count(&fd), 3);
        }
    }

    #[test]
    fn blocking_eventfd_is_written_at_once_or_dropped() {
        for kind in engines() {
            let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let (mut bell, mut engine) = bell(fd.try_clone().unwrap(), kind);
            assert_eq!(bell.ring(&mut *engine).unwrap(), Rung::Written);
            assert_eq!(count(&fd), 1);
            rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            assert_eq!(bell.ring(&mut *engine).unwrap(), Rung::Dropped);
            assert!(bell.is_idle());
        }
    }

    #[test]
    fn full_blocking_pipe_holds_nobody_up_and_is_rung_when_it_has_room() {
        for kind in engines() {
            let (reader, writer) = full_pipe();
            let (mut bell, mut engine) = bell(writer, kind);
            let mut rung = Vec::new();
            for _ in 0..3 {
                rung.push(bell.ring(&mut *engine).unwrap());
                assert_eq!(turn(&mut bell, &mut *engine, Wait::No), []);
            }
            assert_eq!(rung, [Rung::Underway, Rung::Underway, Rung::Dropped]);
            while rustix::io::read(&reader, &mut [0; 4096]).is_ok() {}
            let ended = turn_until_idle(&mut bell, &mut *engine);
            assert_eq!(ended, [Rung::Written, Rung::Written]);
        }
    }

    #[test]
    fn silenced_bell_ends_its_write() {
        for kind in engines() {
            let (_reader, writer) = full_pipe();
            let (mut bell, mut engine) = bell(writer, kind);
            bell.ring(&mut *engine).unwrap();
            bell.ring(&mut *engine).unwrap();
            turn(&mut bell, &mut *engine, Wait::No);
            bell.silence(&mut *engine).unwrap();
            assert_eq!(turn_until_idle(&mut bell, &mut *engine), [Rung::Dropped]);
        }
    }

    #[test]
    fn other_target_is_rung_in_place_of_a_full_one() {
        for kind in engines() {
            let (_reader, writer) = full_pipe();
            let (mut bell, mut engine) = bell(writer, kind);
            bell.ring(&mut *engine).unwrap();
            turn(&mut bell, &mut *engine, Wait::No);
            let other = event();
            bell.set_target(Some(Arc::new(other.try_clone().unwrap())), &mut *engine).unwrap();
            assert_eq!(bell.ring(&mut *engine).unwrap(), Rung::Underway);
            turn_until_idle(&mut bell, &mut *engine);
            assert_eq!(count(&other), 1);
        }
    }

    fn count(fd: &OwnedFd) -> u64 {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec::default())).unwrap() == 0 {
            return 0;
        }
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn pipe_whose_reader_is_gone_drops_the_ring() {
        for kind in engines() {
            let (reader, writer) = pipe().unwrap();
            drop(reader);
            let (mut bell, mut engine) = bell(writer, kind);
            bell.ring(&mut *engine).unwrap();
            assert_eq!(turn_until_idle(&mut bell, &mut *engine), [Rung::Dropped]);
        }
    }
}
