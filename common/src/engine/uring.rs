//! The io_uring engine: one ring a worker, one system call a turn.
//!
//! Contract: buffers of a submitted operation must stay valid until its completion has been
//! returned; [`crate::virtqueue`]'s slots keep guest memory mapped for exactly that long. The lists
//! of buffers themselves are copied into an arena that lives until the kernel has consumed the
//! submission.

#![allow(unsafe_code, reason = "submission entries carry addresses that the kernel will use")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::event::{Event, Subject, Wait};
use super::op::{FileIndex, Op, Token, zeros};
use super::{ChannelIndex, Channels, Engine, Readiness, Unavailable};
use crate::memory::HostBuffer;
use crate::sandbox::Call;
use crate::virtqueue::{Buffers, MAX_CHAIN_DESCRIPTORS};
use rustix::io::Errno;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

/// Submissions of one turn; a turn with more makes one more system call.
const SUBMISSIONS: u32 = 256;
/// Completions that the kernel keeps room for; beyond it, it allocates (`IORING_FEAT_NODROP`).
const COMPLETIONS: u32 = 2048;
/// Buffers of one turn's vectored operations: room for several chains of the longest kind.
const ARENA_BUFFERS: usize = 4 * MAX_CHAIN_DESCRIPTORS as usize;

/// Times that a kernel short of memory is asked again to take submissions, before it is given up.
const FLUSH_TRIES: u32 = 1000;
/// `io_uring_enter(2)`: look for completions.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// The operations that this engine uses beside those of [`Op`]: calls are written, kicks and channels are polled.
const OWN_OPERATIONS: [(&str, u8); 3] = [
    ("WRITE", opcode::Write::CODE),
    ("POLL_ADD", opcode::PollAdd::CODE),
    ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
];

/// The system calls of a worker with this engine, once that is set up.
pub(super) const CALLS: &[Call] = &[Call::any(libc::SYS_io_uring_enter)];

/// All operations that a ring is ever given.
fn operations() -> impl Iterator<Item = (&'static str, u8)> {
    let of_ops = Op::KERNEL.iter().flat_map(|kernel| kernel.opcodes);
    of_ops.chain(&OWN_OPERATIONS).copied()
}

/// An io_uring and the files that operations name.
pub(crate) struct Uring {
    ring: IoUring,
    files: Vec<RawFd>,
    /// Whether the kernel holds `files` itself, so that an operation needs no look-up.
    registered: bool,
    /// Buffer lists of operations that the kernel has not consumed yet. Never grows past its
    /// capacity: the kernel has its address.
    arena: Vec<HostBuffer>,
    channels: Channels,
}

impl Uring {
    /// Sets a ring up for the calling thread, the only one that may use it.
    ///
    /// # Errors
    /// io_uring is disabled or missing.
    pub(crate) fn new(files: Vec<RawFd>, channels: Channels) -> Result<Self, Unavailable> {
        Self::with(set_up()?, files, channels)
    }

    /// Takes a ring over that is yet disabled, and restricts it for good: seccomp does not see what is in a ring. No other
    /// files, buffers or rights can be registered from then on.
    fn with(ring: IoUring, files: Vec<RawFd>, channels: Channels) -> Result<Self, Unavailable> {
        // A file that cannot be registered is looked up at each operation instead.
        let registered = !files.is_empty() && ring.submitter().register_files(&files).is_ok();
        let mut restrictions: Vec<_> =
            operations().map(|(_, code)| Restriction::sqe_op(code)).collect();
        restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()));
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        let arena = Vec::with_capacity(ARENA_BUFFERS);
        Ok(Self { ring, files, registered, arena, channels })
    }

    /// Tries whether this host has an io_uring that does all that is asked of it here.
    ///
    /// # Errors
    /// It has not.
    pub(crate) fn probe() -> Result<(), Unavailable> {
        let ring = set_up()?;
        // What a watch that goes on needs came with this mark of Linux 5.13.
        if !ring.params().is_feature_resource_tagging() {
            return Err(Unavailable::Old);
        }
        let mut known = Probe::new();
        ring.submitter().register_probe(&mut known)?;
        let lacking = operations().find(|(_, code)| !known.is_supported(*code));
        if let Some((name, _)) = lacking {
            return Err(Unavailable::Lacking(name));
        }
        let mut uring = Self::with(ring, Vec::new(), Channels::default())?;
        // A filter may let a ring be made and not be used. There is nothing to call off, which is an answer, too.
        uring.call_off(Subject::Mail)?;
        match uring.enter(1) {
            // A signal has come in between.
            Err(error) if !is_passing(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// `submit_and_wait` that also asks for completions when it need not wait: with deferred task
    /// running the kernel posts none otherwise, and a busy ring would never see its own.
    fn enter(&mut self, want: usize) -> io::Result<usize> {
        let queued = self.ring.submission().len() as u32;
        // SAFETY: no argument follows the flags, as `None` and the flags say alike.
        unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(
                queued,
                want as u32,
                IORING_ENTER_GETEVENTS,
                None,
            )
        }
    }

    /// Copies a buffer list to where the kernel may read it; its address and length.
    fn list(&mut self, buffers: Buffers<'_>) -> io::Result<(usize, u32)> {
        let count = buffers.iter().count();
        self.reserve(count)?;
        let start = self.arena.len();
        self.arena.extend(buffers.iter());
        Ok((self.arena.as_ptr().wrapping_add(start) as usize, count as u32))
    }

    /// A list of `len_bytes` zeros, or as many as go into one operation.
    fn zeros(&mut self, len_bytes: u64) -> io::Result<(usize, u32)> {
        self.reserve(usize::from(MAX_CHAIN_DESCRIPTORS))?;
        let start = self.arena.len();
        self.arena.extend(zeros(len_bytes));
        let count = (self.arena.len() - start) as u32;
        Ok((self.arena.as_ptr().wrapping_add(start) as usize, count))
    }

    /// Makes room for `count` buffers in the arena, which must not move.
    fn reserve(&mut self, count: usize) -> io::Result<()> {
        if self.arena.len() + count > self.arena.capacity() {
            self.flush()?;
        }
        assert!(count <= self.arena.capacity(), "a chain has at most {MAX_CHAIN_DESCRIPTORS}");
        Ok(())
    }

    fn entry(&self, file: FileIndex, build: impl FnOnce(Target) -> squeue::Entry) -> squeue::Entry {
        if self.registered {
            build(Target::Fixed(types::Fixed(file.0)))
        } else {
            build(Target::Fd(types::Fd(self.files[file.0 as usize])))
        }
    }

    fn push(&mut self, subject: Subject, entry: squeue::Entry) -> io::Result<()> {
        let entry = entry.user_data(subject.encode());
        if self.ring.submission().is_full() {
            self.flush()?;
        }
        // SAFETY: the entry's buffers are guest memory that a slot keeps mapped until the
        // completion, and a list in `arena`, which is cleared only once submissions are consumed.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(io::Error::other)
    }

    /// Makes room: the kernel consumes all submissions, and with them the arena's lists.
    fn flush(&mut self) -> io::Result<()> {
        let mut tries = 0;
        while !self.ring.submission().is_empty() {
            // Asking for completions as well lets a kernel that is short of room or memory go on.
            match self.enter(0) {
                Ok(_) => {}
                Err(error) if is_passing(&error) && tries < FLUSH_TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
        self.arena.clear();
        Ok(())
    }
}

impl Engine for Uring {
    fn submit(&mut self, queue: u16, token: Token, op: Op<'_>) -> io::Result<()> {
        // Room first: making it later would clear the arena under a list that is not pushed yet.
        if self.ring.submission().is_full() {
            self.flush()?;
        }
        let entry = match op {
            Op::Read { file, offset, into } => {
                let (address, count) = self.list(into)?;
                match (into.iter().next(), count) {
                    (Some(only), 1) => self.entry(file, |fd| {
                        let len = u32::try_from(only.len()).unwrap_or(u32::MAX);
                        read(fd, only.address() as *mut u8, len, offset)
                    }),
                    _ => self.entry(file, |fd| readv(fd, address, count, offset)),
                }
            }
            Op::Write { file, offset, from, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let (address, count) = self.list(from)?;
                self.entry(file, |fd| writev(fd, address, count, (offset, flags)))
            }
            Op::Sync { file } => self.entry(file, fdatasync),
            Op::Zero { file, offset, len_bytes, zeroing } => match zeroing.fallocate_mode() {
                Some(mode) => self.entry(file, |fd| fallocate(fd, offset, len_bytes, mode)),
                None => {
                    let (address, count) = self.zeros(len_bytes)?;
                    self.entry(file, |fd| writev(fd, address, count, (offset, 0)))
                }
            },
        };
        self.push(Subject::Operation { queue, token }, entry)
    }

    fn receive(&mut self, channel: ChannelIndex, into: &[HostBuffer]) -> Result<usize, Errno> {
        self.channels.receive(channel, into)
    }

    fn send_to(&mut self, channel: ChannelIndex, from: &[HostBuffer]) -> Result<usize, Errno> {
        self.channels.send(channel, from)
    }

    fn await_channel(
        &mut self,
        queue: u16,
        channel: ChannelIndex,
        readiness: Readiness,
    ) -> io::Result<()> {
        let fd = types::Fd(self.channels.descriptor(channel));
        let poll = opcode::PollAdd::new(fd, readiness.poll_bits()).build();
        self.push(Subject::Channel { queue }, poll)
    }

    fn watch(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32)
            .multi(true)
            .build();
        self.push(subject, poll)
    }

    fn signal(&mut self, subject: Subject, fd: &OwnedFd) -> io::Result<()> {
        static ONE: u64 = 1;
        let fd = types::Fd(fd.as_raw_fd());
        let entry = opcode::Write::new(fd, (&raw const ONE).cast(), 8).offset(u64::MAX);
        self.push(subject, entry.build())
    }

    fn call_off(&mut self, what: Subject) -> io::Result<()> {
        // For a watch this is not a poll removal, which gives up more often.
        let own = Subject::CalledOff { queue: what.queue() };
        self.push(own, opcode::AsyncCancel::new(what.encode()).build())
    }

    fn has_events(&mut self) -> bool {
        if !self.ring.completion().is_empty() {
            return true;
        }
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    fn send(&mut self) -> io::Result<()> {
        self.flush()
    }

    fn turn(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        let want = usize::from(wait != Wait::No && self.ring.completion().is_empty());
        let entered = match wait {
            Wait::AtMost(limit) => {
                let limit = types::Timespec::from(limit);
                let arguments = types::SubmitArgs::new().timespec(&limit);
                self.ring.submitter().submit_with_args(want, &arguments)
            }
            Wait::No | Wait::Forever => self.enter(want),
        };
        match entered {
            Ok(_) => {}
            // Look at what there is; what was not submitted is the next time.
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        if self.ring.submission().is_empty() {
            self.arena.clear();
        }
        events.extend(self.ring.completion().map(|entry| Event {
            subject: Subject::decode(entry.user_data()),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        }));
        Ok(())
    }
}

/// Whether a system call may go through the next time: interrupted, timed out, or short of memory
/// or of room for completions.
fn is_passing(error: &io::Error) -> bool {
    let passing = [libc::EINTR, libc::ETIME, libc::EBUSY, libc::EAGAIN];
    error.raw_os_error().is_some_and(|errno| passing.contains(&errno))
}

/// Sets up a ring with what this kernel offers: first with completions delivered only when the
/// thread asks (6.1), then with fewer interruptions (5.19), then plain. It is disabled until it is restricted.
fn set_up() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_cqsize(COMPLETIONS).setup_r_disabled();
    let attempts = [
        builder.clone().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().clone(),
        builder.clone().setup_coop_taskrun().setup_taskrun_flag().clone(),
        builder,
    ];
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for attempt in attempts {
        match attempt.build(SUBMISSIONS) {
            Ok(ring) => return Ok(ring),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A file as the kernel knows it: registered, or by descriptor.
#[derive(Clone, Copy)]
enum Target {
    Fixed(types::Fixed),
    Fd(types::Fd),
}

fn read(target: Target, into: *mut u8, len: u32, offset: u64) -> squeue::Entry {
    match target {
        Target::Fixed(file) => opcode::Read::new(file, into, len).offset(offset).build(),
        Target::Fd(file) => opcode::Read::new(file, into, len).offset(offset).build(),
    }
}

fn readv(target: Target, list: usize, count: u32, offset: u64) -> squeue::Entry {
    let list = list as *const libc::iovec;
    match target {
        Target::Fixed(file) => opcode::Readv::new(file, list, count).offset(offset).build(),
        Target::Fd(file) => opcode::Readv::new(file, list, count).offset(offset).build(),
    }
}

fn writev(target: Target, list: usize, count: u32, place: (u64, i32)) -> squeue::Entry {
    let (list, (offset, flags)) = (list as *const libc::iovec, place);
    match target {
        Target::Fixed(file) => {
            opcode::Writev::new(file, list, count).offset(offset).rw_flags(flags).build()
        }
        Target::Fd(file) => {
            opcode::Writev::new(file, list, count).offset(offset).rw_flags(flags).build()
        }
    }
}

fn fdatasync(target: Target) -> squeue::Entry {
    let data = types::FsyncFlags::DATASYNC;
    match target {
        Target::Fixed(file) => opcode::Fsync::new(file).flags(data).build(),
        Target::Fd(file) => opcode::Fsync::new(file).flags(data).build(),
    }
}

fn fallocate(target: Target, offset: u64, len: u64, mode: i32) -> squeue::Entry {
    match target {
        Target::Fixed(file) => opcode::Fallocate::new(file, len).offset(offset).mode(mode).build(),
        Target::Fd(file) => opcode::Fallocate::new(file, len).offset(offset).mode(mode).build(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use io_uring::opcode;
    use rustix::io::Errno;

    use super::{SUBMISSIONS, Uring};
    use crate::engine::tests::{PIECE, engines, guest};
    use crate::engine::{Channels, Engine, EngineKind, FileIndex, Op, Subject, Token, Wait};
    use crate::virtqueue::Buffers;

    const FILE: FileIndex = FileIndex(0);

    #[test]
    fn ring_executes_no_other_operation_and_takes_no_other_files() {
        if !engines().contains(&EngineKind::IoUring) {
            return;
        }
        let mut engine = Uring::new(Vec::new(), Channels::default()).unwrap();
        engine.push(Subject::Mail, opcode::Nop::new().build()).unwrap();
        let mut events = Vec::new();
        while events.is_empty() {
            engine.turn(Wait::Forever, &mut events).unwrap();
        }
        assert_eq!(events[0].outcome(), Err(Errno::ACCESS));
        let refused = engine.ring.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn lists_survive_a_turn_with_more_operations_than_the_ring_has_room_for() {
        if !engines().contains(&EngineKind::IoUring) {
            return;
        }
        let file = tempfile::tempfile().unwrap();
        let mut engine = Uring::new(vec![file.as_raw_fd()], Channels::default()).unwrap();
        let (_map, buffers) = guest(8);
        for step in 0..SUBMISSIONS as u16 {
            engine.submit(0, Token { slot: 0, step }, Op::Sync { file: FILE }).unwrap();
        }
        // Two lists of two buffers each: were the first one's place given up, the second would
        // take it.
        for (slot, pair) in buffers[..4].chunks(2).enumerate() {
            let from = Buffers::new(pair);
            let offset = (slot * 2 * PIECE) as u64;
            let op = Op::Write { file: FILE, offset, from, durable: false };
            engine.submit(0, Token { slot: 1, step: slot as u16 }, op).unwrap();
        }
        let mut events = Vec::new();
        while events.len() < SUBMISSIONS as usize + 2 {
            engine.turn(Wait::Forever, &mut events).unwrap();
        }
        assert!(events.iter().all(|event| event.outcome().is_ok()), "{events:?}");
        for number in 0..4u8 {
            let mut piece = [0xee; PIECE];
            file.read_exact_at(&mut piece, u64::from(number) * PIECE as u64).unwrap();
            assert_eq!(piece, [number; PIECE]);
        }
    }
}
