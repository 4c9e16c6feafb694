//! The virtio devices as the guest sees them: modern virtio-pci, with MSI-X.
//!
//! Contract: nothing that a driver reads or writes waits for the device's daemon, panics, or reaches beyond its own
//! device. In steady state a driver reads and writes nothing here at all: its notifications are eventfds of KVM.
//! Deliberately absent: the legacy interface, INTx, shared memory, resetting one queue, packed rings.

pub(crate) mod common;
pub(crate) mod transport;
