//! Call, err and back-end channel descriptors of every kind: full, closed, always or never ready, or
//! nothing that anybody can write to.
//!
//! A back end may refuse what is no eventfd; front ends in use pass sockets and pipes for calls. In
//! any case the ring goes on for a driver that looks, its neighbour is not held up, and it can be
//! stopped.

use crate::aftermath::{Attacker, Session};
use crate::ring_attack::small_rings;
use crate::subject::{Subject, is_another_program, promise};
use frontend::block::{Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR, VIRTIO_F_EVENT_IDX};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A descriptor by its kind, with whatever must stay open for it to be that.
struct Odd {
    what: &'static str,
    fd: OwnedFd,
    _others: Vec<OwnedFd>,
}

fn odd(what: &'static str, fd: impl Into<OwnedFd>) -> Odd {
    Odd { what, fd: fd.into(), _others: Vec::new() }
}

fn notifier(what: &'static str, notifier: Result<Notifier, frontend::Error>) -> Odd {
    let notifier = notifier.expect("notifiers can be made");
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("a descriptor can be duplicated");
    Odd { what, fd: own(notifier.back_end_fd()), _others: vec![own(notifier.fd())] }
}

fn open(path: &Path, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("it is there")
}

/// Every kind of descriptor; `directory` has room for a file.
fn odd_descriptors(directory: &Path) -> Vec<Odd> {
    let plain = directory.join("plain");
    File::create(&plain).expect("a file can be made");
    let (closed, other_end) = UnixStream::pair().expect("sockets");
    drop(other_end);
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll can be made");
    let semaphore = eventfd(0, EventfdFlags::SEMAPHORE).expect("eventfds");
    vec![
        notifier("full pipe", Notifier::full_pipe()),
        notifier("full socket", Notifier::full_socket()),
        notifier("full blocking eventfd", Notifier::full_blocking_eventfd()),
        notifier("pipe without reader", Notifier::broken_pipe()),
        odd("socket without peer", closed),
        odd("blocking semaphore", semaphore),
        odd("file that cannot be written", open(&plain, OFlags::RDONLY)),
        odd("file", open(&plain, OFlags::RDWR)),
        odd("path", open(&plain, OFlags::PATH)),
        odd("directory", open(directory, OFlags::DIRECTORY)),
        odd("/dev/null", open(Path::new("/dev/null"), OFlags::RDWR)),
        odd("/dev/full", open(Path::new("/dev/full"), OFlags::RDWR)),
        odd("epoll", epoll),
    ]
}

/// A driver that is to be called for everything, and looks.
fn without_event_idx() -> Options {
    Options { features: Options::default().features & !VIRTIO_F_EVENT_IDX, ..small_rings() }
}

/// Requests on ring 0 whose ends are seen in the ring.
fn must_work_by_looking(attacker: &mut Attacker, what: &str) {
    for _ in 0..10 {
        attacker.driver.submit(0, &Request::read(0, SECTOR_BYTES));
        attacker.driver.kick(0).expect("the device can be kicked");
        let done = attacker.driver.complete_by_looking(0);
        let (_, outcome) = done.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "{what}");
    }
}

#[test]
fn call_descriptors_of_every_kind() {
    let mut subject = Subject::start();
    let directory = tests::temp_dir();
    for odd in odd_descriptors(directory.path()) {
        let what = odd.what;
        let mut attacker = Attacker::begin(&subject, &without_event_idx());
        let front_end = &attacker.driver.guest.front_end;
        let set = front_end.set_vring_fd(VHOST_USER_SET_VRING_CALL, 0, Some(odd.fd.as_fd()));
        if set.is_ok() {
            must_work_by_looking(&mut attacker, what);
            attacker.neighbour_must_work(what);
            // Whoever blocks on the descriptor never answers this.
            let stopped = attacker.driver.guest.front_end.get_vring_base(0);
            stopped.unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        attacker.after(&mut subject, Session::Either, what);
    }
}

#[test]
fn err_descriptors_of_every_kind() {
    let mut subject = Subject::start();
    let directory = tests::temp_dir();
    for odd in odd_descriptors(directory.path()) {
        let what = odd.what;
        let mut attacker = Attacker::begin(&subject, &small_rings());
        let front_end = &attacker.driver.guest.front_end;
        let set = front_end.set_vring_fd(VHOST_USER_SET_VRING_ERR, 0, Some(odd.fd.as_fd()));
        if set.is_ok() {
            // Nobody hears it; that it breaks is seen by what does not come back.
            attacker.driver.guest.queues[0].ring().set_available_index(1000);
            attacker.driver.kick(0).expect("the device can be kicked");
            attacker.neighbour_must_work(what);
            let stopped = attacker.driver.guest.front_end.get_vring_base(0);
            promise(stopped.is_ok(), || format!("{what}: the ring cannot be stopped: {stopped:?}"));
        }
        attacker.after(&mut subject, Session::Either, what);
    }
}

#[test]
fn one_descriptor_for_everything() {
    // Its own calls wake the device, which finds nothing to do.
    let mut subject = Subject::start();
    let mut attacker = Attacker::begin(&subject, &without_event_idx());
    let guest = &attacker.driver.guest;
    let kick = guest.queues[0].kick_notifier().map(Notifier::back_end_fd);
    for request in [VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR] {
        guest.front_end.set_vring_fd(request, 0, kick).expect("a descriptor can be set");
    }
    must_work_by_looking(&mut attacker, "calls that are kicks");
    attacker.after(&mut subject, Session::Lives, "calls that are kicks");
}

#[test]
fn call_descriptor_is_changed_over_and_over() {
    let mut subject = Subject::start();
    let directory = tests::temp_dir();
    let all = odd_descriptors(directory.path());
    let mut attacker = Attacker::begin(&subject, &without_event_idx());
    for round in 0..10 {
        for odd in all.iter().filter(|odd| odd.what.starts_with("full")) {
            let front_end = &attacker.driver.guest.front_end;
            front_end
                .set_vring_fd(VHOST_USER_SET_VRING_CALL, 0, Some(odd.fd.as_fd()))
                .expect("the call descriptor can be changed");
            must_work_by_looking(&mut attacker, odd.what);
        }
        attacker.neighbour_must_work(&format!("round {round}"));
    }
    attacker.after(&mut subject, Session::Lives, "changed call descriptors");
}

#[test]
fn back_end_channels_of_every_kind() {
    // Something is sent over it when the disk has grown.
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let directory = tests::temp_dir();
    let mut size_bytes = std::fs::metadata(subject.image()).expect("the image is ours").len();
    for odd in odd_descriptors(directory.path()) {
        let what = odd.what;
        let mut attacker = Attacker::begin(&subject, &small_rings());
        let sectors = attacker.driver.config().expect("the configuration space is told").capacity();
        if attacker.driver.guest.front_end.set_backend_req_fd(odd.fd.as_fd()).is_ok() {
            size_bytes += 1 << 20;
            let image = File::options().write(true).open(subject.image()).expect("it is ours");
            image.set_len(size_bytes).expect("a file can be extended");
            subject.signal(Signal::HUP);
            let deadline = std::time::Instant::now() + PATIENCE;
            while attacker.driver.config().expect("it is told").capacity() == sectors {
                assert!(std::time::Instant::now() < deadline, "{what}: the disk does not grow");
                std::thread::yield_now();
            }
        }
        attacker.neighbour_must_work(what);
        attacker.after(&mut subject, Session::Lives, what);
    }
}
