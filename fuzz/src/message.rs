//! One message, as a front end would send it: whether it is accepted for what it is, or refused.
//!
//! Input: the header (12 bytes), the number of descriptors (1 byte), the payload. The payload is as long as the header
//! says, whatever the input's length is.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};

use common::memory::RegionSpec;
use common::protocol::table::{FdCount, MAX_FDS, row};
use common::protocol::{MAX_PAYLOAD_BYTES, Message, Payload, parse};

/// More descriptors than any message may have.
const FDS_LIMIT: usize = MAX_FDS + 3;
/// The payload of a request that has an index and no descriptor.
const NO_FD: u64 = 1 << 8;

thread_local! {
    /// What every descriptor of this target refers to.
    static FILE: OwnedFd = std::fs::File::open("/dev/null").expect("a file").into();
}

/// Parses one message.
pub fn run(data: &[u8]) {
    let Some((header, rest)) = data.split_first_chunk() else { return };
    let Some((&fds, payload)) = rest.split_first() else { return };
    let fds = descriptors(usize::from(fds) % FDS_LIMIT);
    match parse(*header, payload, fds) {
        Ok(Some(message)) => check(&message, payload),
        Ok(None) => unreachable!("a whole message is one"),
        Err(error) => {
            // What the log would say.
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            assert!(!(error.to_string() + &source).is_empty());
        }
    }
}

pub(crate) fn descriptors(count: usize) -> Vec<OwnedFd> {
    FILE.with(|file| {
        let duplicate = |_| file.as_fd().try_clone_to_owned().expect("a descriptor");
        (0..count).map(duplicate).collect()
    })
}

/// Compares an accepted message with the payload that it was made of.
fn check(message: &Message, sent: &[u8]) {
    let row = row(message.request);
    let fds = message.fds.len();
    let due = match (row.fds, &message.payload) {
        (FdCount::Exactly(count), _) => fds == count,
        (FdCount::UpTo(count), _) => fds <= count,
        (FdCount::OnePerRegion, Payload::MemoryTable(regions)) => fds == regions.len(),
        (FdCount::UnlessNoFd, Payload::VringFd { no_fd, .. }) => fds == usize::from(!no_fd),
        (FdCount::OnePerRegion | FdCount::UnlessNoFd, _) => false,
    };
    assert!(due, "{} came with {fds} descriptors: {:?}", message.request, message.payload);
    let mut padded = vec![0; MAX_PAYLOAD_BYTES];
    let len = sent.len().min(padded.len());
    padded[..len].copy_from_slice(&sent[..len]);
    let (from, bytes, mask) = written(&message.payload);
    for (at, byte) in bytes.iter().enumerate() {
        let mask = mask.get(at).copied().unwrap_or(0xff);
        assert_eq!(padded[from + at] & mask, byte & mask, "byte {at} of {:?}", message.payload);
    }
}

/// What a payload looks like on the socket: where its fields begin, their bytes, and which bits of them count (all,
/// where the mask has ended).
fn written(payload: &Payload) -> (usize, Vec<u8>, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut mask = Vec::new();
    let mut from = 0;
    let u16 = |bytes: &mut Vec<u8>, number: u16| bytes.extend(number.to_ne_bytes());
    let u32 = |bytes: &mut Vec<u8>, number: u32| bytes.extend(number.to_ne_bytes());
    let u64 = |bytes: &mut Vec<u8>, number: u64| bytes.extend(number.to_ne_bytes());
    let region = |bytes: &mut Vec<u8>, spec: &RegionSpec| {
        let fields = [spec.guest.0, spec.len_bytes, spec.frontend.0, spec.file_offset_bytes];
        fields.iter().for_each(|field| u64(bytes, *field));
    };
    match payload {
        Payload::Empty | Payload::Unparsed => {}
        Payload::U64(number) => u64(&mut bytes, *number),
        Payload::VringState { index, num } => {
            [index, num].into_iter().for_each(|field| u32(&mut bytes, *field));
        }
        Payload::VringAddress { index, flags, descriptor, used, available, log } => {
            [index, flags].into_iter().for_each(|field| u32(&mut bytes, *field));
            let fields = [descriptor.0, used.0, available.0, *log];
            fields.iter().for_each(|field| u64(&mut bytes, *field));
        }
        Payload::VringFd { index, no_fd } => {
            u64(&mut bytes, u64::from(*index) | if *no_fd { NO_FD } else { 0 });
            // vhost-user, "VHOST_USER_SET_VRING_KICK": bits 0 to 8 mean something.
            mask = 0x1ffu64.to_ne_bytes().to_vec();
        }
        Payload::MemoryTable(regions) => {
            u32(&mut bytes, regions.len() as u32);
            // Four bytes of padding.
            bytes.extend([0; 4]);
            mask = [vec![0xff; 4], vec![0; 4]].concat();
            regions.iter().for_each(|spec| region(&mut bytes, spec));
        }
        Payload::MemoryRegion(spec) => {
            from = 8;
            region(&mut bytes, spec);
        }
        Payload::Config { offset, flags, data } => {
            let fields = [*offset, data.len() as u32, *flags];
            fields.iter().for_each(|field| u32(&mut bytes, *field));
            bytes.extend(data);
        }
        Payload::Inflight { mmap_size, mmap_offset, num_queues, queue_size } => {
            [mmap_size, mmap_offset].into_iter().for_each(|field| u64(&mut bytes, *field));
            [num_queues, queue_size].into_iter().for_each(|field| u16(&mut bytes, *field));
        }
    }
    (from, bytes, mask)
}
