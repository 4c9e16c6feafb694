//! Fuzz targets: each module's `run` takes bytes, does with them what a hostile peer could, and compares what happens
//! with a model written from the specification.
//!
//! | target | the bytes are | held against |
//! |---|---|---|
//! | [`message`] | one vhost-user message | its own payload, written back |
//! | [`connection`] | a stream of them, and where it is cut | [`message`]'s parser on each message whole |
//! | [`session`] | messages in any order, and what the daemon makes of them | the ring states of the vhost-user text |
//! | [`ring`] | stores of a driver between the device's steps | a second reading of VIRTIO's split virtqueue |
//! | [`request`] | block requests, what the disk makes of them, and when | a second reading of VIRTIO's block device |
//! | [`frame`] | frames and commands of a network's driver | a second reading of VIRTIO's network device |
//! | [`console`] | control messages of a console's driver, and its buffers | a second reading of VIRTIO's console device |
//! | [`registers`] | a guest's accesses to a device's registers | what PCI says of BARs and MSI-X, and VIRTIO of the status |
//! | [`control`] | what a client of the control socket sends | one answer a line |
//!
//! # Contract
//! `run` returns, whatever the bytes are: a panic, a hang or a sanitizer's report is a bug of what it runs, or of its
//! model. It depends on nothing but the bytes, so that an input that fails once fails again. Inputs are read front to
//! back ([`script`]), so that a mutation of one step leaves those before it alone.
//!
//! # What it deliberately does not do
//! No threads, no kernel I/O, no memory that is truncated under a ring: those are the conformance suite's.

pub mod connection;
pub mod console;
pub mod control;
pub mod frame;
pub mod message;

pub mod registers;
pub mod request;
pub mod ring;
mod script;
pub mod session;

#[cfg(test)]
mod replay;
