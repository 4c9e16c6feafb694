//! What [`Engine`] promises, asked of each engine.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::{
    ChannelIndex, Channels, Engine, EngineKind, Event, FileIndex, Op, Readiness, Subject, Token,
    Wait, Zeroing,
};
use crate::memory::{FrontendAddress, GuestAddress, HostBuffer, MemoryMap, Region, RegionSpec};
use crate::sandbox::{self, Needs, Sandbox};
use crate::virtqueue::{Buffers, MAX_CHAIN_DESCRIPTORS};

const FILE: FileIndex = FileIndex(0);
const KICK: Subject = Subject::Kick { queue: 3 };
/// A test that waits that long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// The engines that this host has.
pub(crate) fn engines() -> Vec<EngineKind> {
    match EngineKind::probe_io_uring() {
        Ok(()) => vec![EngineKind::IoUring, EngineKind::Threads],
        Err(cause) => {
            let all = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
            assert!(!all, "REQUIRE_ALL=1, but there is no io_uring: {cause}");
            eprintln!("not run with io_uring: {cause}");
            vec![EngineKind::Threads]
        }
    }
}

/// Length of a piece of [`guest`]'s memory.
pub(super) const PIECE: usize = 512;

/// Guest memory of which each piece is filled with its own number.
pub(super) fn guest(pieces: u16) -> (Arc<MemoryMap>, Vec<HostBuffer>) {
    let len_bytes = 0x10_0000;
    let file = crate::memory::guest_file(len_bytes);
    let spec = RegionSpec {
        guest: GuestAddress(0),
        frontend: FrontendAddress(0),
        len_bytes,
        file_offset_bytes: 0,
    };
    let region = Arc::new(Region::map(spec, file.as_fd()).unwrap());
    let map = Arc::new(MemoryMap::new(vec![region]).unwrap());
    let all = map.resolve_frontend(FrontendAddress(0), len_bytes).unwrap();
    let buffers: Vec<HostBuffer> =
        (0..pieces).map(|piece| all.slice(usize::from(piece) * PIECE, PIECE)).collect();
    for (number, buffer) in (0..pieces).zip(&buffers) {
        buffer.write(0, &[number as u8; PIECE]);
    }
    (map, buffers)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn kick(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

/// The events up to the `count`th.
fn events(engine: &mut dyn Engine, count: usize) -> Vec<Event> {
    let deadline = Instant::now() + PATIENCE;
    let mut events = Vec::new();
    while events.len() < count {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "{count} events do not come, but {events:?}");
        engine.turn(Wait::AtMost(left), &mut events).unwrap();
    }
    assert_eq!(events.len(), count, "{events:?}");
    // A sleep that nobody ends finds what it missed.
    assert!(Instant::now() < deadline, "nobody wakes the worker");
    events
}

/// Performs one operation.
fn perform(engine: &mut dyn Engine, op: Op<'_>) -> Result<u32, Errno> {
    let token = Token { slot: 7, step: 1 };
    engine.submit(2, token, op).unwrap();
    let ended = events(engine, 1)[0];
    assert_eq!(ended.subject, Subject::Operation { queue: 2, token });
    assert!(!ended.more);
    ended.outcome()
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn operations_do_what_they_say() {
    for kind in engines() {
        let file = tempfile::tempfile().unwrap();
        let mut engine = kind.open(vec![file.as_raw_fd()], Channels::default()).unwrap();
        let (_map, memory) = guest(8);
        for (durable, offset) in [(false, 0), (true, 2 * PIECE as u64)] {
            let from = Buffers::new(&memory[1..3]);
            let op = Op::Write { file: FILE, offset, from, durable };
            assert_eq!(perform(&mut *engine, op), Ok(2 * PIECE as u32), "{kind:?}");
        }
        assert_eq!(perform(&mut *engine, Op::Sync { file: FILE }), Ok(0), "{kind:?}");
        let piece = |number: u8| [number; PIECE];
        assert_eq!(bytes(&file), [piece(1), piece(2), piece(1), piece(2)].concat(), "{kind:?}");
        // One buffer, and the part of several that the file has.
        let into = Buffers::new(&memory[4..5]);
        let op = Op::Read { file: FILE, offset: PIECE as u64, into };
        assert_eq!(perform(&mut *engine, op), Ok(PIECE as u32), "{kind:?}");
        let into = Buffers::new(&memory[5..8]);
        let op = Op::Read { file: FILE, offset: 3 * PIECE as u64, into };
        assert_eq!(perform(&mut *engine, op), Ok(PIECE as u32), "{kind:?}");
        let mut seen = [0; 4 * PIECE];
        assert_eq!(Buffers::new(&memory[4..8]).read(&mut seen), seen.len());
        assert_eq!(seen.as_slice(), [piece(2), piece(2), piece(6), piece(7)].concat(), "{kind:?}");
    }
}

#[test]
fn every_kind_of_zeroing_leaves_zeros() {
    for kind in engines() {
        for zeroing in [Zeroing::Deallocate, Zeroing::Keep, Zeroing::Write] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[0xee; 4 * PIECE], 0).unwrap();
            let mut engine = kind.open(vec![file.as_raw_fd()], Channels::default()).unwrap();
            let (offset, len_bytes) = (PIECE as u64, 2 * PIECE as u64);
            let result = perform(&mut *engine, Op::Zero { file: FILE, offset, len_bytes, zeroing });
            if result == Err(Errno::OPNOTSUPP) {
                eprintln!("not run: the file system of temporary files cannot {zeroing:?}");
                continue;
            }
            result.unwrap();
            let expected = [[0xee; PIECE], [0; PIECE], [0; PIECE], [0xee; PIECE]].concat();
            assert_eq!(bytes(&file), expected, "{kind:?}, {zeroing:?}");
        }
    }
}

/// Tells a child which engine to try in the sandbox.
const CHILD: &str = "OUTBOARD_TEST_ENGINE_CHILD";

#[test]
fn engine_does_all_operations_in_the_sandbox() {
    if let Ok(name) = std::env::var(CHILD) {
        let kind = engines().into_iter().find(|kind| kind.name() == name).unwrap();
        return do_all_in_the_sandbox(kind);
    }
    for kind in engines() {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "engine::tests::engine_does_all_operations_in_the_sandbox"])
            .envs([(CHILD, kind.name()), ("RUST_BACKTRACE", "0")])
            .output()
            .unwrap();
        assert!(child.status.success(), "{kind:?}: {child:?}");
    }
}

fn do_all_in_the_sandbox(kind: EngineKind) {
    let file = tempfile::tempfile().unwrap();
    let (_map, memory) = guest(8);
    let (frames, _theirs) = channel();
    let kicked = event();
    sandbox::choose(Sandbox::On);
    let enter = || sandbox::enter(&Needs { calls: kind.calls(), ..Needs::default() });
    if kind.opens_in_sandbox() {
        enter();
    }
    let channels = Channels::new(vec![frames.as_raw_fd()]);
    let mut engine = kind.open(vec![file.as_raw_fd()], channels).unwrap();
    if !kind.opens_in_sandbox() {
        enter();
    }
    let (one, several) = (Buffers::new(&memory[..1]), Buffers::new(&memory[1..4]));
    let (offset, len_bytes) = (0, PIECE as u64);
    let zeroings = [Zeroing::Deallocate, Zeroing::Keep, Zeroing::Write];
    let zero = |zeroing| Op::Zero { file: FILE, offset, len_bytes, zeroing };
    let operations = [
        Op::Write { file: FILE, offset, from: several, durable: false },
        Op::Write { file: FILE, offset, from: one, durable: true },
        Op::Read { file: FILE, offset, into: one },
        Op::Read { file: FILE, offset, into: several },
        Op::Sync { file: FILE },
    ];
    for op in operations.into_iter().chain(zeroings.map(zero)) {
        let kernel = Op::KERNEL.iter().any(|row| std::ptr::eq(*row, op.kernel()));
        assert!(kernel, "the operation has a row");
        match perform(&mut *engine, op) {
            Ok(_) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => panic!("{kind:?}: {errno}"),
        }
    }
    engine.watch(KICK, &kicked).unwrap();
    engine.signal(Subject::Call { queue: 0 }, &kicked).unwrap();
    events(&mut *engine, 2);
    engine.call_off(KICK).unwrap();
    engine.await_channel(5, CHANNEL, Readiness::Writable).unwrap();
    events(&mut *engine, 3);
    assert_eq!(engine.send_to(CHANNEL, &memory), Ok(8 * PIECE));
    assert_eq!(engine.receive(CHANNEL, &memory), Err(Errno::AGAIN));
}

#[test]
fn host_error_comes_back_with_its_operation() {
    for kind in engines() {
        let null = File::open("/dev/null").unwrap();
        let mut engine = kind.open(vec![null.as_raw_fd()], Channels::default()).unwrap();
        let (_map, memory) = guest(1);
        let from = Buffers::new(&memory);
        let op = Op::Write { file: FILE, offset: 0, from, durable: false };
        assert_eq!(perform(&mut *engine, op), Err(Errno::BADF), "{kind:?}");
    }
}

#[test]
fn longest_chain_goes_in_one_operation() {
    for kind in engines() {
        let file = tempfile::tempfile().unwrap();
        let mut engine = kind.open(vec![file.as_raw_fd()], Channels::default()).unwrap();
        let (_map, memory) = guest(MAX_CHAIN_DESCRIPTORS);
        let from = Buffers::new(&memory);
        let op = Op::Write { file: FILE, offset: 0, from, durable: false };
        assert_eq!(perform(&mut *engine, op), Ok(from.len_bytes() as u32), "{kind:?}");
        let expected: Vec<u8> =
            (0..MAX_CHAIN_DESCRIPTORS).flat_map(|number| [number as u8; PIECE]).collect();
        assert!(bytes(&file) == expected, "{kind:?}");
    }
}

#[test]
fn operation_ends_while_the_worker_looks() {
    for kind in engines() {
        let file = tempfile::tempfile().unwrap();
        let mut engine = kind.open(vec![file.as_raw_fd()], Channels::default()).unwrap();
        for _ in 0..100 {
            engine.submit(0, Token { slot: 0, step: 0 }, Op::Sync { file: FILE }).unwrap();
            engine.send().unwrap();
            while !engine.has_events() {
                std::hint::spin_loop();
            }
            let mut events = Vec::new();
            while events.is_empty() {
                engine.turn(Wait::No, &mut events).unwrap();
            }
        }
    }
}

#[test]
fn worker_that_falls_asleep_while_operations_end_is_woken() {
    for kind in engines() {
        let file = tempfile::tempfile().unwrap();
        let mut engine = kind.open(vec![file.as_raw_fd()], Channels::default()).unwrap();
        for round in 0..5_000 {
            let count = 1 + round % 3;
            for step in 0..count {
                engine.submit(0, Token { slot: 0, step }, Op::Sync { file: FILE }).unwrap();
            }
            let ended = events(&mut *engine, usize::from(count));
            assert!(ended.iter().all(|event| event.outcome() == Ok(0)), "{kind:?}: {ended:?}");
        }
    }
}

#[test]
fn each_kick_is_seen_and_so_is_one_from_before_the_watch() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let fd = event();
        kick(&fd);
        engine.watch(KICK, &fd).unwrap();
        for _ in 0..10 {
            let kicked = events(&mut *engine, 1)[0];
            assert_eq!((kicked.subject, kicked.more), (KICK, true), "{kind:?}");
            assert!(kicked.outcome().unwrap() & libc::POLLIN as u32 != 0, "{kind:?}");
            let mut none = Vec::new();
            engine.turn(Wait::No, &mut none).unwrap();
            assert!(none.is_empty(), "{kind:?}: {none:?}");
            kick(&fd);
        }
    }
}

#[test]
fn kick_wakes_a_sleeping_worker() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let fd = event();
        engine.watch(KICK, &fd).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| kick(&fd));
            assert_eq!(events(&mut *engine, 1)[0].subject, KICK, "{kind:?}");
        });
    }
}

#[test]
fn kick_is_seen_in_spite_of_other_news_in_every_turn() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let fd = event();
        engine.watch(KICK, &fd).unwrap();
        kick(&fd);
        let mut events = Vec::new();
        for _ in 0..100 {
            // What is not there is told to be not there: news that need no pause.
            engine.call_off(Subject::Call { queue: 9 }).unwrap();
            engine.turn(Wait::No, &mut events).unwrap();
        }
        assert!(events.iter().any(|event| event.subject == KICK), "{kind:?}");
    }
}

#[test]
fn kick_is_seen_in_spite_of_looks_that_find_work_elsewhere() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let fd = event();
        engine.watch(KICK, &fd).unwrap();
        engine.send().unwrap();
        kick(&fd);
        // A worker that finds chains in a ring turns only when the engine says that it is worth it.
        let mut seen = Vec::new();
        for _ in 0..1_000 {
            engine.send().unwrap();
            if engine.has_events() {
                engine.turn(Wait::No, &mut seen).unwrap();
            }
        }
        assert!(seen.iter().any(|event| event.subject == KICK), "{kind:?}");
    }
}

#[test]
fn watch_that_is_called_off_has_a_last_event() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let fd = event();
        engine.watch(KICK, &fd).unwrap();
        engine.turn(Wait::No, &mut Vec::new()).unwrap();
        engine.call_off(KICK).unwrap();
        let ended = events(&mut *engine, 2);
        let of = |subject| ended.iter().find(|event| event.subject == subject).unwrap();
        let last = of(KICK);
        assert_eq!((last.outcome(), last.more), (Err(Errno::CANCELED), false), "{kind:?}");
        assert!(of(Subject::CalledOff { queue: 3 }).outcome().is_ok(), "{kind:?}");
        // The number of the descriptor may come to mean another one.
        kick(&fd);
        let other = event();
        engine.watch(KICK, &other).unwrap();
        let mut none = Vec::new();
        engine.turn(Wait::AtMost(Duration::from_millis(1)), &mut none).unwrap();
        assert!(none.is_empty(), "{kind:?}: {none:?}");
    }
}

#[test]
fn what_was_never_watched_cannot_be_called_off() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        engine.call_off(KICK).unwrap();
        let ended = events(&mut *engine, 1)[0];
        assert_eq!(ended.subject, Subject::CalledOff { queue: 3 }, "{kind:?}");
        assert_eq!(ended.outcome(), Err(Errno::NOENT), "{kind:?}");
    }
}

#[test]
fn wait_ends_in_time() {
    for kind in engines() {
        let mut engine = kind.open(Vec::new(), Channels::default()).unwrap();
        let mut none = Vec::new();
        engine.turn(Wait::AtMost(Duration::from_micros(300)), &mut none).unwrap();
        assert!(none.is_empty(), "{kind:?}: {none:?}");
    }
}

/// What can be received and sent over a pair of sockets that do not block.
fn channel() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

const CHANNEL: ChannelIndex = ChannelIndex(0);
const READY: Subject = Subject::Channel { queue: 5 };

#[test]
fn channel_is_awaited_and_its_frames_are_scattered_and_gathered() {
    for kind in engines() {
        let (ours, theirs) = channel();
        let channels = Channels::new(vec![ours.as_raw_fd()]);
        let mut engine = kind.open(Vec::new(), channels).unwrap();
        let (_map, buffers) = guest(4);
        assert_eq!(engine.receive(CHANNEL, &buffers), Err(Errno::AGAIN));
        engine.await_channel(5, CHANNEL, Readiness::Readable).unwrap();
        let mut early = Vec::new();
        engine.turn(Wait::No, &mut early).unwrap();
        assert!(early.is_empty(), "{early:?}");
        let frame = [7; PIECE + 3];
        rustix::io::write(&theirs, &frame).unwrap();
        let ready = events(&mut *engine, 1)[0];
        assert!(ready.subject == READY && !ready.more, "{ready:?}");
        assert_eq!(engine.receive(CHANNEL, &buffers[1..]), Ok(PIECE + 3));
        let mut seen = [0; 4];
        buffers[2].read(0, &mut seen);
        assert_eq!(seen, [7, 7, 7, 2]);
        assert_eq!(engine.send_to(CHANNEL, &[buffers[0], buffers[3]]), Ok(2 * PIECE));
        let mut sent = [9; 3 * PIECE];
        assert_eq!(rustix::io::read(&theirs, &mut sent), Ok(2 * PIECE));
        assert_eq!((sent[0], sent[PIECE - 1], sent[PIECE], sent[2 * PIECE]), (0, 0, 3, 9));
    }
}

#[test]
fn channel_that_is_awaited_no_more_says_so() {
    for kind in engines() {
        let (ours, _theirs) = channel();
        let mut engine = kind.open(Vec::new(), Channels::new(vec![ours.as_raw_fd()])).unwrap();
        engine.await_channel(5, CHANNEL, Readiness::Readable).unwrap();
        engine.turn(Wait::No, &mut Vec::new()).unwrap();
        engine.call_off(READY).unwrap();
        let ended = events(&mut *engine, 2);
        let mut subjects: Vec<Subject> = ended.iter().map(|event| event.subject).collect();
        subjects.sort_by_key(|subject| subject.encode());
        assert_eq!(subjects, [Subject::CalledOff { queue: 5 }, READY]);
    }
}

#[test]
fn channel_that_was_opened_anew_can_be_awaited_under_its_number() {
    for kind in engines() {
        let (mut ours, theirs) = channel();
        let mut engine = kind.open(Vec::new(), Channels::new(vec![ours.as_raw_fd()])).unwrap();
        engine.await_channel(5, CHANNEL, Readiness::Readable).unwrap();
        drop(theirs);
        assert_eq!(events(&mut *engine, 1)[0].subject, READY);
        let (others, their_end) = channel();
        rustix::io::dup3(&others, &mut ours, rustix::io::DupFlags::CLOEXEC).unwrap();
        let (_map, buffers) = guest(1);
        assert_eq!(engine.receive(CHANNEL, &buffers), Err(Errno::AGAIN));
        engine.await_channel(5, CHANNEL, Readiness::Readable).unwrap();
        rustix::io::write(&their_end, &[1]).unwrap();
        assert_eq!(events(&mut *engine, 1)[0].subject, READY);
        assert_eq!(engine.receive(CHANNEL, &buffers), Ok(1));
    }
}
