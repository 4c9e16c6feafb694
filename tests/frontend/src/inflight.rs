//! The region in which a back end records its requests in flight (vhost-user, "Inflight I/O tracking", split virtqueues), as a
//! front end keeps it, and as a test reads and writes it in a back end's place.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::Error;
use crate::front_end::FrontEnd;
use crate::message::{VHOST_USER_GET_INFLIGHT_FD, VHOST_USER_SET_INFLIGHT_FD};

/// Bytes before the states, and of each of them.
const HEADER_BYTES: u64 = 16;
const STATE_BYTES: u64 = 16;
const LAST_BATCH_HEAD: u64 = 12;
const USED_INDEX: u64 = 14;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

/// What a back end says of its region, and what a front end says back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Description {
    /// Bytes of it.
    pub mmap_size: u64,
    /// Where it begins in its file.
    pub mmap_offset: u64,
    /// Queues that it is for.
    pub num_queues: u16,
    /// Entries of each.
    pub queue_size: u16,
}

impl Description {
    /// As a C structure, whose padding is part of the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.mmap_size.to_ne_bytes().to_vec();
        bytes.extend(self.mmap_offset.to_ne_bytes());
        bytes.extend([self.num_queues, self.queue_size, 0, 0].map(u16::to_ne_bytes).concat());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (mmap_size, rest) = bytes.split_first_chunk()?;
        let (mmap_offset, rest) = rest.split_first_chunk()?;
        let (num_queues, rest) = rest.split_first_chunk()?;
        let (queue_size, padding) = rest.split_first_chunk()?;
        (padding.len() == 4).then_some(Self {
            mmap_size: u64::from_ne_bytes(*mmap_size),
            mmap_offset: u64::from_ne_bytes(*mmap_offset),
            num_queues: u16::from_ne_bytes(*num_queues),
            queue_size: u16::from_ne_bytes(*queue_size),
        })
    }
}

/// A region.
#[derive(Debug)]
pub struct Inflight {
    /// What its back end said of it.
    pub description: Description,
    /// Its file.
    pub file: File,
}

impl Inflight {
    /// Heads that are recorded to be in flight in the region of a queue.
    ///
    /// # Panics
    /// If the file is too short.
    #[must_use]
    pub fn heads(&self, queue: u16) -> Vec<u16> {
        let is_in_flight = |head: &u16| self.read(queue, state(*head), 1) == [1];
        (0..self.description.queue_size).filter(is_in_flight).collect()
    }

    /// Records that a head is in flight, or is not, and its place in the order.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn set(&self, queue: u16, head: u16, in_flight: bool, counter: u64) {
        self.write(queue, state(head) + COUNTER, &counter.to_ne_bytes());
        self.write(queue, state(head), &[u8::from(in_flight)]);
    }

    /// Records what the last batch of used heads was, the newest first, and the used index before it was shown.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn set_batch(&self, queue: u16, heads: &[u16], used_index: u16) {
        for pair in heads.windows(2) {
            self.write(queue, state(pair[0]) + NEXT, &pair[1].to_ne_bytes());
        }
        let newest = heads.first().copied().unwrap_or(0);
        self.write(queue, LAST_BATCH_HEAD, &newest.to_ne_bytes());
        self.write(queue, USED_INDEX, &used_index.to_ne_bytes());
    }

    fn read(&self, queue: u16, at: u64, size_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; size_bytes];
        let at = self.queue_offset(queue) + at;
        self.file.read_exact_at(&mut bytes, at).expect("the region is in its file");
        bytes
    }

    fn write(&self, queue: u16, at: u64, bytes: &[u8]) {
        let at = self.queue_offset(queue) + at;
        self.file.write_all_at(bytes, at).expect("the region can be written");
    }

    /// The text does not say how large a queue's region is, beyond what it has to hold: all have the same.
    fn queue_offset(&self, queue: u16) -> u64 {
        let Description { mmap_size, mmap_offset, num_queues, .. } = self.description;
        mmap_offset + mmap_size / u64::from(num_queues) * u64::from(queue)
    }
}

fn state(head: u16) -> u64 {
    HEADER_BYTES + STATE_BYTES * u64::from(head)
}

impl FrontEnd {
    /// Has the back end make a region.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`], and [`Error::WrongReply`] for one without a description or a file.
    pub fn get_inflight_fd(&self, num_queues: u16, queue_size: u16) -> Result<Inflight, Error> {
        let wanted = Description { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
        let mut reply = self.ask(VHOST_USER_GET_INFLIGHT_FD, &wanted.encode(), &[])?;
        let wrong = Error::WrongReply {
            request: VHOST_USER_GET_INFLIGHT_FD,
            answered: reply.request,
            flags: reply.flags,
            size_bytes: reply.payload.len(),
        };
        match (Description::decode(&reply.payload), reply.fds.pop()) {
            (Some(description), Some(file)) if reply.fds.is_empty() => {
                Ok(Inflight { description, file: file.into() })
            }
            _ => Err(wrong),
        }
    }

    /// Gives a back end the region of its predecessor, or its own.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_inflight_fd(&self, inflight: &Inflight) -> Result<(), Error> {
        let description = inflight.description.encode();
        self.tell(VHOST_USER_SET_INFLIGHT_FD, &description, &[inflight.file.as_fd()])
    }
}
