//! What endpoints do in the sandbox: once they are open, and when a port is plugged in later.
//!
//! Contract: files are turned over, opened anew and removed where those are that the options name. Who has a control socket can
//! plug ports in: their files have a place there, or beside the control socket, and nowhere else; a terminal can always be
//! had.

use std::path::Path;

use common::sandbox::calls::{CONNECT, LISTEN, START_THREADS, TERMINAL};
use common::sandbox::{Access, Call, Needs, Place};
use nix::libc;

use crate::port_spec::EndpointSpec;

/// Where the kernel has terminals.
const TERMINALS: &str = "/dev/pts";
/// What more there is of devices, and what has been passed.
const DEVICES: [&str; 2] = ["/dev/ptmx", "/proc/self/fd"];

/// What a terminal takes that is made.
const MAKE_TERMINAL: &[Call] = &[
    Call::ioctl(libc::TIOCGPTN as u32),
    Call::ioctl(libc::TIOCSPTLCK as u32),
    Call::any(libc::SYS_inotify_init1),
    Call::any(libc::SYS_inotify_add_watch),
];

/// Opens the other end of a terminal, of which whoever had it open has left something.
const OPEN_OTHER_END: Call = Call::ioctl(libc::TIOCGPTPEER as u32);

/// See the module's head.
pub(crate) fn needs(specs: &[&EndpointSpec], is_commanded: bool) -> Needs {
    let mut needs = Needs::default();
    // Files are written by threads that the runtime starts when there is something to write.
    needs.calls.extend(START_THREADS.iter().chain(TERMINAL));
    // Each connection is watched for its end.
    needs.calls.push(Call::any(libc::SYS_epoll_create1));
    needs.places.extend(specs.iter().flat_map(|spec| places(spec)));
    if is_commanded || specs.iter().any(|spec| matches!(spec, EndpointSpec::Pty { .. })) {
        needs.places.push(Place::new(TERMINALS, Access::Open));
        needs.calls.push(OPEN_OTHER_END);
    }
    if is_commanded {
        let beside = specs.iter().filter_map(|spec| named(spec));
        needs.places.extend(beside.map(|path| Place::around(path, Access::Make)));
        needs.places.extend(DEVICES.map(|path| Place::new(path, Access::Open)));
        needs.calls.extend(CONNECT.iter().chain(LISTEN).chain(MAKE_TERMINAL));
        needs.beside_control = Some(Access::Make);
    }
    needs
}

/// The file that is the operator's.
fn named(spec: &EndpointSpec) -> Option<&Path> {
    match spec {
        EndpointSpec::Unix { path, .. } | EndpointSpec::Cast { path } => Some(path),
        EndpointSpec::File(file) if is_turned_over(&file.path) => Some(&file.path),
        EndpointSpec::Pty { link } => link.as_deref(),
        EndpointSpec::File(_) | EndpointSpec::Stdio | EndpointSpec::Fd(_) | EndpointSpec::Null => {
            None
        }
    }
}

/// Where an endpoint of today has its files.
fn places(spec: &EndpointSpec) -> Vec<Place> {
    match spec {
        EndpointSpec::Unix { path, .. } => vec![Place::around(path, Access::Remove)],
        EndpointSpec::Pty { link: Some(link) } => vec![Place::around(link, Access::Remove)],
        EndpointSpec::Cast { path } => kept(path),
        EndpointSpec::File(file) => kept(&file.path),
        EndpointSpec::Pty { link: None }
        | EndpointSpec::Stdio
        | EndpointSpec::Fd(_)
        | EndpointSpec::Null => Vec::new(),
    }
}

/// What is no regular file is only opened anew.
fn kept(path: &Path) -> Vec<Place> {
    if !is_turned_over(path) {
        return vec![Place::new(path, Access::Open)];
    }
    // A link leads to where the file is opened, and is itself what is renamed.
    let file = std::fs::canonicalize(path).ok();
    let around = |path: &Path| Place::around(path, Access::Keep);
    [Some(around(path)), file.as_deref().map(around)].into_iter().flatten().collect()
}

fn is_turned_over(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.is_file())
}
