//! A guest's memory: real pages, at the addresses that a test wants.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::memory::{
    FrontendAddress, GuestAddress, HostBuffer, MemoryMap, Region, RegionSpec, guest_file,
};

/// The front end has the guest's memory elsewhere than the guest: who confuses the two addresses
/// meets nothing.
const FRONTEND_BASE: u64 = 0x7f00_0000_0000;

/// Memory of a guest that a test reads and writes as its driver.
pub struct Guest {
    files: Vec<(RegionSpec, OwnedFd)>,
    map: Arc<MemoryMap>,
}

impl Guest {
    /// Memory in regions of (guest address, bytes), each in a file of its own.
    ///
    /// # Panics
    /// The regions overlap, or there is no memory.
    pub fn new(regions: &[(u64, u64)]) -> Self {
        let share = |&(at, len_bytes): &(u64, u64)| {
            let spec = RegionSpec {
                guest: GuestAddress(at),
                frontend: Self::frontend(at),
                len_bytes,
                file_offset_bytes: 0,
            };
            (spec, guest_file(len_bytes))
        };
        let files: Vec<_> = regions.iter().map(share).collect();
        Self { map: Arc::new(map(&files)), files }
    }

    /// The same memory, mapped anew: a map of which nothing is shared with another.
    pub fn map_again(&self) -> Arc<MemoryMap> {
        Arc::new(map(&self.files))
    }

    /// The memory as a ring uses it.
    pub fn map(&self) -> Arc<MemoryMap> {
        Arc::clone(&self.map)
    }

    /// The front end's address of a guest address.
    pub fn frontend(at: u64) -> FrontendAddress {
        FrontendAddress(FRONTEND_BASE + at)
    }

    /// The bytes of a range, piece by piece where it spans regions.
    ///
    /// # Panics
    /// The range is not in memory.
    pub fn buffers(&self, at: u64, len_bytes: usize) -> Vec<HostBuffer> {
        let mut buffers = Vec::new();
        if len_bytes > 0 {
            let len_bytes = u32::try_from(len_bytes).expect("a range of less than 4 GiB");
            self.map
                .resolve(GuestAddress(at), len_bytes, &mut 0, |buffer| buffers.push(buffer))
                .expect("a range in memory");
        }
        buffers
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// The range is not in memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for buffer in self.buffers(at, bytes.len()) {
            rest = &rest[buffer.write(0, rest)..];
        }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// The range is not in memory.
    pub fn read(&self, at: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        let mut done = 0;
        for buffer in self.buffers(at, len_bytes) {
            done += buffer.read(0, &mut bytes[done..]);
        }
        bytes
    }
}

fn map(files: &[(RegionSpec, OwnedFd)]) -> MemoryMap {
    let regions = files.iter().map(|(spec, file)| {
        Arc::new(Region::map(*spec, file.as_fd()).expect("memory that can be mapped"))
    });
    MemoryMap::new(regions.collect()).expect("regions that do not overlap")
}
