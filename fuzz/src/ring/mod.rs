//! A virtqueue whose driver writes whatever it likes, whenever it likes, while the device pops, uses, retracts and gets
//! other memory. Each step is done by the ring and by a [`Model`] of it; what they say, and at the end all of the guest's
//! memory, must be the same.
//!
//! Input: the ring's shape (see [`shape`]), then steps: a byte that says which, and what it takes (see [`Bench::step`]).

mod guest;
mod model;

use std::sync::Arc;

use common::memory::FrontendAddress;
use common::virtqueue::by_hand::Ring;
use common::virtqueue::{
    Buffers, Chain, RingAddresses, RingSetup, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC,
};

use self::guest::{FILE_BYTES, Guest, Span, Table};
use self::model::{Model, Shape};
use crate::script::Script;

/// Steps of one input. A step costs at most a chain's length, so that no input takes long.
const STEPS_MAX: usize = 256;
/// Where a ring's areas are, unless the input says otherwise: front-end addresses, and offsets in the file.
const DESCRIPTORS: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const AVAILABLE_OFFSET: usize = 0x1000;
/// Bytes that the device moves in a step.
const MOVED_BYTES_MAX: usize = 16;

/// Turns one ring.
pub fn run(data: &[u8]) {
    Guest::with(|guest| {
        let mut script = Script::new(data);
        let table = guest.table(0);
        let (shape, base) = shape(&mut script);
        if shape.touches_large(table) {
            return;
        }
        // What a ring finds in its memory when it starts.
        let len = script.below(16);
        guest.write(usize::from(script.u16()) % FILE_BYTES, script.bytes(len));
        let model = Model::new(guest, shape, base, table);
        let ring = Ring::new(setup(shape, base, table));
        assert_eq!(ring.is_ok(), model.is_ok(), "{shape:x?}: {:?}", ring.err());
        if let (Ok(ring), Ok(model)) = (ring, model) {
            let bench = Bench { guest, ring, model, chains: Vec::new(), script, size: shape.size };
            bench.run();
        }
    });
}

/// The ring that a script begins with: flags, the base, the size, then the addresses that differ from the usual.
fn shape(script: &mut Script<'_>) -> (Shape, u16) {
    let flags = script.u8();
    let base = script.u16();
    let size = match script.u8() {
        exponent @ 0..16 => 1 << exponent,
        _ => script.u16(),
    };
    let mut address = |bit: u8, usual| match flags >> bit & 1 {
        0 => usual,
        _ => match script.u8() {
            0xff => script.u64(),
            // Somewhere near: over another area, off the alignment, across the region's end.
            _ => DESCRIPTORS + u64::from(script.u16() & 0x7fff),
        },
    };
    let (descriptor, available, used) =
        (address(0, DESCRIPTORS), address(1, AVAILABLE), address(2, USED));
    let (indirect, event_idx) = (flags >> 3 & 1 == 1, flags >> 4 & 1 == 1);
    (Shape { descriptor, available, used, size, indirect, event_idx }, base)
}

fn setup(shape: Shape, base: u16, table: &Table) -> RingSetup {
    let indirect = if shape.indirect { VIRTIO_F_INDIRECT_DESC } else { 0 };
    let event_idx = if shape.event_idx { VIRTIO_F_EVENT_IDX } else { 0 };
    RingSetup {
        addresses: RingAddresses {
            descriptor: FrontendAddress(shape.descriptor),
            available: FrontendAddress(shape.available),
            used: FrontendAddress(shape.used),
        },
        size: shape.size,
        base,
        features: indirect | event_idx,
        memory: Arc::clone(&table.map),
        record: None,
    }
}

/// A ring and its model, side by side.
struct Bench<'a> {
    guest: &'a Guest,
    ring: Ring,
    model: Model<'a>,
    /// The chains that are out, in the order of `model.out`.
    chains: Vec<Chain>,
    script: Script<'a>,
    size: u16,
}

impl Bench<'_> {
    fn run(mut self) {
        for _ in 0..STEPS_MAX {
            if self.script.is_empty() {
                break;
            }
            self.step();
            self.compare();
        }
        // As a ring that stops: what is out ends, newest first.
        while let Some(place) = self.chains.len().checked_sub(1) {
            self.end(place, 0);
            self.compare();
        }
        self.publish();
        self.guest.check();
    }

    fn step(&mut self) {
        match self.script.below(16) {
            0 => self.store(),
            1 | 2 => self.describe(),
            3 | 4 => self.offer(),
            5 | 6 => drop(self.pop()),
            7 => self.pop_all(),
            8 | 9 if !self.chains.is_empty() => {
                let place = self.script.below(self.chains.len().min(256));
                let written_bytes = self.script.u32();
                self.end(place, written_bytes);
            }
            10 => self.retract(),
            11 => self.publish(),
            12 => {
                self.ring.suppress_kicks();
                self.model.suppress_kicks();
            }
            13 => {
                let (ring, model) = (self.ring.request_kick(), self.model.request_kick());
                assert_eq!(ring.as_ref().ok(), model.as_ref().ok(), "{ring:?}");
                self.break_off_if(ring.is_err());
            }
            14 => self.set_memory(),
            15 => self.move_bytes(),
            _ => {}
        }
    }

    /// The driver writes any bytes anywhere.
    fn store(&mut self) {
        let offset = usize::from(self.script.u16()) % FILE_BYTES;
        let len = self.script.below(32);
        let bytes = self.script.bytes(len);
        self.guest.write(offset, bytes);
    }

    /// The driver writes a descriptor, in the ring's table or in an indirect one.
    fn describe(&mut self) {
        let place = self.script.u8();
        let index = usize::from(place & 0x3f);
        let table = [0, 0, 0x2800, 0x5008][usize::from(place >> 6)];
        let near = u64::from(self.script.u16());
        let address = match self.script.below(8) {
            0..4 => near & 0x7fff,
            4 => 0x2800,
            5 => 0x10_0000 + (near & 0x1fff),
            6 => 0x1_0000_0000,
            _ => u64::MAX - near,
        };
        let len_bytes = match self.script.u8() {
            0xff => self.script.u32(),
            0xfe => 0x8000_0000,
            // Indirect tables of a few descriptors.
            byte @ 0xf0.. => 16 * u32::from(byte - 0xef),
            byte => u32::from(byte),
        };
        let flags = u16::from(self.script.u8() & 7);
        let next = u16::from(self.script.u8());
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len_bytes.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.guest.write(table + 16 * index, &bytes);
    }

    /// The driver makes a head available, where a ring usually lies.
    fn offer(&mut self) {
        let head = u16::from(self.script.u8());
        let index = self.guest.load_u16(AVAILABLE_OFFSET + 2);
        let entry = AVAILABLE_OFFSET + 4 + 2 * usize::from(index % self.size);
        if entry + 2 <= FILE_BYTES {
            self.guest.write(entry, &head.to_le_bytes());
        }
        self.guest.write(AVAILABLE_OFFSET + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Pops one chain and compares its buffers; whether there was one.
    fn pop(&mut self) -> bool {
        let (popped, due) = (self.ring.pop(), self.model.pop());
        match (popped, due) {
            (Ok(Some(chain)), Ok(Some(due))) => {
                assert_eq!(chain.slot(), due.head);
                self.chains.push(chain);
                self.compare_buffers(self.chains.len() - 1);
                true
            }
            (Ok(None), Ok(None)) => false,
            (Err(_), Err(_)) => {
                self.break_off_if(true);
                false
            }
            (popped, due) => {
                let popped = popped.map(|chain| chain.map(std::mem::forget));
                unreachable!("{due:x?} is due, {popped:x?} came")
            }
        }
    }

    /// Pops until there is nothing more: at most as often as the ring has entries.
    fn pop_all(&mut self) {
        let mut count = 0;
        while self.pop() {
            count += 1;
            assert!(count <= self.size, "a ring of {} gave {count} chains", self.size);
        }
    }

    fn compare_buffers(&self, place: usize) {
        let (chain, due) = (&self.chains[place], &self.model.out[place]);
        let spans = |buffers: Buffers<'_>| -> Vec<Option<Span>> {
            buffers.iter().map(|buffer| due.table.span(buffer)).collect()
        };
        let (readable, writable) = (self.ring.readable(chain), self.ring.writable(chain));
        assert!(spans(readable).into_iter().eq(due.readable.iter().copied().map(Some)));
        assert!(spans(writable).into_iter().eq(due.writable.iter().copied().map(Some)));
    }

    fn break_off_if(&mut self, wrong: bool) {
        if wrong {
            // As the runtime does after every error.
            self.ring.break_off();
            self.model.broken = true;
        }
    }

    fn end(&mut self, place: usize, written_bytes: u32) {
        let chain = self.chains.remove(place);
        self.ring.used(chain, written_bytes);
        self.model.used(place, written_bytes);
    }

    /// Puts the newest chain back, which must be the last that was popped.
    fn retract(&mut self) {
        let Some(place) = self.model.newest() else { return };
        let chain = self.chains.remove(place);
        self.ring.retract(chain);
        self.model.retract(place);
    }

    fn publish(&mut self) {
        assert_eq!(self.ring.publish(), self.model.publish(), "whether to call the driver");
    }

    fn set_memory(&mut self) {
        let table = self.guest.table(self.script.below(8));
        let done = self.ring.set_memory(Arc::clone(&table.map));
        let due = self.model.set_memory(table);
        assert_eq!(done.is_ok(), due.is_ok(), "{done:?}");
        self.break_off_if(done.is_err());
    }

    /// The device reads or writes a few bytes of a chain.
    fn move_bytes(&mut self) {
        if self.chains.is_empty() {
            return;
        }
        let place = self.script.below(self.chains.len().min(256));
        let (offset, len) =
            (usize::from(self.script.u16()), self.script.below(MOVED_BYTES_MAX + 1));
        let write = self.script.bool();
        let (chain, due) = (&self.chains[place], &self.model.out[place]);
        let spans = if write { &due.writable } else { &due.readable };
        let places: Vec<usize> = (offset..offset + len).map_while(|at| byte(spans, at)).collect();
        // Nothing may be written behind the part that is compared.
        if places.iter().any(|at| *at >= FILE_BYTES) {
            return;
        }
        if write {
            let bytes: Vec<u8> = (1..).take(len).collect();
            let done = self.ring.writable(chain).slice(offset, len).write(&bytes);
            places.iter().zip(&bytes).for_each(|(at, byte)| self.guest.expect(*at, &[*byte]));
            assert_eq!(done, places.len());
        } else {
            let mut bytes = vec![0; len];
            let done = self.ring.readable(chain).slice(offset, len).read(&mut bytes);
            let due: Vec<u8> = places.iter().map(|at| self.guest.load::<1>(*at)[0]).collect();
            assert_eq!(&bytes[..done], due);
        }
    }

    fn compare(&self) {
        let queue = self.ring.queue();
        assert_eq!(queue.size(), self.size);
        assert_eq!(queue.next_available(), self.model.next_available);
        assert_eq!(queue.chains_out() as usize, self.model.out.len());
        assert_eq!(queue.is_broken(), self.model.broken);
        assert_eq!(self.ring.has_available(), self.model.has_available());
        assert_eq!(self.ring.is_settled(), self.model.is_settled());
    }
}

/// Where in the file the byte at `offset` of a list of spans is.
fn byte(spans: &[Span], mut offset: usize) -> Option<usize> {
    for span in spans {
        if offset < span.len_bytes {
            return Some(span.offset + offset);
        }
        offset -= span.len_bytes;
    }
    None
}
