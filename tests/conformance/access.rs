//! Who may reach the disk: the modes of the sockets, and a process of another user that tries.

use crate::launch::must_fail;
use crate::subject::{Subject, is_another_program, make_disk, ours};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tests::{lacks_root, temp_dir};

/// `nobody` on every distribution; it owns nothing.
const NOBODY: u32 = 65_534;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("the socket is there").permissions().mode() & 0o777
}

#[test]
fn sockets_are_private() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    assert_eq!(mode(subject.socket()), 0o600);
    assert_eq!(mode(&subject.control()), 0o600);
}

#[test]
fn sockets_have_the_mode_that_was_asked_for() {
    if is_another_program() {
        return;
    }
    for (option, expected) in [("0660", 0o660), ("0666", 0o666), ("0600", 0o600)] {
        let subject = Subject::with_options(&["--socket-mode", option]);
        assert_eq!(mode(subject.socket()), expected);
        assert_eq!(mode(&subject.control()), expected);
    }
}

#[test]
fn another_user_cannot_connect() {
    if is_another_program() {
        return;
    }
    if lacks_root("acting as another user") {
        return;
    }
    for (option, may) in [("0600", false), ("0660", false), ("0666", true)] {
        let directory = temp_dir();
        // The directory must not be what keeps the other user out.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755))
            .expect("the directory is ours");
        make_disk(directory.path());
        let _daemon = ours(directory.path(), &["--socket-mode", option]).start();
        for socket in ["socket", "control"] {
            let path = directory.path().join(socket);
            let connected = as_nobody(move || {
                UnixStream::connect(path).map(|_| ()).map_err(|error| error.kind())
            });
            let expected = if may { Ok(()) } else { Err(ErrorKind::PermissionDenied) };
            assert_eq!(connected, expected, "{socket} with mode {option}");
        }
    }
}

/// Does something as another user. Credentials belong to a thread for the kernel, so a thread that
/// ends afterwards is enough of a process; leaving user 0 with all three ids takes every capability
/// from it.
fn as_nobody<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[]).expect("root can leave its groups");
            set_thread_res_gid(gid, gid, gid).expect("root can become another group");
            set_thread_res_uid(uid, uid, uid).expect("root can become another user");
            act()
        });
        thread.join().expect("the other user's thread ends")
    })
}

#[test]
fn stale_socket_is_replaced() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    make_disk(directory.path());
    for name in ["socket", "control"] {
        // A process that was killed leaves just this.
        drop(
            std::os::unix::net::UnixListener::bind(directory.path().join(name))
                .expect("a socket fits in a fresh directory"),
        );
    }
    let daemon = ours(directory.path(), &[]).start();
    frontend::front_end::FrontEnd::connect(daemon.socket())
        .and_then(|served| served.barrier())
        .expect("the new socket is served");
    UnixStream::connect(directory.path().join("control"))
        .expect("the new control socket is served");
}

#[test]
fn socket_of_a_live_process_is_left_to_it() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let disk = disk.to_str().expect("temporary paths are text");
    let taken = subject.socket().to_str().expect("temporary paths are text").to_owned();
    must_fail(&["--blk-file", disk, "--socket-path", &taken], 1, &["--socket-path", &taken]);
    subject.must_serve_the_next();
}

#[test]
fn file_in_the_socket_s_place_is_not_deleted() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let disk = disk.to_str().expect("temporary paths are text");
    let path = directory.path().join("precious");
    std::fs::write(&path, "data").expect("a file fits in a fresh directory");
    let path = path.to_str().expect("temporary paths are text");
    let fresh = directory.path().join("socket");
    let fresh = fresh.to_str().expect("temporary paths are text");
    must_fail(&["--blk-file", disk, "--socket-path", path], 1, &["--socket-path", path]);
    must_fail(
        &["--blk-file", disk, "--socket-path", fresh, "--control", path],
        1,
        &["--control", path],
    );
    assert_eq!(std::fs::read_to_string(path).expect("the file is still there"), "data");
    assert!(!Path::new(fresh).exists(), "a socket was left behind");
}
