//! A client of the control socket that sends anything and reads what it is told.
//!
//! Input: the bytes of the client, as they are.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::rc::Rc;

use common::daemon::control::{Answers, Command, Reply, serve};
use common::rate_limit::{Change, Topic};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// The longest line that is read.
const MAX_REQUEST_BYTES: usize = 64 * 1024;

const METRICS: &str = "# EOF\n";

const COMMANDS: [&str; 3] = ["stats", "limit", "resize"];

/// Answers each command with itself, and limits as the daemon would read them.
struct Echo;

impl Answers for Echo {
    fn command(&self, command: Command) -> Reply {
        let Command::Limit(named) = &command else {
            return Ok(json!(format!("{command:?}")));
        };
        let topics = [Topic::Iops, Topic::Bps, Topic::Rx, Topic::Tx];
        let limits = named.iter().map(|(name, text)| {
            let topic = topics.iter().find(|topic| topic.name() == name);
            let topic = topic.ok_or_else(|| format!("no limit {name:?}"))?;
            Change::parse(text, *topic).map_err(|error| error.to_string())
        });
        limits.collect::<Result<Vec<_>, _>>().map(|limits| json!(format!("{limits:?}")))
    }

    fn openmetrics(&self) -> String {
        METRICS.to_owned()
    }
}

thread_local! {
    static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .expect("a runtime");
}

/// Serves one client.
pub fn run(data: &[u8]) {
    let answers = RUNTIME.with(|runtime| runtime.block_on(converse(data)));
    check(data, &answers);
}

/// Connects a client to a server of its own, and returns what it is told.
async fn converse(data: &[u8]) -> Vec<u8> {
    // An abstract name leaves no file behind; several threads may do this at once.
    let name = format!("outboard-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("a name of our own");
    let client = UnixStream::connect_addr(&address).expect("a listener");
    listener.set_nonblocking(true).expect("a socket");
    client.set_nonblocking(true).expect("a socket");
    let listener = tokio::net::UnixListener::from_std(listener).expect("a socket");
    let client = tokio::net::UnixStream::from_std(client).expect("a socket");
    let mut told = Vec::new();
    tokio::select! {
        never = serve(listener, Rc::new(Echo)) => match never {},
        () = talk(client, data, &mut told) => {}
    }
    told
}

/// Sends everything, hangs up on that side, and reads until the server does the same.
async fn talk(mut client: tokio::net::UnixStream, data: &[u8], told: &mut Vec<u8>) {
    let (mut from, mut to) = client.split();
    let send = async {
        // The server may hang up first: it answers one HTTP request.
        if to.write_all(data).await.is_ok() {
            to.shutdown().await.ok();
        }
    };
    // A server that hangs up before it has read everything resets the connection: also an end.
    let receive = async { while let Ok(1..) = from.read_buf(told).await {} };
    tokio::join!(send, receive);
}

/// Compares the answers with what was asked.
fn check(asked: &[u8], told: &[u8]) {
    let mut told = told;
    let mut lines = asked.split_inclusive(|byte| *byte == b'\n').map(without_end);
    while let Some(line) = lines.next() {
        if is_http(line) {
            if lines.any(<[u8]>::is_empty) {
                check_response(told);
                told = &[];
            }
            break;
        }
        let end = told.iter().position(|byte| *byte == b'\n').expect("an answer to each line");
        let answer: Value = serde_json::from_slice(&told[..end]).expect("JSON");
        told = &told[end + 1..];
        let members: Vec<&String> = answer.as_object().expect("an object").keys().collect();
        if line.len() > MAX_REQUEST_BYTES {
            assert_eq!(members, ["error"]);
            break;
        }
        let request: Option<Value> = serde_json::from_slice(line).ok();
        let known = request
            .is_some_and(|request| COMMANDS.iter().any(|command| request["command"] == *command));
        assert!(members == ["error"] || members == ["ok"] && known, "{answer}");
    }
    assert!(told.is_empty(), "{} bytes nobody asked for", told.len());
}

fn without_end(line: &[u8]) -> &[u8] {
    let Some(line) = line.strip_suffix(b"\n") else { return line };
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn is_http(line: &[u8]) -> bool {
    let parts: Vec<&str> = std::str::from_utf8(line).unwrap_or_default().split(' ').collect();
    parts.len() == 3 && parts[2].starts_with("HTTP/1.")
}

fn check_response(response: &[u8]) {
    let response = std::str::from_utf8(response).expect("text");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 "), "{head}");
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    assert_eq!(head.starts_with("HTTP/1.1 200 "), body == METRICS, "{head}");
}
