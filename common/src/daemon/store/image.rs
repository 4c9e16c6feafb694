//! The image: memory that outlives the process, in which it writes what its successor is to know.
//!
//! Contract: [`Image::write`] replaces what was written before at one store, wherever the process ends: the other of two slots
//! is filled, and it counts from the store of its generation on. [`Image::open`] believes nothing: a file of another size,
//! form or version, and one in which no slot is whole, is an [`ImageError`].
//!
//! Two further slots are the device's: a queue of it writes there what the driver has told it, before it answers.
//!
//! Beside the slots are two marks. *Busy* says that a message is being dealt with, so that what is written is not all that the
//! front end may count on. *Attempts* counts successors that began to take this up and did not get through.
//!
//! No fence is needed for what a successor sees: it reads when the process is gone, and the stores that a processor has made by
//! then are the first ones in the program's order. What keeps the compiler to that order stands in [`HostBuffer`].

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, compiler_fence};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};

use crate::memory::{FrontendAddress, GuestAddress, HostBuffer, MapError, Region, RegionSpec};

/// `"outboard"`, little-endian.
const MAGIC: u64 = 0x6472_616f_6274_756f;
/// Of this form and of what is written in it: another number for every change that a successor would misread.
const VERSION: u32 = 1;

// The head.
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 8;
const BUSY_AT: usize = 12;
const ATTEMPTS_AT: usize = 14;
const HEAD_BYTES: usize = 64;
// A slot.
const GENERATION_AT: usize = 0;
const LENGTH_AT: usize = 8;
const CHECKSUM_AT: usize = 12;
const PAYLOAD_AT: usize = 16;
/// The most that can be written. The largest session, with 509 memory regions and as many rings as there can be, takes a
/// fifth; what is never written takes no memory.
pub(super) const MAX_PAYLOAD_BYTES: usize = 1 << 20;
const SLOT_BYTES: usize = PAYLOAD_AT + MAX_PAYLOAD_BYTES;
/// The most that a device's queue can write: a network's filter with all its tables takes a twentieth.
const MAX_STATE_BYTES: usize = 64 << 10;
const STATE_SLOT_BYTES: usize = PAYLOAD_AT + MAX_STATE_BYTES;
const STATE_AT: usize = HEAD_BYTES + 2 * SLOT_BYTES;
const IMAGE_BYTES: usize = STATE_AT + 2 * STATE_SLOT_BYTES;
/// The first is written at once, so there always is one.
const FIRST_GENERATION: u64 = 1;

/// Why there is no image, or none to rely on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImageError {
    #[error("no memory can be had for it")]
    Memory(#[source] io::Error),
    #[error("it cannot be mapped")]
    Map(#[from] MapError),
    #[error("its file can be shortened (seals {0:?})")]
    Seals(SealFlags),
    #[error("it is no image: it begins with {0:#x}")]
    Magic(u64),
    #[error("it has version {found}, not {VERSION}")]
    Version { found: u32 },
    #[error("neither of its slots is whole")]
    Torn,
    #[error("{len_bytes} bytes are to be written, more than {limit_bytes}")]
    TooLong { len_bytes: usize, limit_bytes: usize },
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Image {
    region: Arc<Region>,
    file: Arc<OwnedFd>,
    generation: u64,
    state: Arc<DeviceState>,
}

/// What a device's queue writes down by itself, beside what the main thread writes.
#[derive(Debug)]
pub(super) struct DeviceState {
    region: Arc<Region>,
    generation: Mutex<u64>,
}

impl DeviceState {
    /// Writes this in place of what was written last.
    pub(super) fn write(&self, payload: &[u8]) -> Result<(), ImageError> {
        let length = length_of(payload, MAX_STATE_BYTES)?;
        // Nothing but a number, which is right whatever happened to who held it.
        let mut last = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = last.saturating_add(FIRST_GENERATION);
        fill(&self.slot(generation), generation, (payload, length));
        *last = generation;
        Ok(())
    }

    /// What was written last, if anything was.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        let (generation, payload) = newest([0, 1].map(|at| self.slot(at)), MAX_STATE_BYTES)?;
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = generation;
        Some(payload)
    }

    fn slot(&self, generation: u64) -> HostBuffer {
        let at = if generation.is_multiple_of(2) { STATE_AT } else { STATE_AT + STATE_SLOT_BYTES };
        self.region.bytes().slice(at, STATE_SLOT_BYTES)
    }
}

impl Image {
    /// A new one, in which this is written.
    pub(super) fn create(payload: &[u8]) -> Result<Self, ImageError> {
        let file = sealed_file().map_err(ImageError::Memory)?;
        let mut image = Self::of(map(&file)?, Arc::new(file));
        image.write(payload)?;
        let bytes = image.bytes();
        bytes.store_u32(VERSION_AT, VERSION);
        bytes.store_u64(MAGIC_AT, MAGIC);
        Ok(image)
    }

    /// The one that a predecessor has left, and what it wrote last.
    pub(super) fn open(file: Arc<OwnedFd>) -> Result<(Self, Vec<u8>), ImageError> {
        let region = map(&file)?;
        let seals = fcntl_get_seals(&file).map_err(|error| ImageError::Memory(error.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(ImageError::Seals(seals));
        }
        let magic = region.bytes().load_u64(MAGIC_AT);
        if magic != MAGIC {
            return Err(ImageError::Magic(magic));
        }
        let found = region.bytes().load_u32(VERSION_AT);
        if found != VERSION {
            return Err(ImageError::Version { found });
        }
        let mut image = Self::of(region, file);
        let slots = [0, 1].map(|at| image.slot(at));
        let (generation, payload) = newest(slots, MAX_PAYLOAD_BYTES).ok_or(ImageError::Torn)?;
        image.generation = generation;
        Ok((image, payload))
    }

    fn of(region: Region, file: Arc<OwnedFd>) -> Self {
        let region = Arc::new(region);
        let state = DeviceState { region: Arc::clone(&region), generation: Mutex::new(0) };
        Self { region, file, generation: 0, state: Arc::new(state) }
    }

    /// Writes this in place of what was written last.
    pub(super) fn write(&mut self, payload: &[u8]) -> Result<(), ImageError> {
        let length = length_of(payload, MAX_PAYLOAD_BYTES)?;
        let generation = self.generation.saturating_add(FIRST_GENERATION);
        fill(&self.slot(generation), generation, (payload, length));
        self.generation = generation;
        Ok(())
    }

    /// What the device's queue writes down.
    pub(super) fn state(&self) -> &Arc<DeviceState> {
        &self.state
    }

    /// Says whether a message is being dealt with.
    pub(super) fn set_busy(&self, busy: bool) {
        self.bytes().store_u16(BUSY_AT, u16::from(busy), Ordering::Release);
    }

    /// Whether the process that wrote this was dealing with a message.
    pub(super) fn is_busy(&self) -> bool {
        self.bytes().load_u16(BUSY_AT, Ordering::Acquire) != 0
    }

    /// Says how many successors have begun to take this up since one got through.
    pub(super) fn set_attempts(&self, count: u16) {
        self.bytes().store_u16(ATTEMPTS_AT, count, Ordering::Release);
    }

    /// Successors that have begun to take this up since one got through.
    pub(super) fn attempts(&self) -> u16 {
        self.bytes().load_u16(ATTEMPTS_AT, Ordering::Acquire)
    }

    /// What holds it.
    pub(super) fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    fn bytes(&self) -> HostBuffer {
        self.region.bytes()
    }

    /// The slot that this generation is written to.
    fn slot(&self, generation: u64) -> HostBuffer {
        let at = if generation.is_multiple_of(2) { HEAD_BYTES } else { HEAD_BYTES + SLOT_BYTES };
        self.bytes().slice(at, SLOT_BYTES)
    }
}

fn length_of(payload: &[u8], limit_bytes: usize) -> Result<u32, ImageError> {
    let len_bytes = payload.len();
    let length = u32::try_from(len_bytes).ok().filter(|_| len_bytes <= limit_bytes);
    length.ok_or(ImageError::TooLong { len_bytes, limit_bytes })
}

/// Makes a slot that of this generation.
fn fill(slot: &HostBuffer, generation: u64, (payload, length): (&[u8], u32)) {
    // From here on until the last store the slot is none.
    slot.store_u64(GENERATION_AT, 0);
    compiler_fence(Ordering::SeqCst);
    slot.write(PAYLOAD_AT, payload);
    slot.store_u32(LENGTH_AT, length);
    slot.store_u32(CHECKSUM_AT, checksum(generation, payload));
    compiler_fence(Ordering::SeqCst);
    slot.store_u64(GENERATION_AT, generation);
}

/// The newest of two slots that is whole.
fn newest(slots: [HostBuffer; 2], limit_bytes: usize) -> Option<(u64, Vec<u8>)> {
    let whole = slots.iter().filter_map(|slot| read(slot, limit_bytes));
    whole.max_by_key(|(generation, _)| *generation)
}

/// The generation and the payload of a slot that is whole.
fn read(slot: &HostBuffer, limit_bytes: usize) -> Option<(u64, Vec<u8>)> {
    let generation = slot.load_u64(GENERATION_AT);
    let length = usize::try_from(slot.load_u32(LENGTH_AT)).ok()?;
    if generation < FIRST_GENERATION || length > limit_bytes {
        return None;
    }
    let mut payload = vec![0; length];
    slot.read(PAYLOAD_AT, &mut payload);
    (slot.load_u32(CHECKSUM_AT) == checksum(generation, &payload)).then_some((generation, payload))
}

fn checksum(generation: u64, payload: &[u8]) -> u32 {
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&generation.to_le_bytes());
    checksum.update(payload);
    checksum.finalize()
}

fn sealed_file() -> io::Result<OwnedFd> {
    let file = memfd_create("session", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, IMAGE_BYTES as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn map(file: &OwnedFd) -> Result<Region, MapError> {
    let (guest, frontend) = (GuestAddress(0), FrontendAddress(0));
    let len_bytes = IMAGE_BYTES as u64;
    let spec = RegionSpec { guest, frontend, len_bytes, file_offset_bytes: 0 };
    Region::map(spec, file.as_fd())
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::crash;

    /// What a successor finds.
    fn left_by(image: &Image) -> Result<Vec<u8>, ImageError> {
        Image::open(Arc::clone(&image.file)).map(|(_, payload)| payload)
    }

    fn spoil(image: &Image, at: usize, byte: u8) {
        let file = std::fs::File::from(image.file.try_clone().unwrap());
        file.write_all_at(&[byte], at as u64).unwrap();
    }

    #[test]
    fn process_that_ends_at_any_store_leaves_the_old_or_the_new() {
        let mut stores = 0;
        loop {
            let mut image = Image::create(b"first").unwrap();
            image.write(b"old").unwrap();
            if crash::after(stores, || image.write(b"the new one")).is_some() {
                assert_eq!(left_by(&image).unwrap(), b"the new one");
                break;
            }
            assert_eq!(left_by(&image).unwrap(), b"old", "after {stores} stores");
            stores += 1;
        }
        assert!(stores > 3, "only {stores} stores");
    }

    #[test]
    fn payload_that_is_torn_at_any_byte_is_none() {
        let (old, new) = (b"the old payload", b"the new payload");
        for bytes in 0..new.len() {
            let mut image = Image::create(old).unwrap();
            image.write(new).unwrap();
            let slot = HEAD_BYTES + PAYLOAD_AT;
            spoil(&image, slot + bytes, new[bytes] ^ 0x40);
            assert_eq!(left_by(&image).unwrap(), old, "byte {bytes}");
        }
    }

    #[test]
    fn newest_is_read_whichever_slot_it_is_in_and_the_successor_goes_on() {
        let mut image = Image::create(b"0").unwrap();
        for round in 1..10 {
            let payload = vec![round; usize::from(round) * 100];
            image.write(&payload).unwrap();
            let (next, found) = Image::open(Arc::clone(&image.file)).unwrap();
            assert_eq!(found, payload);
            image = next;
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let fresh = || Image::create(b"payload").unwrap();
        let image = fresh();
        spoil(&image, MAGIC_AT, 0);
        assert!(matches!(left_by(&image), Err(ImageError::Magic(_))));
        let image = fresh();
        spoil(&image, VERSION_AT, 2);
        assert!(matches!(left_by(&image), Err(ImageError::Version { found: 2 })));
        let image = fresh();
        spoil(&image, HEAD_BYTES + SLOT_BYTES + LENGTH_AT + 3, 0xff);
        assert!(matches!(left_by(&image), Err(ImageError::Torn)));
        let short = crate::memory::guest_file(4096);
        assert!(matches!(
            Image::open(Arc::new(short)),
            Err(ImageError::Map(MapError::ShortFile { .. }))
        ));
        let unsealed = crate::memory::guest_file(IMAGE_BYTES as u64);
        assert!(matches!(Image::open(Arc::new(unsealed)), Err(ImageError::Seals(_))));
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Image::open(Arc::new(socket.into())), Err(ImageError::Map(_))));
    }

    #[test]
    fn payload_beyond_the_limit_is_refused_and_the_last_one_stays() {
        let mut image = Image::create(b"payload").unwrap();
        image.write(&vec![1; MAX_PAYLOAD_BYTES]).unwrap();
        let refused = image.write(&vec![2; MAX_PAYLOAD_BYTES + 1]);
        assert!(matches!(refused, Err(ImageError::TooLong { .. })));
        assert_eq!(left_by(&image).unwrap(), vec![1; MAX_PAYLOAD_BYTES]);
    }

    #[test]
    fn device_s_state_is_written_beside_the_session_s() {
        let mut image = Image::create(b"session").unwrap();
        assert_eq!(image.state().read(), None);
        for round in 1..5 {
            image.state().write(&[round; 100]).unwrap();
            let (next, session) = Image::open(Arc::clone(&image.file)).unwrap();
            assert_eq!(
                (next.state().read(), &session[..]),
                (Some(vec![round; 100]), &b"session"[..])
            );
            image = next;
        }
        let refused = image.state().write(&vec![1; MAX_STATE_BYTES + 1]);
        assert!(matches!(refused, Err(ImageError::TooLong { .. })));
    }

    #[test]
    fn marks_are_what_the_last_process_left() {
        let image = Image::create(b"payload").unwrap();
        image.set_busy(true);
        image.set_attempts(3);
        let (next, _) = Image::open(Arc::clone(&image.file)).unwrap();
        assert_eq!((next.is_busy(), next.attempts()), (true, 3));
        image.set_busy(false);
        assert!(!next.is_busy());
    }
}
