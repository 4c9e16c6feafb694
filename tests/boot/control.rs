//! The daemon's control socket, asked as an operator would.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// The time in which a daemon that runs at all answers.
const LIMIT: Duration = Duration::from_secs(30);

/// Sends one command and returns what the daemon answers to it; anything but `ok` fails the test.
pub(crate) fn ask(control: &Path, command: &Value) -> Value {
    let mut stream =
        UnixStream::connect(control).expect("the daemon listens on its control socket");
    stream.set_read_timeout(Some(LIMIT)).expect("a socket takes a time limit");
    writeln!(stream, "{command}").expect("the daemon reads its commands");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("the daemon answers in time");
    let mut answer: Value =
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("no JSON in {line:?}: {error}"));
    match answer.get_mut("ok") {
        Some(ok) => ok.take(),
        None => panic!("{command} is answered by {line}"),
    }
}
