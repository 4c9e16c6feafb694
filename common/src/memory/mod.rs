//! Guest memory: from a guest's addresses to bytes in this process.
//!
//! A front end sends the guest's memory as file descriptors. [`Region`] maps one of them, [`MemoryMap`] is an immutable
//! set of regions that translates addresses, [`HostBuffer`] is the result: a piece of a region, laid out as an iovec.
//! [`OwnMemory`] stands in for guest memory that the kernel cannot take as it lies, or that the guest must not change.
//!
//! # Contract
//! - **A buffer is valid while its region is mapped.** `HostBuffer` carries no lifetime, because the kernel and not a
//!   borrow decides when an I/O is over. Whoever keeps a buffer keeps the `Arc<MemoryMap>` (or the `Arc<Region>`) that it
//!   came from: a descriptor chain until its completion, a virtqueue while it runs. A new memory table is a new
//!   `MemoryMap`; a region that both tables name is shared by both, and is unmapped when the last holder lets go.
//! - **The bytes belong to the guest**, who may change them at any time: nothing here makes a reference to them, and what
//!   has been read once is kept in a private copy and never read again.
//! - **A write by a CPU of this process** goes through [`HostBuffer::write`], [`HostBuffer::copy_from`] and the `store_*` functions, and through
//!   nothing else. That is the seam at which a dirty log for live migration hooks in; writes by the kernel are logged by
//!   whoever asked for them. Today there is no log, and no feature bit says so.
//! - **A front end that shortens a file** which it has shared cannot end the process: [`sigbus`] puts zeros in the place
//!   of the missing pages and poisons the region. Zeros read from a poisoned region mean nothing; the session must end.
//!
//! # What it deliberately does not do
//! No IOMMU translation, no postcopy, no memory that is shared read-only, no device memory (only regular files, whose
//! length can be checked). It does not decide when a map is replaced: that is the session's business.

mod buffer;
#[cfg(test)]
pub(crate) mod crash;
mod map;
mod own;
mod region;
pub mod sigbus;

pub use buffer::HostBuffer;
pub use map::{AccessError, FrontendAddress, GuestAddress, MemoryMap, RegionSpec};
pub use own::{BOUNCE_ALIGNMENT, BOUNCE_BYTES, OwnMemory};
pub use region::{MapError, Region};

/// A memory file as a front end would share it, for tests: a memfd of `len_bytes`, without seals.
///
/// # Panics
/// The test's process can have no more descriptors.
#[cfg(any(test, feature = "simulation"))]
pub(crate) fn guest_file(len_bytes: u64) -> std::os::fd::OwnedFd {
    let file = rustix::fs::memfd_create(
        "guest",
        rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
    )
    .expect("memfd");
    rustix::fs::ftruncate(&file, len_bytes).expect("the memfd's length");
    file
}
