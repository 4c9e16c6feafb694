//! The control socket: how an operator, a script or a metrics scraper asks a running daemon.
//!
//! Two languages on one socket, told apart by the first line. JSON lines: `{"command":"stats"}` is
//! answered with one line, `{"ok":…}` or `{"error":"…"}`, as often as the client likes. HTTP: `GET
//! /metrics` is answered with OpenMetrics text and the end of the connection, which is all that
//! `curl --unix-socket` and a scraper need; this is deliberately no web server (no keep-alive, no
//! bodies of requests).
//!
//! What the answers are is for an [`Answers`] to say. Clients share the main thread with the front
//! end's messages, so an answer is computed without waiting, and a client that does not read its
//! answer is dropped. Access is by the socket file's mode alone: who can connect may ask
//! everything.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// Clients served at once. Each has one buffered line at most; more than a scraper, a few shells
/// and a supervisor is a client that leaks connections.
const MAX_CLIENTS: usize = 16;

/// The longest line, and the longest head of an HTTP request, that a client may send. Commands have
/// a few dozen bytes, curl's heads about a hundred.
const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// How long a client may take to read one answer. It is local, and the answer is computed already.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client may say nothing: one that forgot to hang up must not keep its place for ever.
const IDLE_MAX: Duration = Duration::from_secs(300);

/// Pause after a failed accept (no descriptors left, in general), which would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const OPENMETRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN_TYPE: &str = "text/plain; charset=utf-8";

/// What a client can command, by the `command` member of its JSON line.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    // The braces have serde refuse members where there are none, by their names.
    /// All counters and limits, as JSON.
    Stats {},
    /// Change the limits that are named; answered with those in force.
    Limit(
        /// What by which topic's name, as the option of that name has it.
        BTreeMap<String, String>,
    ),
    /// Look at the device's size now; answered with what came of it.
    Resize {},
}

/// What is answered to a command: the value of `ok` or the text of `error`.
pub type Reply = Result<Value, String>;

/// Whoever knows the answers. Called on the main thread; must not wait.
pub trait Answers {
    /// Does what the command says.
    fn command(&self, command: Command) -> Reply;
    /// The commands that are the device's own.
    fn device_commands(&self) -> &'static [&'static str] {
        &[]
    }
    /// Does what one of these says; `None`: it is another.
    fn device_command(&self, _command: &Value) -> Option<Reply> {
        None
    }
    /// All metrics, in OpenMetrics text format.
    fn openmetrics(&self) -> String;
}

/// Why a client was dropped.
#[derive(Debug, Error)]
enum ClientError {
    #[error("the connection failed")]
    Connection(#[from] io::Error),
    #[error("it did not read its answer within {} s", REPLY_TIMEOUT.as_secs())]
    NotReading(#[from] tokio::time::error::Elapsed),
}

/// Serves clients until it is dropped, which drops them too. Needs a current-thread runtime with
/// I/O and time.
pub async fn serve(listener: UnixListener, answers: Rc<dyn Answers>) -> Infallible {
    LocalSet::new().run_until(accept_clients(listener, answers)).await
}

async fn accept_clients(listener: UnixListener, answers: Rc<dyn Answers>) -> Infallible {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if clients.len() >= MAX_CLIENTS => refuse(&stream),
                Ok((stream, _)) => {
                    let client = Client { stream: BufReader::new(stream), answers: Rc::clone(&answers) };
                    clients.spawn_local(client.serve());
                }
                Err(error) => {
                    warn!(%error, "no client of the control socket can be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = clients.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "a client of the control socket was dropped"),
                Err(error) => warn!(%error, "an answer to a client of the control socket failed"),
            },
        }
    }
}

fn refuse(stream: &UnixStream) {
    let line = json_line(
        &json!({ "error": format!("there are {MAX_CLIENTS} clients already, the most there may be") }),
    );
    // A new connection's buffer is empty and has room for the line; a client that is gone already
    // needs none.
    if let Err(error) = stream.try_write(&line) {
        debug!(%error, "a client of the control socket was refused without a word");
    }
}

struct Client {
    stream: BufReader<UnixStream>,
    answers: Rc<dyn Answers>,
}

/// One line of a client, without its end.
enum Line {
    Complete(Vec<u8>),
    TooLong,
    HangUp,
}

impl Client {
    async fn serve(mut self) -> Result<(), ClientError> {
        loop {
            let read = timeout(IDLE_MAX, self.read_line(MAX_REQUEST_BYTES)).await;
            let line = match read.unwrap_or(Ok(Line::HangUp))? {
                Line::Complete(line) => line,
                Line::TooLong => {
                    let error = format!("the line is longer than {MAX_REQUEST_BYTES} bytes");
                    return self.send(&json_line(&json!({ "error": error }))).await;
                }
                Line::HangUp => return Ok(()),
            };
            if let Some(request) = RequestLine::parse(&line) {
                return self.serve_http(&request).await;
            }
            let reply = json_line(&self.answer(&line));
            self.send(&reply).await?;
        }
    }

    fn answer(&self, line: &[u8]) -> Value {
        match self.reply(line) {
            Ok(value) => json!({ "ok": value }),
            Err(message) => json!({ "error": message }),
        }
    }

    fn reply(&self, line: &[u8]) -> Reply {
        // An array of values would do for serde: who relied on their order would be surprised by the
        // next member.
        if line.trim_ascii_start().first() != Some(&b'{') {
            return Err("not a command: it is no JSON object".to_owned());
        }
        let line = serde_json::from_slice::<Value>(line);
        let line = line.map_err(|error| format!("not a command: {error}"))?;
        if let Some(reply) = self.answers.device_command(&line) {
            return reply;
        }
        let command = Command::deserialize(&line).map_err(|error| {
            // Serde takes the known ones from the enum.
            let known = self.answers.device_commands();
            let is_unknown = error.to_string().starts_with("unknown variant");
            let known = known.iter().filter(|_| is_unknown).map(|name| format!(", `{name}`"));
            format!("not a command: {error}{}", known.collect::<String>())
        })?;
        self.answers.command(command)
    }

    async fn serve_http(&mut self, request: &RequestLine<'_>) -> Result<(), ClientError> {
        let response = match self.skip_headers().await? {
            Line::HangUp => return Ok(()),
            Line::TooLong => Response::plain(
                "431 Request Header Fields Too Large",
                "the request's head is too long\n",
            ),
            Line::Complete(_) => request.respond(&*self.answers),
        };
        self.send(&response.into_bytes()).await?;
        self.stream.get_mut().shutdown().await?;
        Ok(())
    }

    /// Reads up to the empty line that ends the head of an HTTP request.
    async fn skip_headers(&mut self) -> io::Result<Line> {
        let mut room = MAX_REQUEST_BYTES;
        loop {
            let read = timeout(IDLE_MAX, self.read_line(room)).await;
            let line = read.unwrap_or(Ok(Line::HangUp))?;
            match &line {
                Line::Complete(header) if !header.is_empty() => {
                    room = room.saturating_sub(header.len())
                }
                _ => return Ok(line),
            }
        }
    }

    /// Reads a line of at most `limit` bytes. What stands before a hang-up counts as a line even if
    /// it has no end.
    async fn read_line(&mut self, limit: usize) -> io::Result<Line> {
        let mut line = Vec::new();
        let limit_with_end = (limit as u64).saturating_add(1);
        (&mut self.stream).take(limit_with_end).read_until(b'\n', &mut line).await?;
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        } else if line.is_empty() {
            return Ok(Line::HangUp);
        } else if line.len() > limit {
            return Ok(Line::TooLong);
        }
        Ok(Line::Complete(line))
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        timeout(REPLY_TIMEOUT, self.stream.get_mut().write_all(bytes)).await??;
        Ok(())
    }
}

fn json_line(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// The first line of an HTTP request.
struct RequestLine<'a> {
    method: &'a str,
    target: &'a str,
}

impl<'a> RequestLine<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(line).ok()?.split(' ');
        let request = Self { method: parts.next()?, target: parts.next()? };
        let version = parts.next()?;
        (version.starts_with("HTTP/1.") && parts.next().is_none()).then_some(request)
    }

    fn respond(&self, answers: &dyn Answers) -> Response {
        // A scraper may add parameters; none changes the answer.
        let path = self.target.split_once('?').map_or(self.target, |(path, _)| path);
        match (self.method, path) {
            ("GET", "/metrics") => Response {
                status: "200 OK",
                header: None,
                content_type: OPENMETRICS_TYPE,
                body: answers.openmetrics(),
            },
            ("GET", _) => Response::plain("404 Not Found", "there is only /metrics here\n"),
            _ => Response {
                header: Some("Allow: GET"),
                ..Response::plain("405 Method Not Allowed", "there is only GET here\n")
            },
        }
    }
}

struct Response {
    status: &'static str,
    header: Option<&'static str>,
    content_type: &'static str,
    body: String,
}

impl Response {
    fn plain(status: &'static str, body: &str) -> Self {
        Self { status, header: None, content_type: PLAIN_TYPE, body: body.to_owned() }
    }

    fn into_bytes(self) -> Vec<u8> {
        let Self { status, header, content_type, body } = self;
        let header = header.map(|header| format!("{header}\r\n")).unwrap_or_default();
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{header}\
             Connection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::rc::Rc;
    use std::time::Duration;

    use serde_json::{Value, json};
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{UnixListener, UnixStream};

    use super::{Answers, Command, MAX_CLIENTS, MAX_REQUEST_BYTES, Reply, serve};

    struct Fixed {
        metrics: String,
    }

    impl Answers for Fixed {
        fn command(&self, command: Command) -> Reply {
            match command {
                Command::Stats {} => Ok(json!({ "device": "block" })),
                Command::Limit(named) => Ok(json!(named)),
                Command::Resize {} => Err("it has shrunk".to_owned()),
            }
        }

        fn device_commands(&self) -> &'static [&'static str] {
            &["ports", "port-add"]
        }

        fn device_command(&self, command: &Value) -> Option<Reply> {
            match command["command"].as_str()? {
                "ports" => Some(Ok(json!([0, 1]))),
                "port-add" => Some(Err(format!("no port {}", command["port"]))),
                _ => None,
            }
        }

        fn openmetrics(&self) -> String {
            self.metrics.clone()
        }
    }

    /// After that long a test that waits for an answer has failed.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Runs `client` against a server that answers with `metrics`, until `patience` ends.
    async fn with_server_of(
        metrics: String,
        patience: impl Future<Output = ()>,
        client: impl AsyncFnOnce(PathBuf),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::select! {
            never = serve(listener, Rc::new(Fixed { metrics })) => match never {},
            () = client(path) => {}
            () = patience => panic!("the client waits for an answer in vain"),
        }
    }

    async fn with_server(client: impl AsyncFnOnce(PathBuf)) {
        // tidy(sleep): a time limit, not a wait.
        let patience = tokio::time::sleep(PATIENCE);
        with_server_of("metrics\n# EOF\n".to_owned(), patience, client).await;
    }

    struct Shell(BufReader<UnixStream>);

    impl Shell {
        async fn connect(path: &Path) -> Self {
            Self(BufReader::new(UnixStream::connect(path).await.unwrap()))
        }

        async fn ask(&mut self, line: &str) -> Value {
            self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await.unwrap();
            self.reply().await
        }

        async fn reply(&mut self) -> Value {
            let mut reply = String::new();
            self.0.read_line(&mut reply).await.unwrap();
            assert!(reply.ends_with('\n'), "{reply:?}");
            serde_json::from_str(&reply).unwrap()
        }
    }

    /// What comes back for `request`, up to the server's hang-up.
    async fn http(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        match stream.read_to_end(&mut response).await {
            Ok(_) => {}
            // So ends a unix socket whose other side has not read all of the request.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        String::from_utf8(response).unwrap()
    }

    #[tokio::test]
    async fn stats_are_answered_with_one_line_as_often_as_asked() {
        with_server(async |path| {
            let mut shell = Shell::connect(&path).await;
            for _ in 0..3 {
                assert_eq!(
                    shell.ask(r#"{"command":"stats"}"#).await,
                    json!({ "ok": { "device": "block" } })
                );
            }
        })
        .await;
    }

    #[tokio::test]
    async fn command_without_line_end_is_answered_at_hang_up() {
        with_server(async |path| {
            let mut shell = Shell::connect(&path).await;
            shell.0.get_mut().write_all(br#"{"command":"stats"}"#).await.unwrap();
            shell.0.get_mut().shutdown().await.unwrap();
            assert_eq!(shell.reply().await["ok"]["device"], "block");
        })
        .await;
    }

    #[tokio::test]
    async fn commands_arrive_with_what_they_say_and_no_more() {
        with_server(async |path| {
            let mut shell = Shell::connect(&path).await;
            for (command, reply) in [
                (r#"{"command":"limit"}"#, json!({ "ok": {} })),
                (r#"{"bps":"none","command":"limit"}"#, json!({ "ok": { "bps": "none" } })),
                (r#"{"command":"resize"}"#, json!({ "error": "it has shrunk" })),
            ] {
                assert_eq!(shell.ask(command).await, reply, "{command}");
            }
            for (command, said) in [
                (r#"{"command":"resize","bytes":4096}"#, "unknown field `bytes`"),
                (r#"{"command":"stats","bytes":4096}"#, "unknown field `bytes`"),
                (r#"{"command":"limit","iops":5}"#, "expected a string"),
                (r#"["stats"]"#, "no JSON object"),
            ] {
                let error = shell.ask(command).await["error"].to_string();
                assert!(error.contains(said), "{command}: {error}");
                assert!(!error.contains("`ports`"), "that command is known: {error}");
            }
        })
        .await;
    }

    #[tokio::test]
    async fn commands_of_the_devices_own_are_answered_by_it() {
        with_server(async |path| {
            let mut shell = Shell::connect(&path).await;
            for (command, reply) in [
                (r#"{"command":"ports"}"#, json!({ "ok": [0, 1] })),
                (r#" {"port":7,"command":"port-add"}"#, json!({ "error": "no port 7" })),
                (r#"{"command":"stats"}"#, json!({ "ok": { "device": "block" } })),
            ] {
                assert_eq!(shell.ask(command).await, reply, "{command}");
            }
            let error = shell.ask(r#"["ports"]"#).await["error"].to_string();
            assert!(error.contains("no JSON object"), "{error}");
        })
        .await;
    }

    #[tokio::test]
    async fn wrong_line_is_answered_with_an_error_and_the_next_one_works() {
        with_server(async |path| {
            let mut shell = Shell::connect(&path).await;
            let unknown = shell.ask(r#"{"command":"stat"}"#).await["error"].to_string();
            let known = ["`stat`", "`stats`", "`limit`", "`resize`", "`ports`", "`port-add`"];
            assert!(known.iter().all(|command| unknown.contains(command)), "{unknown}");
            let nested = "[".repeat(10_000);
            for line in
                ["", "stats", "{}", "[]", r#"{"command":7}"#, "\u{0}", &nested, "POST it HTTP/9"]
            {
                assert!(shell.ask(line).await["error"].is_string(), "{line}");
            }
            assert_eq!(shell.ask(r#"{"command":"stats"}"#).await["ok"]["device"], "block");
        })
        .await;
    }

    #[tokio::test]
    async fn line_beyond_the_limit_is_refused_and_ends_the_connection() {
        with_server(async |path| {
            let padded = |length: usize| {
                let command = r#"{"command":"stats"}"#;
                format!("{command}{}", " ".repeat(length - command.len()))
            };
            let mut shell = Shell::connect(&path).await;
            assert!(shell.ask(&padded(MAX_REQUEST_BYTES)).await["ok"].is_object());
            let error = shell.ask(&padded(MAX_REQUEST_BYTES + 1)).await["error"].to_string();
            assert!(error.contains(&MAX_REQUEST_BYTES.to_string()), "{error}");
            // A reset where the line's rest was not read, an end of file where it was.
            assert!(matches!(shell.0.read_line(&mut String::new()).await, Ok(0) | Err(_)));
        })
        .await;
    }

    #[tokio::test]
    async fn clients_do_not_wait_for_each_other_up_to_the_limit() {
        with_server(async |path| {
            let mut shells = Vec::new();
            for _ in 0..MAX_CLIENTS {
                let mut shell = Shell::connect(&path).await;
                assert!(shell.ask(r#"{"command":"stats"}"#).await["ok"].is_object());
                shells.push(shell);
            }
            let mut surplus = Shell::connect(&path).await;
            assert!(surplus.reply().await["error"].to_string().contains(&MAX_CLIENTS.to_string()));
            // A place is free when the server has seen the hang-up: ask until then.
            shells.pop();
            loop {
                let mut next = Shell::connect(&path).await;
                next.0.get_mut().write_all(b"{\"command\":\"stats\"}\n").await.ok();
                if next.reply().await["ok"].is_object() {
                    break;
                }
            }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn client_that_never_reads_its_answer_is_dropped() {
        // More than the kernel buffers for a unix socket.
        let metrics = "x".repeat(16 << 20);
        // A paused clock may jump over any limit while a socket's bytes are on their way.
        with_server_of(metrics.clone(), std::future::pending(), async |path| {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").await.unwrap();
            // The clock stands still while anybody has something to do, then jumps to the server's
            // timeout first.
            // tidy(sleep): on a paused clock.
            tokio::time::sleep(super::REPLY_TIMEOUT * 2).await;
            let mut response = Vec::new();
            stream.read_to_end(&mut response).await.unwrap();
            assert!(!response.is_empty() && response.len() < metrics.len());
            assert!(
                Shell::connect(&path).await.ask(r#"{"command":"stats"}"#).await["ok"].is_object()
            );
        })
        .await;
    }

    #[tokio::test]
    async fn metrics_are_served_over_http() {
        with_server(async |path| {
            let response =
                http(&path, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
                    .await;
            let (head, body) = response.split_once("\r\n\r\n").unwrap();
            assert_eq!(body, "metrics\n# EOF\n");
            let head: Vec<&str> = head.split("\r\n").collect();
            assert_eq!(head[0], "HTTP/1.1 200 OK");
            for header in [
                "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8",
                "Content-Length: 14",
                "Connection: close",
            ] {
                assert!(head.contains(&header), "{head:?}");
            }
            assert!(
                http(&path, "GET /metrics?name[]=x HTTP/1.0\r\n\r\n")
                    .await
                    .starts_with("HTTP/1.1 200 ")
            );
        })
        .await;
    }

    #[tokio::test]
    async fn other_http_requests_are_refused_by_status() {
        with_server(async |path| {
            assert!(http(&path, "GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
            let response = http(&path, "POST /metrics HTTP/1.1\r\n\r\n").await;
            assert!(
                response.starts_with("HTTP/1.1 405 ") && response.contains("\r\nAllow: GET\r\n"),
                "{response}"
            );
            let header = format!("Filler: {}\r\n", "x".repeat(1000));
            let long =
                format!("GET /metrics HTTP/1.1\r\n{}", header.repeat(MAX_REQUEST_BYTES / 1000 + 2));
            assert!(http(&path, &long).await.starts_with("HTTP/1.1 431 "));
        })
        .await;
    }

    #[tokio::test]
    async fn curl_understands_the_answer() {
        with_server(async |path| {
            let curl = tokio::task::spawn_blocking(move || {
                let mut curl = std::process::Command::new("curl");
                curl.args(["--silent", "--show-error", "--fail", "--unix-socket"]).arg(path);
                curl.arg("http://localhost/metrics").output()
            });
            match curl.await.unwrap() {
                Ok(output) => assert_eq!(output.stdout, b"metrics\n# EOF\n", "{output:?}"),
                Err(error) => println!("not run, for want of curl: {error}"),
            }
        })
        .await;
    }
}
