//! The tables that tell a guest what its machine has, in the form for reduced hardware.
//!
//! Contract: [`write`] puts them where a kernel looks for them, and says nothing about devices on PCI, which are found there.
//! What the tables name is in [`crate::layout`] and [`crate::power`].
//!
//! What it deliberately does not do: describe a PC's timers, its DMA or interrupt controllers of 1981. Reduced hardware has
//! none, and kernels then look for none.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{
    ECAM, IOAPIC, LOCAL_APIC, PCI_WINDOW, POWER_IRQ, POWER_PORTS, RESET_VECTOR, RSDP, SERIAL_IRQ,
    SERIAL_PORTS, pci_window_64,
};
use crate::power::{RESET, RESET_VALUE, S5, SLEEP_CONTROL, SLEEP_STATUS};

const OEM: [u8; 6] = *b"OUTBRD";
const TABLE: [u8; 8] = *b"OUTBOARD";
const REVISION: u32 = 1;
/// ACPI 6.5, 5.2.9.3: the machine has no VGA adapter and no CMOS clock (bits 2 and 5), nor a keyboard controller (bit 1).
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// Of a table's header.
const HEADER_LEN: u32 = 36;
/// Where tables begin. The specification wants 16 for the root only.
const TABLE_ALIGN: u64 = 16;

/// Writes the tables for a machine with so many processors and memory up to `memory_end`.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    vcpu_count: u8,
    memory_end: u64,
) -> Result<(), GuestMemoryError> {
    for (address, table) in tables(vcpu_count, memory_end) {
        memory.write_slice(&table, GuestAddress(address))?;
    }
    Ok(())
}

/// Every table with its address, the root first.
fn tables(vcpu_count: u8, memory_end: u64) -> Vec<(u64, Vec<u8>)> {
    let mut next = (RSDP + Rsdp::len() as u64).next_multiple_of(TABLE_ALIGN);
    let mut placed = Vec::new();
    let mut place = |table: Vec<u8>| {
        let address = next;
        next = (next + table.len() as u64).next_multiple_of(TABLE_ALIGN);
        placed.push((address, table));
        address
    };
    let dsdt = place(dsdt(memory_end));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(place(fadt(dsdt)));
    xsdt.add_entry(place(madt(vcpu_count)));
    xsdt.add_entry(place(mcfg()));
    let xsdt = place(bytes_of(&xsdt));
    placed.insert(0, (RSDP, bytes_of(&Rsdp::new(OEM, xsdt))));
    assert!(next <= RESET_VECTOR, "a table for each of at most 255 processors is small");
    placed
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |offset: u64| {
        GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, POWER_PORTS.start + offset)
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // The button is a device of its own, not a bit of hardware that is not there.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    bytes_of(&fadt.finalize())
}

fn madt(vcpu_count: u8) -> Vec<u8> {
    let mut madt =
        MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC as u32));
    for id in 0..vcpu_count {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    bytes_of(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    bytes_of(&mcfg)
}

/// Interrupts are edges: the eventfds that raise them are counts, not levels.
fn interrupt(number: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, number)
}

/// The differentiated system description: devices that cannot be found otherwise, and how to power off.
fn dsdt(memory_end: u64) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_LEN, 2, OEM, TABLE, REVISION);
    let sleep = aml::Name::new("_S5_".into(), &aml::Package::new(vec![&S5]));
    for part in [bytes_of(&sleep), pci_root(memory_end), board(), serial_line(), power_button()] {
        dsdt.append_slice(&part);
    }
    dsdt.as_slice().to_vec()
}

/// The root of PCI: one bus, and the two windows for its devices' registers.
fn pci_root(memory_end: u64) -> Vec<u8> {
    let narrow = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW.start as u32,
        (PCI_WINDOW.end - 1) as u32,
        None,
    );
    let wide = pci_window_64(memory_end);
    let wide = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        wide.start,
        wide.end - 1,
        None,
    );
    let bus = aml::AddressSpace::new_bus_number(0_u16, 0_u16);
    let resources = aml::ResourceTemplate::new(vec![&bus, &narrow, &wide]);
    bytes_of(&aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// What is taken, and no device's: kernels use a configuration space only where it is reserved.
fn board() -> Vec<u8> {
    let len = (ECAM.end - ECAM.start) as u32;
    let ecam = aml::Memory32Fixed::new(true, ECAM.start as u32, len);
    let ports = (POWER_PORTS.end - POWER_PORTS.start) as u8;
    let power = aml::IO::new(POWER_PORTS.start as u16, POWER_PORTS.start as u16, 1, ports);
    let resources = aml::ResourceTemplate::new(vec![&ecam, &power]);
    bytes_of(&aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    ))
}

fn serial_line() -> Vec<u8> {
    let ports = (SERIAL_PORTS.end - SERIAL_PORTS.start) as u8;
    let ports = aml::IO::new(SERIAL_PORTS.start as u16, SERIAL_PORTS.start as u16, 1, ports);
    let interrupt = interrupt(SERIAL_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&ports, &interrupt]);
    bytes_of(&aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// A button, and the device whose interrupt says that it was pressed (ACPI 6.5, 5.6.9: GED; the value 0x80 is "pressed").
fn power_button() -> Vec<u8> {
    let button = bytes_of(&aml::Device::new(
        "_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    ));
    let interrupt = interrupt(POWER_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&interrupt]);
    let path = aml::Path::new("\\_SB_.PWRB");
    let pressed = aml::Notify::new(&path, &0x80_usize);
    let events = bytes_of(&aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &resources),
            &aml::Method::new("_EVT".into(), 1, true, vec![&pressed]),
        ],
    ));
    [button, events].concat()
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use ::tests::{Rig, temp_dir};

    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn pointer(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_adds_up_to_zero_and_says_its_length() {
        for vcpu_count in [1, 4, 254] {
            let tables = tables(vcpu_count, 1 << 32);
            let (_, root) = &tables[0];
            // ACPI 6.5, 5.2.5.3: the first 20 bytes have a sum of their own.
            assert_eq!((&root[..8], sum(&root[..20]), sum(root)), (&b"RSD PTR "[..], 0, 0));
            for (address, table) in &tables[1..] {
                let signature = String::from_utf8_lossy(&table[..4]);
                assert_eq!(sum(table), 0, "{signature} of {vcpu_count}");
                let len = u32::from_le_bytes(table[4..8].try_into().unwrap());
                assert_eq!(len as usize, table.len(), "{signature} at {address:#x}");
            }
        }
    }

    #[test]
    fn tables_are_found_from_the_root() {
        let tables = tables(2, 1 << 32);
        let at = |address| {
            let (_, table) = tables.iter().find(|(at, _)| *at == address).expect("a table");
            &table[..]
        };
        assert_eq!(tables[0].0, RSDP);
        let xsdt = at(pointer(&tables[0].1, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let entries: Vec<_> = (36..xsdt.len()).step_by(8).map(|at| pointer(xsdt, at)).collect();
        let signatures: Vec<_> = entries.iter().map(|&address| &at(address)[..4]).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        // X_DSDT (ACPI 6.5, 5.2.9).
        assert_eq!(&at(pointer(at(entries[0]), 140))[..4], b"DSDT");
    }

    #[test]
    fn every_processor_is_in_the_table() {
        let table = madt(3);
        // After the header and the address and flags, 8 bytes each: type 0, enabled.
        let ids: Vec<_> =
            table[44..44 + 3 * 8].chunks(8).map(|entry| (entry[0], entry[3])).collect();
        assert_eq!(ids, [(0, 0), (0, 1), (0, 2)]);
    }

    /// It is of one source with the kernel's reader. What it has read it translates back, as strictly as if a person had
    /// written it.
    #[test]
    fn iasl_reads_every_table_without_a_warning() {
        let Some(rig) = Rig::find() else { return };
        let directory = temp_dir();
        let path = |name: &str| directory.path().join(name);
        let run = |arguments: &[&str], file: &Path| {
            let mut command = rig.tool("iasl");
            command.args(arguments).arg(file).current_dir(directory.path());
            let output = command.output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8(text).unwrap();
            assert!(output.status.success(), "{}: {text}", file.display());
            text
        };
        // The root is no table: it is what tables are found by.
        for (_, table) in &tables(4, 1 << 32)[1..] {
            fs::write(path("table.dat"), table).unwrap();
            let text = run(&["-d"], &path("table.dat"));
            let has = |word: &str| text.to_lowercase().contains(word);
            assert!(!["warning", "error", "checksum"].into_iter().any(has), "{text}");
            let text = run(&["-p", "back"], &path("table.dsl"));
            assert!(text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
        }
    }
}
