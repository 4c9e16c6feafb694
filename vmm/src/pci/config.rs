//! The configuration space of one PCI function: 256 bytes, of which the guest may write some bits.
//!
//! Contract: any access of any width at any offset is answered; bits that are not writable stay as they are, so the size
//! of a BAR is read back after all ones were written to it; beyond the 256 bytes there is nothing (zeros: no extended
//! capability). Deliberately absent: I/O and 64-bit BARs, expansion ROMs, INTx, PCI Express capabilities.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

/// Bytes of a conventional configuration space.
const SPACE_BYTES: usize = 256;
/// Where the capabilities may begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;
/// Capabilities begin at multiples of this.
const CAPABILITY_ALIGN: usize = 4;

const COMMAND: usize = 0x04;
/// The function answers to its memory BARs.
const COMMAND_MEMORY: u8 = 1 << 1;
/// The function may read and write memory by itself.
const COMMAND_DMA: u8 = 1 << 2;
/// In the command register's second byte.
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE: usize = 0x0c;
const BAR: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

/// What a function says that it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
}

/// The configuration space of a function.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    bytes: [u8; SPACE_BYTES],
    /// Ones where the guest may write.
    writable: [u8; SPACE_BYTES],
    /// Where the pointer to the next capability is put.
    last_pointer: usize,
    /// Where the next capability is put.
    free: usize,
}

impl ConfigSpace {
    /// A function without a BAR and without capabilities.
    pub(crate) fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SPACE_BYTES],
            writable: [0; SPACE_BYTES],
            last_pointer: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        let [class, subclass, interface] = identity.class;
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_DMA, COMMAND_INTX_DISABLE]);
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function BAR 0: 32 bits of memory that is not prefetchable. `len_bytes` is a power of two, from 16.
    pub(crate) fn set_bar(&mut self, address: u32, len_bytes: u32) {
        debug_assert!(
            len_bytes.is_power_of_two() && len_bytes >= 16 && address.is_multiple_of(len_bytes)
        );
        self.put(BAR, &address.to_le_bytes());
        self.allow(BAR, &(!len_bytes.saturating_sub(1)).to_le_bytes());
    }

    /// Where BAR 0 answers, if the guest has switched memory on.
    pub(crate) fn bar(&self) -> Option<u64> {
        let mut address = [0; 4];
        self.read(BAR as u64, &mut address);
        let mut command = [0];
        self.read(COMMAND as u64, &mut command);
        (command[0] & COMMAND_MEMORY != 0).then_some(u64::from(u32::from_le_bytes(address)))
    }

    /// Adds a capability and returns its offset: its number, its bytes behind the pointer to the next one, and which
    /// bits of these the guest may write (none behind the end of `writable`).
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u64 {
        let at = self.free;
        let body_at = at.saturating_add(2);
        let end = body_at.saturating_add(body.len());
        assert!(end <= SPACE_BYTES, "the capabilities fit the configuration space");
        self.put(self.last_pointer, &[at.to_le_bytes()[0]]);
        self.put(at, &[id, 0]);
        self.put(body_at, body);
        self.allow(body_at, writable);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_pointer = at.saturating_add(1);
        self.free = end.next_multiple_of(CAPABILITY_ALIGN);
        at as u64
    }

    /// Answers a read; beyond the space there are zeros.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (into, from) in data.iter_mut().zip(self.bytes.iter().skip(at)) {
            *into = *from;
        }
    }

    /// Carries out what is permitted of a write.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in bytes.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// The device's own write, which knows no masks.
    pub(crate) fn put(&mut self, at: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(at).zip(data) {
            *byte = *new;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (writable, bits) in self.writable.iter_mut().skip(at).zip(mask) {
            *writable = *bits;
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::{ConfigSpace, Identity};

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: [1, 0, 0],
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&IDENTITY);
        space.set_bar(0xd001_0000, 0x1_0000);
        space
    }

    fn dword(space: &ConfigSpace, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn header_is_laid_out_as_pci_says() {
        let space = space();
        assert_eq!(dword(&space, 0), 0x1042_1af4);
        assert_eq!(dword(&space, 8), 0x0100_0001);
        assert_eq!(dword(&space, 0x2c), 0x1100_1af4);
        assert_eq!(dword(&space, 0x10), 0xd001_0000);
        assert_eq!(dword(&space, 0x14), 0, "no second BAR");
    }

    #[test]
    fn bar_tells_its_size_moves_and_answers_only_when_memory_is_on() {
        let mut space = space();
        assert_eq!(space.bar(), None);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), 0xffff_0000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x14), 0, "a BAR that is not there is zero");
        space.write(0x30, &[0xff; 4]);
        assert_eq!(dword(&space, 0x30), 0, "nor is there a ROM");
        space.write(0x10, &0xd123_4567u32.to_le_bytes());
        space.write(0x04, &[2]);
        assert_eq!(space.bar(), Some(0xd123_0000));
        space.write(0x04, &[0]);
        assert_eq!(space.bar(), None);
    }

    #[test]
    fn what_is_read_only_stays_as_it_is() {
        let mut space = space();
        let before: Vec<u32> = (0..64).map(|word| dword(&space, word * 4)).collect();
        for offset in
            (0..0x100).filter(|offset| !matches!(offset, 0x04..=0x05 | 0x0c | 0x10..=0x13 | 0x3c))
        {
            space.write(offset, &[0xff]);
        }
        let after: Vec<u32> = (0..64).map(|word| dword(&space, word * 4)).collect();
        assert_eq!(before, after);
        space.write(0x04, &[0xff, 0xff]);
        assert_eq!(dword(&space, 4), 0x0406);
    }

    #[test]
    fn odd_widths_and_offsets_are_answered() {
        let mut space = space();
        let mut three = [0; 3];
        space.read(1, &mut three);
        assert_eq!(three, [0x1a, 0x42, 0x10]);
        for offset in [0, 3, 0xfd, 0xff, 0x100, 0xfff, u64::MAX] {
            for len in 0..=9 {
                let mut bytes = vec![0xaa; len];
                space.read(offset, &mut bytes);
                space.write(offset, &bytes);
            }
        }
        let mut beyond = [0xaa; 4];
        space.read(0xfe, &mut beyond);
        assert_eq!(beyond, [0; 4]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(0x09, &[3, 4, 5], &[0, 0xf0]);
        let second = space.add_capability(0x11, &[0; 10], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(dword(&space, 0x34) & 0xff, 0x40);
        assert_eq!(dword(&space, 0x40), 0x0403_4809);
        assert_eq!(dword(&space, 0x48) & 0xffff, 0x0011);
        assert_eq!(dword(&space, 0x04) >> 16, 0x10, "the status says that there are some");
        space.write(0x40, &[0xff; 8]);
        assert_eq!(dword(&space, 0x40), 0xf403_4809);
    }
}
