//! Messages as the protocol layer delivers them: the payload is of the request's layout, and as many descriptors come
//! along as its row and payload ask for. Values are anything.
//!
//! Numbers are written so that those which mean something are near: one byte chooses from a list, or says that the
//! number follows.

use std::os::fd::OwnedFd;

use common::memory::{FrontendAddress, GuestAddress, RegionSpec};
use common::protocol::table::{FdCount, Layout, row};
use common::protocol::{Message, Payload, Request};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::script::Script;

/// Regions in a table; the protocol layer allows more of the same.
const TABLE_REGIONS_LIMIT: usize = 4;
/// Bytes in a configuration space message, of which the session takes at most 256.
const CONFIG_BYTES_LIMIT: usize = 256;

/// A message, and the descriptors that came with it by their place in [`Files`].
#[derive(Debug)]
pub(super) struct Said {
    pub(super) request: Request,
    pub(super) payload: Payload,
    pub(super) files: Vec<usize>,
}

/// The other ends of all descriptors that were sent: who reads there knows whether they are still open.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<Option<OwnedFd>>);

impl Files {
    fn open(&mut self) -> (usize, OwnedFd) {
        let flags = PipeFlags::NONBLOCK | PipeFlags::CLOEXEC;
        let (reader, writer) = rustix::pipe::pipe_with(flags).expect("a pipe");
        self.0.push(Some(reader));
        (self.0.len() - 1, writer)
    }

    /// Checks that all but those which are `kept` have been closed.
    pub(super) fn check_closed(&mut self, kept: &[usize]) {
        for (place, file) in self.0.iter_mut().enumerate() {
            if !kept.contains(&place)
                && let Some(reader) = file.take()
            {
                assert!(!is_open(&reader), "descriptor {place} is of no more use, and left open");
            }
        }
    }

    /// Checks that those which are `kept` are open.
    pub(super) fn check_open(&self, kept: &[usize]) {
        for place in kept {
            let open = self.0.get(*place).and_then(Option::as_ref).is_some_and(is_open);
            assert!(open, "descriptor {place} is needed, and closed");
        }
    }
}

fn is_open(reader: &OwnedFd) -> bool {
    rustix::io::read(reader, &mut [0; 1]) == Err(Errno::AGAIN)
}

/// The next message of the script.
pub(super) fn compose(
    script: &mut Script<'_>,
    request: Request,
    files: &mut Files,
) -> (Message, Said) {
    let row = row(request);
    let payload = payload(script, row.payload);
    let count = match (row.fds, &payload) {
        (FdCount::Exactly(count), _) => count,
        (FdCount::UpTo(count), _) => script.below(count + 1),
        (FdCount::OnePerRegion, Payload::MemoryTable(regions)) => regions.len(),
        (FdCount::UnlessNoFd, Payload::VringFd { no_fd: false, .. }) => 1,
        (FdCount::OnePerRegion | FdCount::UnlessNoFd, _) => 0,
    };
    let (places, fds) = (0..count).map(|_| files.open()).unzip();
    let said = Said { request, payload: payload.clone(), files: places };
    (Message { request, need_reply: false, payload, fds }, said)
}

fn payload(script: &mut Script<'_>, layout: Layout) -> Payload {
    match layout {
        Layout::Empty => Payload::Empty,
        Layout::U64 => Payload::U64(features(script)),
        Layout::VringState => Payload::VringState { index: index(script), num: number(script) },
        Layout::VringAddress => Payload::VringAddress {
            index: index(script),
            flags: 0,
            descriptor: address(script),
            used: address(script),
            available: address(script),
            log: 0,
        },
        Layout::VringFd => {
            Payload::VringFd { index: index(script) as u16 & 0xff, no_fd: script.below(4) == 3 }
        }
        Layout::MemoryTable => {
            let count = script.below(TABLE_REGIONS_LIMIT);
            Payload::MemoryTable((0..count).map(|_| region(script)).collect())
        }
        Layout::MemoryRegion => Payload::MemoryRegion(region(script)),
        Layout::Config => {
            let len = script.below(CONFIG_BYTES_LIMIT + 1);
            let (offset, flags) = (number(script), script.below(4) as u32);
            Payload::Config { offset, flags, data: vec![0; len] }
        }
        Layout::Inflight => {
            let (num_queues, queue_size) = (script.below(4) as u16, script.below(300) as u16);
            let (mmap_size, mmap_offset) = (script.below(1 << 16) as u64, script.below(32) as u64);
            Payload::Inflight { mmap_size, mmap_offset, num_queues, queue_size }
        }
        Layout::Unparsed(..) => Payload::Unparsed,
    }
}

/// A ring's index: mostly one that there is.
fn index(script: &mut Script<'_>) -> u32 {
    match script.u8() {
        0xff => script.u32(),
        byte => u32::from(byte & 3),
    }
}

/// A size, a base or a state.
fn number(script: &mut Script<'_>) -> u32 {
    const NEAR: [u32; 12] = [0, 1, 2, 3, 128, 255, 256, 257, 512, 0x8000, 0xffff, 0x1_0000];
    let choice = script.below(NEAR.len() + 1);
    NEAR.get(choice).copied().unwrap_or_else(|| script.u32())
}

/// Feature bits: single ones of either kind, sets that are offered, or any.
fn features(script: &mut Script<'_>) -> u64 {
    match script.u8() {
        byte @ 0..64 => 1 << byte,
        64 => 0,
        // VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1, without and with the ring's.
        65 => 1 << 30 | 1 << 32,
        66 => 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32,
        // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
        67 => 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15,
        68 => u64::MAX,
        _ => script.u64(),
    }
}

/// An address of a ring's area: mostly aligned.
fn address(script: &mut Script<'_>) -> FrontendAddress {
    FrontendAddress(match script.u8() {
        0xff => script.u64(),
        byte @ 0xc0.. => u64::from(byte),
        byte => u64::from(byte) << 8,
    })
}

/// A memory region: one of a few, so that the same one comes again, or any.
fn region(script: &mut Script<'_>) -> RegionSpec {
    let choice = script.u8();
    let [guest, frontend, len_bytes, file_offset_bytes] = match choice {
        0xff => [script.u64(), script.u64(), script.u64(), script.u64()],
        _ => {
            let place = u64::from(choice & 7) << 16;
            // Bit 3: the same region from another place of its file.
            [place, place | 1 << 32, 0x1_0000, u64::from(choice >> 3 & 1) << 12]
        }
    };
    let (guest, frontend) = (GuestAddress(guest), FrontendAddress(frontend));
    RegionSpec { guest, frontend, len_bytes, file_offset_bytes }
}
