//! A session's state machine: any message after any other, and a daemon that does what the session asks for, or fails
//! to. After each step the session is compared with a [`Model`] of the vhost-user text's "Ring states", and so are the
//! descriptors that it keeps open.
//!
//! Input: steps. Each begins with the number of a request (modulo 45); what follows depends on its payload
//! ([`message`]), and then on what the daemon has to choose.

mod message;
mod model;

use common::protocol::Request;
use common::session::{Action, MAX_CONFIG_BYTES, MemorySlot, Offer, Session};

use self::message::{Said, compose};
use self::model::Model;
use crate::script::Script;

const RINGS: u16 = 3;
const OFFER: Offer = Offer {
    features: 1 << 9 | 1 << 12,
    queue_count: RINGS,
    max_queue_size: 256,
    is_network: false,
};

/// Steps of one input: what a longer one would reach, this many do.
const STEPS_MAX: usize = 64;

/// Runs one session.
pub fn run(data: &[u8]) {
    let mut session = Session::new(OFFER);
    let model = Model::new(&mut session);
    let mut daemon = Daemon { session, model, script: Script::new(data), running: [false; 3] };
    for _ in 0..STEPS_MAX {
        if daemon.script.is_empty() {
            break;
        }
        daemon.step();
        daemon.model.check(&daemon.session);
    }
    let Daemon { session, model, .. } = daemon;
    model.end(session);
}

/// What stands between a session and its rings, and chooses by the script.
struct Daemon<'a> {
    session: Session,
    model: Model,
    script: Script<'a>,
    /// The rings that are on a worker.
    running: [bool; RINGS as usize],
}

impl Daemon<'_> {
    /// One message, and what becomes of it.
    fn step(&mut self) {
        let Ok(request) = Request::try_from(u32::from(self.script.u8()) % 45) else { return };
        let (message, said) = compose(&mut self.script, request, self.model.files());
        let Ok(action) = self.session.handle(message) else { return };
        self.model.accept(&said);
        match action {
            Action::Done
            | Action::Answer(_)
            | Action::BackendChannel(_)
            | Action::Announce(_)
            | Action::SetMtu(_) => {}
            Action::Ring(index) => self.settle(index),
            Action::Rings | Action::Reset => (0..RINGS).for_each(|index| self.settle(index)),
            Action::RingBase(index) => {
                self.settle(index);
                assert!(!self.running[usize::from(index)], "the base of a ring that runs");
            }
            Action::Call(index) | Action::Error(index) => assert!(index < RINGS),
            Action::Memory(slots) => self.replace_memory(slots, &said),
            Action::CreateInflight(shape) => {
                assert!((1..=RINGS).contains(&shape.queue_count) && shape.queue_size > 0);
            }
            Action::Inflight(_) => {
                assert!(!self.running.contains(&true), "another record for a ring that runs");
            }
            Action::ReadConfig { offset, len_bytes } => {
                assert!(u64::from(offset) + u64::from(len_bytes) <= u64::from(MAX_CONFIG_BYTES));
            }
            Action::WriteConfig { offset, data } => {
                assert!(u64::from(offset) + data.len() as u64 <= u64::from(MAX_CONFIG_BYTES));
            }
        }
    }

    /// Brings a ring to where the session says that it should be, as far as the host lets it.
    fn settle(&mut self, index: u16) {
        let wanted = self.session.ring(index).is_some() && !self.session.ring_is_outdated(index);
        if self.running[usize::from(index)] && !wanted {
            self.stop(index);
        }
        if self.running[usize::from(index)] || self.session.ring(index).is_none() {
            return;
        }
        match self.script.below(4) {
            // Its memory is not there yet.
            2 => {}
            3 => {
                self.session.kick_refused(index);
                self.model.kick_refused(index);
            }
            _ => {
                self.session.ring_started(index);
                self.model.started(index);
                self.running[usize::from(index)] = true;
            }
        }
    }

    fn stop(&mut self, index: u16) {
        let base = self.script.u16();
        self.session.ring_stopped(index, base);
        self.model.stopped(index, base);
        self.running[usize::from(index)] = false;
    }

    fn replace_memory(&mut self, slots: Vec<MemorySlot>, said: &Said) {
        let expected = self.model.memory_after(said);
        let specs = slots.iter().map(|slot| slot.spec);
        assert!(specs.eq(expected.iter().map(|mapped| mapped.spec)), "{slots:x?} after {said:x?}");
        let choice = self.script.u8();
        // It may not be possible to map it.
        if choice & 0x80 != 0 {
            return;
        }
        // A ring whose own memory goes is stopped first.
        for index in 0..RINGS {
            if self.running[usize::from(index)] && choice >> index & 1 == 1 {
                self.stop(index);
            }
        }
        self.session.commit_memory(slots);
        self.model.commit_memory(expected);
        (0..RINGS).for_each(|index| self.settle(index));
    }
}
