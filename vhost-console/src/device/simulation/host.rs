//! The host's end of a port: who reads what the guest puts out, who types, and what both must see.
//!
//! Contract: each reader sees what the guest wrote from where he began, byte by byte; what he is too late for he is told the
//! size of, exactly, and a keeper is never too late. What is typed arrives whole and in order.

use common::simulation::Random;

use crate::port::Port;
use crate::transcript::{Cursor, KeeperId};

/// The most readers of a port.
const READERS_MAX: usize = 3;

/// A reader.
struct Reader {
    cursor: Cursor,
    keeper: Option<KeeperId>,
    /// Where he is, in what the guest has written.
    at: usize,
    is_stalled: bool,
}

/// See the module's head.
#[derive(Default)]
pub(super) struct Host {
    readers: Vec<Reader>,
    /// What the guest has written to this port, as far as it was not thrown away.
    pub(super) written: Vec<u8>,
    /// What was typed and has not arrived.
    typed: Vec<u8>,
    /// What of it the port has taken: the first bytes.
    pushed: usize,
    pub(super) lost_bytes: u64,
    pub(super) kept_bytes: u64,
    pub(super) arrived_bytes: u64,
}

impl Host {
    /// A reader comes.
    pub(super) fn come(&mut self, port: &Port, replay_bytes: u64, random: &mut Random) {
        if self.readers.len() >= READERS_MAX {
            return;
        }
        let transcript = port.transcript();
        let len_bytes = transcript.len_bytes();
        let (cursor, back) = match random.once_in(2) {
            true => (transcript.replay(), len_bytes.min(replay_bytes)),
            false => (transcript.now(), 0),
        };
        let keeper = random.once_in(2).then(|| transcript.add_keeper(cursor));
        let at = (len_bytes - back) as usize;
        self.readers.push(Reader { cursor, keeper, at, is_stalled: random.once_in(3) });
    }

    /// One goes, if there is one.
    pub(super) fn go(&mut self, port: &Port, random: &mut Random) {
        if self.readers.is_empty() {
            return;
        }
        let reader = self.readers.swap_remove(random.index(self.readers.len()));
        if let Some(id) = reader.keeper {
            port.transcript().remove_keeper(id);
            port.made_room();
        }
    }

    /// All go: the port is taken out.
    pub(super) fn end(&mut self, port: &Port, random: &mut Random) {
        while !self.readers.is_empty() {
            self.go(port, random);
        }
        (self.written, self.typed, self.pushed) = (Vec::new(), Vec::new(), 0);
    }

    /// One stops reading, or goes on.
    pub(super) fn stall(&mut self, random: &mut Random) {
        if !self.readers.is_empty() {
            let place = random.index(self.readers.len());
            self.readers[place].is_stalled ^= true;
        }
    }

    pub(super) fn go_on(&mut self) {
        self.readers.iter_mut().for_each(|reader| reader.is_stalled = false);
    }

    /// Somebody types.
    pub(super) fn type_bytes(&mut self, random: &mut Random) {
        let count = random.pick(&[1, 1, 10, 5000, 100_000]);
        self.typed.extend((0..count).map(|_| random.number() as u8));
    }

    /// All do what there is to do.
    pub(super) fn look(&mut self, port: &Port, random: &mut Random) {
        self.read(port, random);
        self.push(port);
    }

    fn push(&mut self, port: &Port) {
        while self.pushed < self.typed.len() {
            let count = port.push(&self.typed[self.pushed..]);
            if count == 0 {
                return;
            }
            self.pushed += count;
        }
    }

    fn read(&mut self, port: &Port, random: &mut Random) {
        let mut scratch = vec![0; random.pick(&[7, 4096, 200_000])];
        for reader in self.readers.iter_mut().filter(|reader| !reader.is_stalled) {
            loop {
                let read = port.transcript().read(&mut reader.cursor, &mut scratch);
                assert!(reader.keeper.is_none() || read.lost_bytes == 0, "a keeper has lost bytes");
                self.lost_bytes += read.lost_bytes;
                reader.at += read.lost_bytes as usize;
                let expected = &self.written[reader.at..reader.at + read.count];
                assert!(scratch[..read.count] == *expected, "a reader sees something else");
                reader.at += read.count;
                if read.count == 0 {
                    break;
                }
                if let Some(id) = reader.keeper {
                    self.kept_bytes += read.count as u64;
                    port.transcript().keep(id, reader.cursor);
                    port.made_room();
                }
            }
        }
    }

    /// Something has arrived in the guest.
    pub(super) fn arrive(&mut self, bytes: &[u8]) {
        assert!(self.typed.starts_with(bytes), "the guest gets something else");
        assert!(bytes.len() <= self.pushed, "the guest gets what was not yet given");
        self.typed.drain(..bytes.len());
        self.pushed -= bytes.len();
        self.arrived_bytes += bytes.len() as u64;
    }

    /// What was typed for another guest is gone.
    pub(super) fn clear_typed(&mut self) {
        self.typed.drain(..self.pushed);
        self.pushed = 0;
    }

    /// Nobody has anything to do: all is read and given.
    pub(super) fn must_rest(&self, port: &Port) {
        let len_bytes = port.transcript().len_bytes() as usize;
        for reader in self.readers.iter().filter(|reader| !reader.is_stalled) {
            assert_eq!(reader.at, len_bytes, "a reader sleeps over bytes");
        }
        let is_given = self.pushed == self.typed.len() || port.inbox().room() == 0;
        assert!(is_given, "who types sleeps though there is room");
    }

    /// All that was typed has arrived, and all that was written was taken.
    pub(super) fn must_be_done(&self, port: &Port) {
        assert_eq!(self.written.len() as u64, port.transcript().len_bytes(), "all is taken");
        assert!(self.typed.is_empty(), "{} bytes have not arrived", self.typed.len());
    }

    /// The guest's driver starts anew: of what it had written only this is there.
    pub(super) fn cut(&mut self, port: &Port) {
        self.written.truncate(port.transcript().len_bytes() as usize);
    }

    /// A byte of the emergency register.
    pub(super) fn emergency(&mut self, byte: u8) {
        self.written.push(byte);
    }
}

/// Whether an event file has been rung; not any more then.
pub(super) fn take_ringing(bell: &crate::doorbell::Doorbell) -> bool {
    rustix::io::read(bell, &mut [0; 8]).is_ok()
}
