//! Every seed, and every input that ever found a bug, by the ordinary test runner: `cargo test -p fuzz`.
//!
//! Which input fails is what the test says last before the panic.

use std::fs;
use std::path::Path;

/// Runs all of `fuzz/seeds/TARGET` and `fuzz/regressions/TARGET`.
fn replay(target: &str, run: fn(&[u8])) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for folder in ["seeds", "regressions"] {
        let Ok(inputs) = fs::read_dir(root.join(folder).join(target)) else { continue };
        for input in inputs {
            let path = input.expect("a folder of the tree").path();
            println!("{}", path.display());
            run(&fs::read(&path).expect("an input"));
            count += 1;
        }
    }
    assert!(count > 0, "there are no seeds of {target}");
}

#[test]
fn message_bears_its_seeds() {
    replay("message", crate::message::run);
}

#[test]
fn connection_bears_its_seeds() {
    replay("connection", crate::connection::run);
}

#[test]
fn session_bears_its_seeds() {
    replay("session", crate::session::run);
}

#[test]
fn ring_bears_its_seeds() {
    replay("ring", crate::ring::run);
}

#[test]
fn request_bears_its_seeds() {
    replay("request", crate::request::run);
}

#[test]
fn frame_bears_its_seeds() {
    replay("frame", crate::frame::run);
}

#[test]
fn console_bears_its_seeds() {
    replay("console", crate::console::run);
}

#[test]
fn registers_bear_their_seeds() {
    replay("registers", crate::registers::run);
}

#[test]
fn control_bears_its_seeds() {
    replay("control", crate::control::run);
}
