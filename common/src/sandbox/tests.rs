//! Each test has a child process: there is no way out of a sandbox.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use clap::ValueEnum;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::calls::{CONNECT, START_THREADS};
use super::{Access, CapabilitySet, Needs, Place, Sandbox, choose, enter};

/// Tells a child what to try, and where.
const TRIAL: &str = "OUTBOARD_TEST_SANDBOX_TRIAL";
const PLACE: &str = "OUTBOARD_TEST_SANDBOX_PLACE";
/// What a child says that came so far.
const ALIVE: i32 = 7;

/// Runs this test once more, as a child that tries `trial` in `place`.
fn child(test: &str, trial: &str, place: &Path) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("sandbox::tests::{test}"), "--nocapture"]);
    let ended =
        command.env(TRIAL, trial).env(PLACE, place).env("RUST_BACKTRACE", "0").output().unwrap();
    if ended.status.code() != Some(ALIVE) && ended.status.signal().is_none() {
        panic!("{trial}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    ended.status
}

/// What a child is to try: nothing where this is the parent.
fn trial() -> Option<(String, PathBuf)> {
    let trial = std::env::var(TRIAL).ok()?;
    Some((trial, std::env::var_os(PLACE)?.into()))
}

/// Does what a daemon that obeys somebody else would.
fn misbehave(what: &str, place: &Path) {
    match what {
        "execve" => panic!("{}", Command::new("/bin/true").exec()),
        "open" => drop(File::open(place).unwrap()),
        "socket" => drop(rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)),
        "internet" => drop(rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)),
        "fork" => drop(Command::new("/bin/true").spawn()),
        other => unreachable!("{other}"),
    }
}

fn held(sandbox: Sandbox, needs: &Needs) {
    choose(sandbox);
    let lacking = enter(needs);
    assert!(lacking.is_empty(), "{lacking:?}");
}

#[test]
fn call_that_is_not_listed_ends_the_process() {
    const TEST: &str = "call_that_is_not_listed_ends_the_process";
    if let Some((what, place)) = trial() {
        let (sandbox, what) = what.split_once(' ').unwrap();
        held(Sandbox::from_str(sandbox, false).unwrap(), &Needs::default());
        misbehave(what, &place);
        std::process::exit(ALIVE);
    }
    for what in ["execve", "open", "socket", "internet", "fork"] {
        let status = child(TEST, &format!("on {what}"), Path::new("/dev/null"));
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status}");
    }
    for sandbox in ["off", "log"] {
        for what in ["open", "socket", "internet", "fork"] {
            let status = child(TEST, &format!("{sandbox} {what}"), Path::new("/dev/null"));
            assert_eq!(status.code(), Some(ALIVE), "{sandbox}, {what}: {status}");
        }
    }
}

#[test]
fn thread_is_held_as_the_one_that_starts_it() {
    const TEST: &str = "thread_is_held_as_the_one_that_starts_it";
    if let Some((what, place)) = trial() {
        held(Sandbox::On, &Needs { calls: START_THREADS.to_vec(), ..Needs::default() });
        let started = std::thread::spawn(move || match &*what {
            "nothing" => {}
            what => misbehave(what, &place),
        });
        started.join().unwrap();
        std::process::exit(ALIVE);
    }
    assert_eq!(child(TEST, "nothing", Path::new("/")).code(), Some(ALIVE));
    for what in ["execve", "open", "socket"] {
        let status = child(TEST, what, Path::new("/dev/null"));
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {status}");
    }
}

#[test]
fn files_have_a_name_where_options_name_them_and_nowhere_else() {
    const TEST: &str = "files_have_a_name_where_options_name_them_and_nowhere_else";
    if let Some((_, place)) = trial() {
        let (logs, others) = (place.join("logs"), place.join("others"));
        held(
            Sandbox::On,
            &Needs { places: vec![Place::new(&logs, Access::Keep)], ..Needs::default() },
        );
        fs::write(logs.join("log"), "said").unwrap();
        fs::rename(logs.join("log"), logs.join("log.1")).unwrap();
        assert_eq!(fs::read(logs.join("log.1")).unwrap(), b"said");
        fs::remove_file(logs.join("log.1")).unwrap();
        let refused = |outcome: std::io::Result<()>| outcome.unwrap_err().kind();
        assert_eq!(refused(File::open("/etc/passwd").map(drop)), ErrorKind::PermissionDenied);
        assert_eq!(refused(fs::write(others.join("x"), "")), ErrorKind::PermissionDenied);
        assert_eq!(refused(fs::remove_file(others.join("there"))), ErrorKind::PermissionDenied);
        std::process::exit(ALIVE);
    }
    let directory = tempfile::tempdir().unwrap();
    ["logs", "others"].iter().for_each(|name| fs::create_dir(directory.path().join(name)).unwrap());
    fs::write(directory.path().join("others/there"), "").unwrap();
    assert_eq!(child(TEST, "names", directory.path()).code(), Some(ALIVE));
    assert!(directory.path().join("others/there").exists());
}

#[test]
fn connection_is_made_by_who_names_it() {
    const TEST: &str = "connection_is_made_by_who_names_it";
    if let Some((what, place)) = trial() {
        let calls = if what == "named" { CONNECT.to_vec() } else { Vec::new() };
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        held(Sandbox::On, &Needs { calls, ..Needs::default() });
        rustix::net::connect(&socket, &SocketAddrUnix::new(&place).unwrap()).unwrap();
        std::process::exit(ALIVE);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    assert_eq!(child(TEST, "named", &path).code(), Some(ALIVE));
    assert_eq!(child(TEST, "unnamed", &path).signal(), Some(libc::SIGSYS));
}

#[test]
fn call_with_a_condition_is_made_as_that_says() {
    const TEST: &str = "call_with_a_condition_is_made_as_that_says";
    if let Some((what, _)) = trial() {
        let socket = |family| rustix::net::socket(family, SocketType::STREAM, None).map(drop);
        held(Sandbox::On, &Needs { calls: CONNECT.to_vec(), ..Needs::default() });
        socket(AddressFamily::UNIX).unwrap();
        if what == "other" {
            let _ = socket(AddressFamily::INET);
        }
        std::process::exit(ALIVE);
    }
    assert_eq!(child(TEST, "unix", Path::new("/")).code(), Some(ALIVE));
    assert_eq!(child(TEST, "other", Path::new("/")).signal(), Some(libc::SIGSYS));
}

#[test]
fn privileges_are_given_up_but_for_those_that_are_named() {
    const TEST: &str = "privileges_are_given_up_but_for_those_that_are_named";
    if let Some((what, _)) = trial() {
        let keeps = what == "keeps";
        let capabilities = if keeps { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() };
        let mut own = File::open("/proc/thread-self/status").unwrap();
        let had = rustix::thread::capabilities(None).unwrap().permitted;
        held(Sandbox::On, &Needs { capabilities, ..Needs::default() });
        let mut status = [0; 8192];
        let length = own.read(&mut status).unwrap();
        let status = String::from_utf8_lossy(&status[..length]);
        let left = (had & capabilities).bits();
        for line in [
            "NoNewPrivs:\t1".to_owned(),
            "Seccomp:\t2".to_owned(),
            format!("CapEff:\t{left:016x}"),
            format!("CapPrm:\t{left:016x}"),
            format!("CapAmb:\t{:016x}", 0),
            format!("CapInh:\t{:016x}", 0),
        ] {
            assert!(status.contains(&line), "{line} is not in {status}");
        }
        std::process::exit(ALIVE);
    }
    for what in ["keeps", "keeps none"] {
        assert_eq!(child(TEST, what, Path::new("/")).code(), Some(ALIVE), "{what}");
    }
}

#[test]
fn panic_is_heard() {
    const TEST: &str = "panic_is_heard";
    if trial().is_some() {
        held(Sandbox::On, &Needs::default());
        std::process::abort();
    }
    assert_eq!(child(TEST, "abort", Path::new("/")).signal(), Some(libc::SIGABRT));
}

#[test]
fn without_a_choice_nothing_is_withheld() {
    assert!(!super::is_on());
    assert!(enter(&Needs::default()).is_empty());
    let opened = rustix::fs::open("/dev/null", OFlags::RDONLY, Mode::empty());
    assert!(opened.is_ok_and(|file| rustix::io::read(&file, &mut [0; 1]) == Ok(0)));
}
