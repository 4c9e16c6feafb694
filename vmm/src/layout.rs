//! The guest's physical addresses, ports and interrupts: who stands where.
//!
//! Contract: constants only. Nothing overlaps (a test of this file looks), and what is not named here is memory, below
//! [`LOW_MEMORY_END`] or from [`HIGH_MEMORY_START`] on, or nothing at all.

use std::ops::Range;

/// Memory beyond this is moved above 4 GiB, so that devices have addresses of 32 bits.
pub(crate) const LOW_MEMORY_END: u64 = 0xC000_0000;
/// Where memory that does not fit below [`LOW_MEMORY_END`] goes on.
pub(crate) const HIGH_MEMORY_START: u64 = 1 << 32;

/// The first megabyte's hole: adapters' memory and firmware on a PC. ACPI's tables are in it.
pub(crate) const LEGACY_HOLE: Range<u64> = 0x000A_0000..0x0010_0000;
/// Where firmware for PCs leaves the root of ACPI's tables (ACPI 6.5, 5.2.5.1: 0xE0000 to 0xFFFFF, 16-byte boundaries).
pub(crate) const RSDP: u64 = 0x000E_0000;

/// Where a processor begins that is reset, as a PC's firmware sees it: F000:FFF0.
pub(crate) const RESET_VECTOR: u64 = 0x000F_FFF0;

/// The first processor's descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// Page tables of a kernel that is entered in 64-bit mode.
pub(crate) const PAGE_TABLES: Range<u64> = 0x9000..0x1_0000;
/// The kernel's parameters: a zero page, or an `hvm_start_info`.
pub(crate) const BOOT_PARAMETERS: u64 = 0x7000;
/// The list of modules and the memory map that `hvm_start_info` points to: one page.
pub(crate) const BOOT_LISTS: u64 = 0x6000;
/// The kernel's command line, with its final zero.
pub(crate) const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;
/// Where a kernel is put that may be anywhere.
pub(crate) const KERNEL: u64 = 0x0010_0000;

/// Addresses for devices' registers, 32 bits.
pub(crate) const PCI_WINDOW: Range<u64> = 0xD000_0000..0xE000_0000;
/// The configuration space of PCI's bus 0: a page for each of 32 devices' 8 functions.
pub(crate) const ECAM: Range<u64> = 0xE000_0000..0xE010_0000;
/// How many devices bus 0 has room for, the root bridge being the first.
pub(crate) const PCI_DEVICES_MAX: usize = 32;
/// How large the window for devices' registers of 64-bit addresses is. It begins where memory ends
/// ([`pci_window_64`]).
pub(crate) const PCI_WINDOW_64_LEN: u64 = 1 << 34;
/// The unit of that window's start: no page table of the guest's mixes memory and devices.
const PCI_WINDOW_64_ALIGN: u64 = 1 << 30;

/// Where KVM's IOAPIC answers.
pub(crate) const IOAPIC: u64 = 0xFEC0_0000;
/// Where each processor's local APIC answers; messages for interrupts (MSI) go here, too.
pub(crate) const LOCAL_APIC: u64 = 0xFEE0_0000;
/// Three pages for KVM's task state segment, which Intel's processors need for real mode.
pub(crate) const KVM_TSS: u64 = 0xFFFB_D000;
/// A page for KVM's identity map, for the same reason. It must not be moved once a processor is there.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;

/// The first interrupt that the IOAPIC does not have, and so the first that a message may be routed from.
pub(crate) const FIRST_MSI_GSI: u32 = 24;

/// ACPI's sleep control, sleep status and reset registers, one byte each.
pub(crate) const POWER_PORTS: Range<u64> = 0x600..0x604;
/// The keyboard controller's data and command ports. It resets, and does nothing else.
pub(crate) const I8042_PORTS: Range<u64> = 0x60..0x65;
/// The first serial line (COM1).
pub(crate) const SERIAL_PORTS: Range<u64> = 0x3F8..0x400;
/// COM1's interrupt.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// The interrupt by which ACPI's events are told (power button).
pub(crate) const POWER_IRQ: u32 = 9;

/// The window for registers with addresses of 64 bits, above a memory that ends at `memory_end`.
pub(crate) fn pci_window_64(memory_end: u64) -> Range<u64> {
    let end = memory_end.max(HIGH_MEMORY_START);
    let start = end.next_multiple_of(PCI_WINDOW_64_ALIGN);
    start..start + PCI_WINDOW_64_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let places = [
            GDT..GDT + 64,
            BOOT_LISTS..BOOT_LISTS + 0x1000,
            BOOT_PARAMETERS..BOOT_PARAMETERS + 0x1000,
            PAGE_TABLES,
            COMMAND_LINE,
            LEGACY_HOLE,
            KERNEL..LOW_MEMORY_END,
            PCI_WINDOW,
            ECAM,
            IOAPIC..IOAPIC + 0x1000,
            LOCAL_APIC..LOCAL_APIC + 0x10_0000,
            KVM_IDENTITY_MAP..KVM_IDENTITY_MAP + 0x1000,
            KVM_TSS..KVM_TSS + 0x3000,
            HIGH_MEMORY_START..u64::MAX,
        ];
        for pair in places.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{:x?} and {:x?}", pair[0], pair[1]);
        }
    }

    #[test]
    fn the_wide_window_is_above_all_memory() {
        assert_eq!(pci_window_64(0x1000_0000).start, 1 << 32);
        assert_eq!(pci_window_64((1 << 32) + 1).start, 5 << 30);
    }
}
