//! MSI-X: the table that says what each vector sends, the pending bits, and who may send.
//!
//! Contract: a vector is routed to its message exactly while MSI-X is enabled, the function is not masked and the
//! vector is not. What is raised meanwhile stays pending ([`Vector`]), which the pending bit array shows, and is sent
//! when the mask goes. Any access of any width at any offset is answered.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use tracing::warn;

use crate::interrupts::{Call, Message, Vector};

/// Bytes of a table entry: message address (8), data (4), vector control (4).
pub(crate) const ENTRY_BYTES: usize = 16;
/// PCI 3.0, 6.8.2.3: the size of the table has eleven bits, less one.
pub(crate) const VECTORS_MAX: usize = 2048;

/// Message control: MSI-X is on. In the register's second byte.
pub(crate) const CONTROL_ENABLE: u8 = 1 << 7;
/// Message control: all vectors are masked. In the register's second byte.
pub(crate) const CONTROL_FUNCTION_MASK: u8 = 1 << 6;

/// What of an entry may be written: an aligned address, the data, and the mask bit.
const WRITABLE: [u8; ENTRY_BYTES] =
    [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
/// An entry after a reset: masked.
const RESET: [u8; ENTRY_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];

struct Entry {
    bytes: [u8; ENTRY_BYTES],
    vector: Vector,
}

impl Entry {
    /// What the vector sends, if it is not masked.
    fn message(&self) -> Option<Message> {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = self.bytes;
        (control & 1 == 0).then_some(Message {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    fn route(&self, may_send: bool) {
        let message = self.message().filter(|_| may_send);
        if let Err(error) = self.vector.route(message) {
            warn!(?message, %error, "an interrupt vector cannot be routed");
        }
    }
}

/// The MSI-X state of a function.
pub(crate) struct Msix {
    entries: Vec<Entry>,
    /// MSI-X is enabled and the function is not masked.
    may_send: bool,
}

impl Msix {
    pub(crate) fn new(vectors: Vec<Vector>) -> Self {
        let entries = vectors.into_iter().map(|vector| Entry { bytes: RESET, vector }).collect();
        Self { entries, may_send: false }
    }

    /// The table size field of the capability.
    pub(crate) fn table_size(&self) -> u16 {
        u16::try_from(self.entries.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// What to write to in order to raise a vector; `None`: there is no such vector.
    pub(crate) fn call(&self, vector: u16) -> Option<&Call> {
        Some(self.entries.get(usize::from(vector))?.vector.call())
    }

    /// The driver has written the second byte of the message control register.
    pub(crate) fn set_control(&mut self, control: u8) {
        let may_send = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        if may_send != self.may_send {
            self.may_send = may_send;
            self.entries.iter().for_each(|entry| entry.route(may_send));
        }
    }

    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let entries = self.entries.iter().skip(at / ENTRY_BYTES);
        let bytes = entries.flat_map(|entry| entry.bytes).skip(at % ENTRY_BYTES);
        for (into, from) in data.iter_mut().zip(bytes) {
            *into = from;
        }
    }

    pub(crate) fn write_table(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let may_send = self.may_send;
        let mut left = data.iter();
        let mut skip = at % ENTRY_BYTES;
        for entry in self.entries.iter_mut().skip(at / ENTRY_BYTES) {
            if left.as_slice().is_empty() {
                return;
            }
            let bytes = entry.bytes.iter_mut().zip(WRITABLE).skip(skip);
            // The entry's bytes come first: `zip` takes from its first iterator before it sees that the second is out.
            for ((byte, writable), new) in bytes.zip(left.by_ref()) {
                *byte = *byte & !writable | new & writable;
            }
            skip = 0;
            entry.route(may_send);
        }
    }

    /// The pending bits: one for each vector, the first lowest.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (into, entries) in data.iter_mut().zip(self.entries.chunks(8).skip(at)) {
            for (bit, entry) in entries.iter().enumerate() {
                *into |= u8::from(entry.vector.is_pending()) << bit;
            }
        }
    }

    /// All is masked, and nothing is pending.
    pub(crate) fn reset(&mut self) {
        self.may_send = false;
        for entry in &mut self.entries {
            entry.bytes = RESET;
            entry.route(false);
            entry.vector.clear();
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::sync::Arc;

    use super::{CONTROL_ENABLE, CONTROL_FUNCTION_MASK, Msix};
    use crate::interrupts::fake::FakeVm;
    use crate::interrupts::{Interrupts, Message, Vm};

    const FIRST: u32 = 24;

    fn msix(count: usize) -> (Arc<FakeVm>, Msix) {
        let vm = Arc::new(FakeVm::default());
        let interrupts = Interrupts::new(Arc::clone(&vm) as Arc<dyn Vm>);
        let vectors = (0..count).map(|_| interrupts.vector().expect("a vector")).collect();
        (vm, Msix::new(vectors))
    }

    fn attached(vm: &FakeVm) -> Vec<u32> {
        vm.state.lock().expect("whole").calls.keys().copied().collect()
    }

    /// As Linux does it: the message while the vector is masked, then the mask away.
    fn program(msix: &mut Msix, vector: u64, address: u64, data: u32) {
        msix.write_table(vector * 16, &address.to_le_bytes()[..4]);
        msix.write_table(vector * 16 + 4, &address.to_le_bytes()[4..]);
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &[0; 4]);
    }

    #[test]
    fn vectors_are_masked_after_reset_and_routed_when_nothing_masks_them() {
        let (vm, mut msix) = msix(3);
        let mut control = [0; 4];
        msix.read_table(2 * 16 + 12, &mut control);
        assert_eq!(control, [1, 0, 0, 0]);
        program(&mut msix, 1, 0xfee0_0000, 0x31);
        assert_eq!(attached(&vm), [0u32; 0], "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert_eq!(attached(&vm), [0u32; 0], "the function is masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(attached(&vm), [FIRST + 1]);
        let message = Message { address: 0xfee0_0000, data: 0x31 };
        assert_eq!(vm.state.lock().expect("whole").messages[&(FIRST + 1)], message);
        msix.write_table(16 + 12, &[1]);
        assert_eq!(attached(&vm), [0u32; 0]);
        msix.reset();
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(attached(&vm), [0u32; 0]);
    }

    #[test]
    fn pending_bits_show_what_was_raised_while_masked() {
        let (vm, mut msix) = msix(10);
        msix.set_control(CONTROL_ENABLE);
        for vector in [0, 9] {
            msix.call(vector).expect("there").raise();
        }
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 2, 0, 0, 0, 0, 0, 0]);
        let mut second = [0; 1];
        msix.read_pending(1, &mut second);
        assert_eq!(second, [2]);
        program(&mut msix, 9, 0xfee0_0000, 1);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(attached(&vm), [FIRST + 9]);
        msix.reset();
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn message_follows_the_table_while_it_is_routed() {
        let (vm, mut msix) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, 0x0100_0000_fee0_1003, 5);
        let message = || vm.state.lock().expect("whole").messages[&FIRST];
        let address = 0x0100_0000_fee0_1000;
        assert_eq!(message(), Message { address, data: 5 }, "the address is aligned");
        msix.write_table(8, &6u32.to_le_bytes());
        assert_eq!(message(), Message { address, data: 6 });
    }

    #[test]
    fn accesses_across_entries_and_beyond_the_table_are_answered() {
        let (_vm, mut msix) = msix(2);
        msix.write_table(12, &[0, 0xff, 0xff, 0xff, 0xff, 0x11, 0x22, 0x33]);
        let mut bytes = [0; 8];
        msix.read_table(12, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 0, 0xfc, 0x11, 0x22, 0x33]);
        for offset in [0, 15, 31, 32, 4095, u64::MAX] {
            for len in 0..=33 {
                let mut bytes = vec![0x55; len];
                msix.write_table(offset, &bytes);
                msix.read_table(offset, &mut bytes);
                msix.read_pending(offset, &mut bytes);
            }
        }
        assert!(msix.call(2).is_none());
        assert!(msix.call(0xffff).is_none());
    }
}
