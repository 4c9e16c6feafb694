//! Sockets that the daemon inherits (vhost-user, "Backend program conventions", and
//! `sd_listen_fds(3)`), and what it says of itself.

use crate::launch::{must_fail, run, with_descriptors};
use crate::subject::{is_another_program, make_disk, must_work};
use frontend::block::BlockDriver;
use frontend::guest::Options;
use frontend::wire::{PATIENCE, Wire};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use tests::temp_dir;

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    if is_another_program() {
        return;
    }
    for arguments in [
        &["--print-capabilities"][..],
        &["--blk-file", "/nonexistent", "--print-capabilities", "--fd", "77"],
    ] {
        let ending = run(arguments);
        assert_eq!(ending.code, Some(0), "{}", ending.stderr);
        let capabilities: serde_json::Value =
            serde_json::from_str(&ending.stdout).expect("one JSON object");
        assert_eq!(capabilities["type"], "block");
        for feature in ["blk-file", "read-only"] {
            assert!(
                capabilities["features"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|one| one == feature)),
                "{feature}"
            );
        }
    }
}

#[test]
fn descriptor_file_says_the_same_as_the_program() {
    // vhost-user, "Backend program conventions": management software finds the program by it.
    if is_another_program() {
        return;
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd/50-outboard-vhost-blk.json");
    let file = std::fs::read_to_string(path).expect("the file is in the tree");
    let file: serde_json::Value = serde_json::from_str(&file).expect("one JSON object");
    let told = run(&["--print-capabilities"]).stdout;
    let told: serde_json::Value = serde_json::from_str(&told).expect("one JSON object");
    assert!(file["type"].is_string() && file["type"] == told["type"], "{file} {told}");
    let binary = file["binary"].as_str().expect("the program's path");
    assert!(binary.starts_with('/') && binary.ends_with("/vhost-blk"), "{binary}");
    assert!(file["description"].is_string(), "{file}");
}

#[test]
fn connected_descriptor_is_served_to_its_end() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    let mut process = with_descriptors(&disk, [Some(theirs.into()), None], ("", &["--fd", "3"]));
    let mut driver = BlockDriver::start_on(Wire::from_stream(ours), &Options::default())
        .expect("the connection is served");
    must_work(&mut driver, 0);
    drop(driver);
    // Nobody can connect any more: there is nothing left to do.
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn listening_descriptor_serves_one_front_end_after_another() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let socket = directory.path().join("inherited");
    let listener = UnixListener::bind(&socket).expect("a socket fits in a fresh directory");
    let mut process = with_descriptors(&disk, [Some(listener.into()), None], ("", &["--fd", "3"]));
    for _ in 0..3 {
        serve_once(&socket);
    }
    process.terminate();
    assert_eq!(process.wait().code(), Some(0));
    assert!(socket.exists(), "the socket is not ours to remove");
}

#[test]
fn sockets_of_the_service_manager_are_told_apart_by_name() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let [socket, control] =
        ["inherited", "inherited-control"].map(|name| directory.path().join(name));
    let listeners = [&socket, &control].map(|path| {
        Some(UnixListener::bind(path).expect("a socket fits in a fresh directory").into())
    });
    let environment = "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=disk:control";
    let mut process = with_descriptors(&disk, listeners, (environment, &[]));
    serve_once(&socket);
    let mut stream = UnixStream::connect(&control).expect("the control socket is there");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    stream.write_all(b"{\"command\":\"stats\"}\n").expect("a command goes out");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("a reply comes");
    serde_json::from_str::<serde_json::Value>(&line).expect("one JSON value");
    process.terminate();
    assert_eq!(process.wait().code(), Some(0));
}

#[test]
fn one_socket_of_the_service_manager_needs_no_name() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let socket = directory.path().join("inherited");
    let listener = UnixListener::bind(&socket).expect("a socket fits in a fresh directory");
    let _process =
        with_descriptors(&disk, [Some(listener.into()), None], ("LISTEN_PID=$$ LISTEN_FDS=1", &[]));
    serve_once(&socket);
}

#[test]
fn descriptor_that_is_no_socket_is_refused() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let disk = disk.to_str().expect("temporary paths are text");
    must_fail(&["--blk-file", disk, "--fd", "77"], 1, &["--fd", "77"]);
    must_fail(&["--blk-file", disk, "--fd", "0"], 1, &["--fd"]);
    must_fail(&["--blk-file", disk], 1, &["--socket-path"]);
}

fn serve_once(socket: &std::path::Path) {
    let deadline = std::time::Instant::now() + PATIENCE;
    let mut driver = loop {
        // As in `Subject::connect`: the last front end may not have hung up yet.
        match BlockDriver::start(socket, &Options::default()) {
            Ok(driver) => break driver,
            Err(frontend::Error::HangUp) if std::time::Instant::now() < deadline => {
                std::thread::yield_now()
            }
            Err(error) => panic!("the inherited socket is not served: {error}"),
        }
    };
    must_work(&mut driver, 0);
}
