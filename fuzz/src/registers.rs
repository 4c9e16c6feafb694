//! A guest that reads and writes a virtio-pci device's registers as it likes.
//!
//! Input: accesses, each of them a byte that says what it is, a place, and for a write the bytes. Most places are near
//! something: the script need not find a 32-bit address. After each access the device is held against what can be read
//! of it: KVM delivers exactly those vectors that nothing masks, as the table has them; it has exactly those
//! notification addresses that the BAR gives; a driver is OK only with features that were offered.

use vmm::fuzzing::{FEATURES, QUEUES, Registers, Space, WINDOW};

use crate::script::Script;

/// The device's place in the configuration space: the first behind the bridge.
const DEVICE: u64 = 1 << 15;
const BAR: u64 = DEVICE + 0x10;
const COMMAND: u64 = DEVICE + 4;
/// The capabilities' list begins here.
const CAPABILITIES: u64 = DEVICE + 0x34;
const CAP_MSIX: u8 = 0x11;

const TABLE: u64 = 0x8000;
const NOTIFY: u64 = 0x3000;
const STATUS: u64 = 20;

/// Accesses of one script: a few times what a driver needs.
const STEPS_MAX: usize = 512;
/// The widest access; a processor has none of more than 8 bytes, and of odd widths only as parts.
const WIDTH_MAX: usize = 16;

/// Carries a script out.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let registers = Registers::new();
    let msix = find_msix(&registers);
    check(&registers, msix);
    for _ in 0..STEPS_MAX {
        if script.is_empty() {
            break;
        }
        step(&registers, &mut script);
        check(&registers, msix);
    }
}

fn step(registers: &Registers, script: &mut Script<'_>) {
    let what = script.u8();
    let (space, offset) = match what & 7 {
        0 => (Space::Config, u64::from(script.u32()) % 0x10_0000),
        1 => (Space::Config, DEVICE + u64::from(script.u16() % 0x100)),
        2 => (Space::Window, u64::from(script.u32()) % 0x1000_0000),
        3 => (Space::Window, bar(registers).saturating_sub(WINDOW) + u64::from(script.u16())),
        // The common configuration, the table of MSI-X, the BAR and the command register, which are worth most.
        4 => (Space::Window, bar(registers).saturating_sub(WINDOW) + script.below(64) as u64),
        5 => (Space::Window, bar(registers).saturating_sub(WINDOW) + TABLE + script.u8() as u64),
        6 => (Space::Config, DEVICE + script.below(0x20) as u64),
        _ => (Space::Config, CAPABILITIES + script.below(0x90) as u64),
    };
    let width = if what & 0x40 == 0 { 1 << (what >> 4 & 3) } else { script.below(WIDTH_MAX + 1) };
    if what & 0x80 == 0 {
        let mut bytes = vec![0; width];
        bytes.copy_from_slice(&[script.bytes(width), &[0; WIDTH_MAX]].concat()[..width]);
        registers.write(space, offset, &bytes);
    } else {
        // A read fills all that it is asked for: once from zeros and once from ones, it is the same.
        let (mut first, mut second) = (vec![0; width], vec![0xff; width]);
        registers.read(space, offset, &mut first);
        registers.read(space, offset, &mut second);
        let is_isr =
            space == Space::Window && (offset & 0xffff) < 0x2000 && (offset & 0xffff) >= 0xff0;
        assert!(first == second || is_isr, "{space:?} {offset:#x}: {first:x?}, then {second:x?}");
    }
}

fn check(registers: &Registers, msix: u64) {
    let [command] = config(registers, COMMAND);
    let is_mapped = command & 2 != 0;
    let bar = bar(registers);
    let expected = (0..u64::from(QUEUES)).map(|queue| bar + NOTIFY + queue * 4);
    let expected: Vec<u64> = expected.filter(|_| is_mapped).collect();
    assert_eq!(registers.kicks(), expected, "notification addresses");
    if !is_mapped || !(WINDOW..WINDOW + 0x1000_0000 - 0xffff).contains(&bar) {
        return;
    }
    let [_, control] = config(registers, msix + 2);
    let mut messages = Vec::new();
    for vector in 0..=u64::from(QUEUES) {
        let entry: [u8; 16] = window(registers, bar + TABLE + vector * 16);
        if control & 0xc0 == 0x80 && entry[12] & 1 == 0 {
            let (address, data) =
                (entry[..8].try_into().expect("8"), entry[8..12].try_into().expect("4"));
            messages.push((u64::from_le_bytes(address), u32::from_le_bytes(data)));
        }
    }
    assert_eq!(registers.messages(), messages, "vectors that nothing masks");
    check_status(registers, bar);
}

fn check_status(registers: &Registers, bar: u64) {
    let [status]: [u8; 1] = window(registers, bar + STATUS);
    assert!(status & 4 == 0 || status & 8 != 0, "DRIVER_OK without FEATURES_OK: {status:#x}");
    let select: [u8; 4] = window(registers, bar + 8);
    let accepted = u64::from(u32::from_le_bytes(window(registers, bar + 12)));
    let offered = match u32::from_le_bytes(select) {
        0 => FEATURES & 0xffff_ffff,
        1 => FEATURES >> 32,
        _ => 0,
    };
    assert!(status & 8 == 0 || accepted & !offered == 0, "{accepted:#x} was not offered");
}

fn find_msix(registers: &Registers) -> u64 {
    let [mut at] = config(registers, CAPABILITIES);
    while at != 0 {
        let [id, next] = config(registers, DEVICE + u64::from(at));
        if id == CAP_MSIX {
            return DEVICE + u64::from(at);
        }
        at = next;
    }
    panic!("the device has MSI-X");
}

fn bar(registers: &Registers) -> u64 {
    u64::from(u32::from_le_bytes(config(registers, BAR)))
}

fn config<const N: usize>(registers: &Registers, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    registers.read(Space::Config, offset, &mut bytes);
    bytes
}

fn window<const N: usize>(registers: &Registers, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    registers.read(Space::Window, address - WINDOW, &mut bytes);
    bytes
}
