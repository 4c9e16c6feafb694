//! A disk image on the host: a sparse file, the pattern that both sides know, and its checksum.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use guest::pattern;

/// A raw image file.
#[derive(Debug)]
pub struct DiskImage {
    path: PathBuf,
}

impl DiskImage {
    /// A sparse image of this size that reads as zeroes.
    ///
    /// # Panics
    /// If the file cannot be made.
    pub fn sparse(path: &Path, len_bytes: u64) -> Self {
        let file = File::create_new(path)
            .unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
        file.set_len(len_bytes)
            .unwrap_or_else(|error| panic!("cannot extend {}: {error}", path.display()));
        Self { path: path.to_owned() }
    }

    /// An image of this size that is full of the pattern of `seed`.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn patterned(path: &Path, len_bytes: u64, seed: u64) -> Self {
        let image = Self::sparse(path, len_bytes);
        let mut file = File::options().write(true).open(path).expect("the file was just made");
        pattern::write(&mut file, seed, len_bytes)
            .unwrap_or_else(|error| panic!("cannot fill {}: {error}", path.display()));
        image
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How much of the host's storage the file takes.
    ///
    /// # Panics
    /// If the file cannot be examined.
    pub fn allocated_bytes(&self) -> u64 {
        // `st_blocks` counts 512 bytes whatever the file system's block size is.
        self.path.metadata().expect("the file is ours").blocks() * 512
    }

    /// The SHA-256 of the whole image, in hexadecimal: what the guest's checks print for the disk.
    ///
    /// # Panics
    /// If the file cannot be read.
    pub fn checksum(&self) -> String {
        let read = File::open(&self.path).and_then(|mut file| pattern::checksum(&mut file));
        read.unwrap_or_else(|error| panic!("cannot read {}: {error}", self.path.display()))
    }
}
