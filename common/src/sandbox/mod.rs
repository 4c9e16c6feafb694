//! What a thread of a daemon can still do once it has opened what it serves: little, whoever it obeys by then.
//!
//! Contract: the daemon [chooses](choose) once, before any thread is started. Each thread then [enters](enter) the sandbox
//! by itself, with a list of what it will need ([`Needs`]); threads that it starts later inherit it. There is no way out.
//! Whoever makes system calls says which, beside the code that makes them: the engine its own (`engine/op.rs` has one table
//! for the rings' restrictions and for this), the worker, the main thread, the device. Three things hold a thread:
//!
//! - it has no capabilities but those that it names, and can gain none;
//! - Landlock: files are opened, made and removed by name in the places that options name, and nowhere else;
//! - seccomp: a system call that is not listed ends the process.
//!
//! A host that lacks one of them gives the others: a daemon has to start on an older kernel, too.
//!
//! What it deliberately does not do: change the account (the service manager's), hide what was open before, or cover what
//! runs before a thread enters. A tree that was never [chosen](choose) for, a test's or a fuzzer's, has no sandbox.

#![allow(unsafe_code, reason = "the C library's memory is told its limits by number")]

pub mod calls;
mod capabilities;
mod landlock;
mod seccomp;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
pub use rustix::thread::CapabilitySet;

pub use self::calls::Call;

/// `--sandbox`: whether threads are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// What a thread has no need of, it cannot do.
    On,
    /// Nothing is withheld.
    Off,
    /// The kernel logs what seccomp would refuse; nothing is withheld.
    Log,
}

/// The most arenas of glibc's malloc, as on a machine of eight processors: with a number it does not ask how many there are.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 64;

/// The daemon's choice.
static CHOICE: OnceLock<Sandbox> = OnceLock::new();

/// Says how the threads of this process are held. Only the first choice counts: there is no way out.
///
/// glibc's malloc is kept from reading files, which it does from the ninth arena on, and before it gives back the end of one.
/// That keeps its end from then on; what is large (128 KiB) is mapped by itself, and given back as ever.
pub fn choose(sandbox: Sandbox) {
    if *CHOICE.get_or_init(|| sandbox) == Sandbox::Off {
        return;
    }
    #[cfg(target_env = "gnu")]
    for (limit, value) in
        [(libc::M_ARENA_MAX, ARENAS_MAX), (libc::M_TRIM_THRESHOLD, libc::c_int::MAX)]
    {
        // SAFETY: it takes two numbers, and is called before there is another thread.
        unsafe { libc::mallopt(limit, value) };
    }
}

/// Whether what is not listed is refused.
pub fn is_on() -> bool {
    CHOICE.get() == Some(&Sandbox::On)
}

/// What is done in a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Names in the directory are removed: a socket's file, a link.
    Remove,
    /// Files of the directory are read.
    Read,
    /// The file, or those of the directory, are opened to read and write: devices, pipes.
    Open,
    /// Files of the directory are made, written, renamed and removed: logs.
    Keep,
    /// That, and sockets and links: what ports have that are plugged in later.
    Make,
    /// That, and device nodes.
    MakeNodes,
}

/// A place in the file system, and what is done there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A directory, or a file; one that is not there is left out.
    pub path: PathBuf,
    /// What for.
    pub access: Access,
}

impl Place {
    /// This place.
    pub fn new(path: impl Into<PathBuf>, access: Access) -> Self {
        Self { path: path.into(), access }
    }

    /// The directory of a file.
    pub fn around(file: &Path, access: Access) -> Self {
        let directory = match file.parent() {
            None => file,
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
        };
        Self::new(directory, access)
    }
}

/// What a thread needs, beyond what every thread does.
#[derive(Clone, Debug)]
pub struct Needs {
    /// What it does by name. The system calls for that follow from it.
    pub places: Vec<Place>,
    /// Its other system calls.
    pub calls: Vec<Call>,
    /// What it keeps of the capabilities that it has.
    pub capabilities: CapabilitySet,
    /// What is done beside the file of the control socket, where whoever gives commands may want other files.
    pub beside_control: Option<Access>,
}

impl Default for Needs {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            calls: Vec::new(),
            capabilities: CapabilitySet::empty(),
            beside_control: None,
        }
    }
}

/// Something that this host does not give.
#[derive(Debug, thiserror::Error)]
pub enum Lacking {
    /// Capabilities stay.
    #[error("capabilities cannot be given up")]
    Capabilities(#[source] std::io::Error),
    /// Files are only as safe as their permissions, and as seccomp makes them.
    #[error("no Landlock, so files can be opened wherever permissions allow it")]
    Landlock,
    /// Not all that is asked of Landlock: the kernel is older than that.
    #[error("an older Landlock, which withholds less")]
    OldLandlock,
    /// Landlock has refused to serve.
    #[error("no Landlock")]
    NoLandlock(#[source] ::landlock::RulesetError),
    /// System calls are not withheld.
    #[error("no seccomp, so any system call can be made")]
    Seccomp(#[source] seccompiler::Error),
    /// A list cannot be compiled.
    #[error("the list of system calls cannot be made a filter")]
    Filter(#[source] seccompiler::BackendError),
}

/// Has the calling thread, and those that it starts from now on, do no more than this; what of it this host does not have.
pub fn enter(needs: &Needs) -> Vec<Lacking> {
    let mut lacking = Vec::new();
    // rustix asks once, by a call that nobody needs later.
    rustix::param::page_size();
    let mut note = |held: Result<(), Lacking>| lacking.extend(held.err());
    match CHOICE.get().copied().unwrap_or(Sandbox::Off) {
        Sandbox::Off => {}
        Sandbox::On => {
            note(landlock::enter(&needs.places));
            note(capabilities::keep(needs.capabilities));
            note(seccomp::enter(&all_calls(needs), seccomp::Otherwise::End));
        }
        Sandbox::Log => note(seccomp::enter(&all_calls(needs), seccomp::Otherwise::Log)),
    }
    lacking
}

/// Every thread's calls, those that its places take, and its own.
fn all_calls(needs: &Needs) -> Vec<Call> {
    let by_name = needs.places.iter().flat_map(|place| place.access.calls()).copied();
    calls::EVERY_THREAD.iter().copied().chain(by_name).chain(needs.calls.iter().copied()).collect()
}

#[cfg(test)]
mod tests;
