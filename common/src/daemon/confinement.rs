//! What the main thread can still do once all is open.
//!
//! Contract: after [`enter`] it serves front ends and operators, does what the device named ([`Device::needs`]), and removes
//! the files of its sockets. If no option names anything that is opened, made or connected to later, it can do none of that.
//! Threads that it starts from then on are held as it is. Workers have entered before, with less.

use tracing::info;

use super::listener::{Endpoint, Sockets};
use super::log;
use crate::device::Device;
use crate::sandbox::calls::EPOLL;
use crate::sandbox::{self, Access, Call, Needs, Place};

/// `FIONBIO`: the standard library's way to have a socket not block.
const NOT_BLOCK: u32 = libc::FIONBIO as u32;

/// What serving takes: connections, messages with descriptors, guest memory and its records, and a look at a disk's size.
const SERVING: &[Call] = &[
    Call::any(libc::SYS_accept4),
    Call::any(libc::SYS_recvmsg),
    Call::any(libc::SYS_recvfrom),
    Call::any(libc::SYS_sendmsg),
    Call::any(libc::SYS_shutdown),
    Call::any(libc::SYS_getsockopt),
    Call::any(libc::SYS_setsockopt),
    Call::any(libc::SYS_getsockname),
    Call::any(libc::SYS_getpeername),
    Call::ioctl(NOT_BLOCK),
    Call::any(libc::SYS_eventfd2),
    Call::any(libc::SYS_memfd_create),
    Call::any(libc::SYS_ftruncate),
    Call::any(libc::SYS_fstatfs),
    Call::any(libc::SYS_newfstatat),
    Call::any(libc::SYS_statx),
    Call::any(libc::SYS_lseek),
];

/// Has the main thread do no more than serve `device` at these sockets; the log says what of that this host cannot give.
/// `more` is what it reads besides.
pub(super) fn enter(device: &impl Device, sockets: &Sockets, more: Option<Place>) {
    let mut needs = needs(device, sockets);
    needs.places.extend(more);
    for lacking in sandbox::enter(&needs) {
        info!("--sandbox: {}", log::with_sources(&lacking));
    }
}

fn needs(device: &impl Device, sockets: &Sockets) -> Needs {
    let mut needs = device.needs(sockets.control.is_some());
    needs.calls.extend(SERVING.iter().chain(EPOLL));
    let own = match &sockets.vhost_user {
        Endpoint::Listening(listener) => listener.file.as_ref(),
        Endpoint::Connected(_) => None,
    };
    let control = sockets.control.as_ref().and_then(|listener| listener.file.as_ref());
    let beside = control.zip(needs.beside_control);
    needs.places.extend(beside.map(|(file, access)| Place::around(file.path(), access)));
    let removed = own.into_iter().chain(control);
    needs.places.extend(removed.map(|file| Place::around(file.path(), Access::Remove)));
    needs
}
