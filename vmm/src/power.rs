//! How a guest ends or restarts its machine, and how somebody outside asks it to.
//!
//! Contract: [`Power`] takes one [`Outcome`] of a run, the first, from any thread, and its descriptor becomes readable. The
//! registers are ACPI's sleep control and reset, and the one command of a keyboard controller that resets. A power button
//! is pressed by an interrupt; what to do about it is in ACPI's tables and up to the guest.
//!
//! Kernels for reduced hardware restart by EFI. Where there is none, Linux jumps to where firmware begins, in real mode:
//! [`install_firmware`] is all of ours.
//!
//! What it deliberately does not do: sleep. The only sleep that is offered is S5, power off.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::bus::Region;
use crate::layout::RESET_VECTOR;

/// The sleep type of S5 (power off), as the tables name it.
pub(crate) const S5: u8 = 5;
/// What resets, written to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// Offsets of the registers among the ports.
pub(crate) const SLEEP_CONTROL: u64 = 0;
pub(crate) const SLEEP_STATUS: u64 = 1;
pub(crate) const RESET: u64 = 2;
/// ACPI 6.5, 4.8.3.7: SLP_TYPx is bits 2 to 4 of the sleep control register, SLP_EN is bit 5.
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The keyboard controller's command port, and the command that pulses the processor's reset line.
const COMMAND: u64 = 4;
const PULSE_RESET: u8 = 0xFE;

/// Firmware: `mov al, RESET_VALUE; mov dx, POWER_PORTS.start + RESET; out dx, al; cli; hlt; jmp` to the `hlt`.
const FIRMWARE: [u8; 10] = [0xB0, RESET_VALUE, 0xBA, 0x02, 0x06, 0xEE, 0xFA, 0xF4, 0xEB, 0xFD];

/// Has a jump to the reset vector reset the machine.
pub(crate) fn install_firmware(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&FIRMWARE, GuestAddress(RESET_VECTOR))
}

/// How a run of the machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest wants to start again: by a register, or by a fault that resets a processor.
    Reset,
    /// It cannot go on, for this reason.
    Failed(String),
}

/// Where the outcome of a run is left.
pub(crate) struct Power {
    outcome: Mutex<Option<Outcome>>,
    bell: OwnedFd,
}

impl Power {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { outcome: Mutex::new(None), bell })
    }

    /// Ends the run. Only the first outcome counts.
    pub(crate) fn end(&self, outcome: Outcome) {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(outcome);
        // Full only when it has been rung 2⁶⁴ − 2 times.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Takes the outcome, if there is one; the next run can have another.
    pub(crate) fn take(&self) -> Option<Outcome> {
        // Nothing to read: nobody has rung since.
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl AsFd for Power {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// ACPI's registers.
pub(crate) struct SleepAndReset(pub(crate) Arc<Power>);

impl Region for SleepAndReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The sleep status's only bit says that the machine has woken.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == S5 => {
                self.0.end(Outcome::PoweredOff);
            }
            RESET if value == RESET_VALUE => self.0.end(Outcome::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller that has no keyboard.
pub(crate) struct KeyboardController(pub(crate) Arc<Power>);

impl Region for KeyboardController {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Neither buffer is full: a command is taken at once.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.0.end(Outcome::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome_of(write: impl Fn(&dyn Region, &dyn Region)) -> Option<Outcome> {
        let power = Arc::new(Power::new().unwrap());
        write(&SleepAndReset(power.clone()), &KeyboardController(power.clone()));
        power.take()
    }

    #[test]
    fn only_an_enabled_s5_powers_off() {
        let off = S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
        assert_eq!(
            outcome_of(|acpi, _| acpi.write(SLEEP_CONTROL, &[off])),
            Some(Outcome::PoweredOff)
        );
        for value in [0, S5 << SLEEP_TYPE_SHIFT, SLEEP_ENABLE, 3 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE]
        {
            assert_eq!(outcome_of(|acpi, _| acpi.write(SLEEP_CONTROL, &[value])), None);
        }
        assert_eq!(outcome_of(|acpi, _| acpi.write(SLEEP_CONTROL, &[off, 0])), None);
    }

    #[test]
    fn two_registers_reset() {
        assert_eq!(outcome_of(|acpi, _| acpi.write(RESET, &[RESET_VALUE])), Some(Outcome::Reset));
        assert_eq!(
            outcome_of(|_, keyboard| keyboard.write(COMMAND, &[PULSE_RESET])),
            Some(Outcome::Reset)
        );
        assert_eq!(outcome_of(|_, keyboard| keyboard.write(0, &[PULSE_RESET])), None);
        assert_eq!(outcome_of(|_, keyboard| keyboard.write(COMMAND, &[0x20])), None);
    }

    #[test]
    fn the_firmware_writes_to_the_reset_register() {
        let port = (crate::layout::POWER_PORTS.start + RESET) as u16;
        assert_eq!(FIRMWARE[3..5], port.to_le_bytes());
        assert!(RESET_VECTOR + (FIRMWARE.len() as u64) <= crate::layout::LEGACY_HOLE.end);
    }

    #[test]
    fn the_first_outcome_counts_and_is_taken_once() {
        let power = Power::new().unwrap();
        power.end(Outcome::Reset);
        power.end(Outcome::PoweredOff);
        assert_eq!(power.take(), Some(Outcome::Reset));
        assert_eq!(power.take(), None);
        power.end(Outcome::PoweredOff);
        assert_eq!(power.take(), Some(Outcome::PoweredOff));
    }
}
