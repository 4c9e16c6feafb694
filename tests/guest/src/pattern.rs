//! A disk's content that both sides can make from a seed, in which every 8 bytes differ: data that lands at a wrong offset
//! or in a wrong order changes the checksum.

use std::fmt::Write as _;
use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// Bytes that are written or read at once: more than a request's largest segment, so that requests are as large as they get.
const STEP_BYTES: usize = 1 << 20;

/// Writes `len_bytes` of the pattern of `seed`, from its beginning.
///
/// # Errors
/// Those of the writer.
pub fn write(to: &mut impl Write, seed: u64, len_bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut offset = 0;
    while offset < len_bytes {
        let step = usize::try_from(len_bytes - offset).unwrap_or(STEP_BYTES).min(STEP_BYTES);
        let part = &mut buffer[..step];
        fill(part, seed, offset);
        to.write_all(part)?;
        offset += step as u64;
    }
    Ok(())
}

/// Fills `buffer` with what the pattern of `seed` has at `offset_bytes`, a multiple of 8.
pub fn fill(buffer: &mut [u8], seed: u64, offset_bytes: u64) {
    for (index, word) in (offset_bytes / 8..).zip(buffer.chunks_mut(8)) {
        let value = mix(seed, index).to_le_bytes();
        word.copy_from_slice(&value[..word.len()]);
    }
}

/// The SHA-256 of everything that `from` has, in hexadecimal.
///
/// # Errors
/// Those of the reader.
pub fn checksum(from: &mut impl Read) -> io::Result<String> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut hash = Sha256::new();
    loop {
        match from.read(&mut buffer)? {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    }))
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(seed: u64, index: u64) -> u64 {
    let mut value = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::{STEP_BYTES, checksum, fill, write};

    #[test]
    fn a_part_is_the_same_however_it_is_reached() {
        let len = STEP_BYTES + 4096;
        let mut whole = Vec::new();
        write(&mut whole, 7, len as u64).expect("a vector takes all");
        let mut part = vec![0; 4096];
        fill(&mut part, 7, STEP_BYTES as u64);
        assert_eq!(part, whole[STEP_BYTES..]);
    }

    #[test]
    fn swapped_sectors_change_the_checksum() {
        let mut disk = Vec::new();
        write(&mut disk, 7, 1024).expect("a vector takes all");
        let before = checksum(&mut disk.as_slice()).expect("a slice can be read");
        disk.rotate_left(512);
        assert_ne!(before, checksum(&mut disk.as_slice()).expect("a slice can be read"));
    }
}
