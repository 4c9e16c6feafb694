//! `with-descriptors PROGRAM ARGUMENT…`: becomes PROGRAM, which is passed descriptors as a service manager passes them
//! (`LISTEN_FDS`). They come over the socket that is standard input: in each message some, with a line of their names.
//!
//! A program of its own, because their numbers begin with 3: only in a process that has nothing else open are they given out
//! in that order.

use std::env::args_os;
use std::error::Error;
use std::io::{IoSliceMut, stdin};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// The first number that is passed (sd_listen_fds(3)).
const FIRST: i32 = 3;
/// The longest name, and a line break.
const NAME_BYTES: usize = 256;

fn main() -> ExitCode {
    match become_program() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("with-descriptors: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever runs the test may have left it something open, a lock for one: the numbers are needed.
fn close_others() {
    let open = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> =
        open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number >= FIRST) {
        // One of them was the directory's.
        let _ = nix::unistd::close(number);
    }
}

fn become_program() -> Result<std::convert::Infallible, Box<dyn Error>> {
    let mut words = args_os().skip(1);
    let program = words.next().ok_or("usage: with-descriptors PROGRAM ARGUMENT…")?;
    close_others();
    let mut names = Vec::new();
    let mut count = 0;
    loop {
        let mut name = [0; NAME_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut name)];
        // Not close-on-exec: they are for the program.
        let received = recvmsg(stdin().as_fd(), &mut into, &mut control, RecvFlags::empty())?;
        if received.bytes == 0 {
            break;
        }
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(fds) = message else { continue };
            for fd in fds {
                if fd.as_raw_fd() != FIRST + count {
                    return Err(format!("number {} out of turn", fd.as_raw_fd()).into());
                }
                let _ = fd.into_raw_fd();
                count += 1;
            }
        }
        names.push(String::from_utf8(name[..received.bytes].to_vec())?);
    }
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    if count > 0 {
        command.env("LISTEN_PID", std::process::id().to_string());
        command.env("LISTEN_FDS", count.to_string()).env("LISTEN_FDNAMES", names.join(":"));
    }
    Err(command.exec().into())
}
