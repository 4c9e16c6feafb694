//! The serial line COM1: what a kernel says before it has found its consoles goes to our standard output.
//!
//! Contract: a processor writes as it goes, and waits where standard output does. An end of standard output that is gone
//! costs the output, not the guest.
//!
//! What it deliberately does not do: take input. A guest has consoles for that, whose terminals no processor waits for.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::Region;
use crate::layout::SERIAL_IRQ;
use crate::memory::errno;

/// The line.
pub(crate) struct Com1<W: Write + Send = io::Stdout> {
    device: Mutex<Serial<Interrupt, NoEvents, Forgiving<W>>>,
}

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the serial line's interrupt")]
pub(crate) struct Error(#[source] io::Error);

impl Com1 {
    /// The line to our standard output, with its interrupt.
    pub(crate) fn new(vm: &VmFd) -> Result<Self, Error> {
        let interrupt = Interrupt(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error)?);
        vm.register_irqfd(&interrupt.0, SERIAL_IRQ).map_err(|error| Error(errno(error)))?;
        Ok(Self::over(interrupt, io::stdout()))
    }
}

impl<W: Write + Send> Com1<W> {
    fn over(interrupt: Interrupt, output: W) -> Self {
        Self { device: Mutex::new(Serial::new(interrupt, Forgiving(output))) }
    }
}

impl<W: Write + Send> Region for Com1<W> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            // The trigger is an eventfd that KVM empties; a byte that is lost in loop mode was the guest's to read.
            let _ = device.write(offset, byte);
        }
    }
}

/// Rings for the processor.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Output that nobody may be left to read.
struct Forgiving<W>(W);

impl<W: Write> Write for Forgiving<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(self.0.write(bytes).unwrap_or(bytes.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        // As above.
        let _ = self.0.flush();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_of_the_guest_come_out_and_other_widths_do_not() {
        let paper = Paper::default();
        let line = Com1::over(Interrupt(EventFd::new(EFD_NONBLOCK).unwrap()), paper.clone());
        for byte in b"ok" {
            line.write(0, &[*byte]);
        }
        line.write(0, b"no");
        assert_eq!(*paper.0.lock().unwrap(), b"ok");
        let mut wide = [0; 2];
        line.read(0, &mut wide);
        assert_eq!(wide, [0xFF; 2]);
    }
}
