//! What goes over the daemon's control socket: who types, who watches, and how large the window is.
//!
//! Contract: each command is a connection of its own, ended after its answer: the daemon serves a few clients at once, and a
//! console has more viewers than that. No command waits longer than [`ANSWER_MAX`]. What the daemon answers is taken as it
//! is only where it has the right form, and what of it is shown has nothing in it that a terminal obeys.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long the daemon may take to answer: it does so at once, or hangs.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// The longest answer: hundreds of viewers, of a hundred bytes each.
const ANSWER_BYTES_MAX: u64 = 256 << 10;

/// How much of a viewer's name is shown: ids of `attach` are random, and eight digits tell them apart.
const ID_CHARACTERS_SHOWN: usize = 8;

/// Why a command has come to nothing.
#[derive(Debug, Error)]
pub(super) enum OperatorError {
    #[error("no control socket at {}: {error} (--control names one)", path.display())]
    NoSocket {
        path: PathBuf,
        // Said in the message: there is no chain of sources in a notice.
        error: io::Error,
    },
    #[error("the control socket {} has failed: {error}", path.display())]
    Connection { path: PathBuf, error: io::Error },
    #[error("the control socket {} has not answered within {} s", path.display(), ANSWER_MAX.as_secs())]
    NoAnswer { path: PathBuf },
    #[error("the daemon refuses: {0}")]
    Refused(String),
    #[error("the control socket's answer cannot be understood: {0}")]
    Answer(String),
}

/// What a viewer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Writer,
    Watcher,
}

impl Role {
    fn parse(value: &Value) -> Option<Self> {
        match value.as_str()? {
            "writer" => Some(Self::Writer),
            "watcher" => Some(Self::Watcher),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Writer => "writer",
            Self::Watcher => "watcher",
        }
    }
}

/// Who is at a console.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Who {
    /// The console's port, as `size` wants it.
    pub(super) port: String,
    /// What whoever asked may do.
    pub(super) role: Role,
    /// Everyone there, whoever asked included.
    pub(super) viewers: Vec<Viewer>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Viewer {
    id: String,
    pid: Option<u64>,
    role: Role,
}

impl Who {
    fn parse(answer: &Value) -> Option<Self> {
        // A port is named by its number, alone or among other things.
        let port = answer.get("port")?;
        let port = port.get("id").unwrap_or(port);
        let port = port.as_u64().map(|id| id.to_string()).or(port.as_str().map(str::to_owned))?;
        let role = Role::parse(answer.get("role")?)?;
        let viewers = answer.get("viewers")?.as_array()?;
        let viewers = viewers.iter().map(Viewer::parse).collect::<Option<_>>()?;
        Some(Self { port, role, viewers })
    }

    /// Who types, for a person: "process 17".
    pub(super) fn writer(&self) -> Option<String> {
        let writer = self.viewers.iter().find(|viewer| viewer.role == Role::Writer)?;
        Some(match writer.pid {
            Some(pid) => format!("process {pid}"),
            None => format!("viewer {}", writer.short_id()),
        })
    }

    /// A table for a person; `you` is the id of whoever asked.
    pub(super) fn table(&self, you: &str) -> Vec<String> {
        let head = format!("  {:<ID_CHARACTERS_SHOWN$}  {:>7}  role", "viewer", "process");
        let rows = self.viewers.iter().map(|viewer| {
            let pid = viewer.pid.map_or_else(|| "?".to_owned(), |pid| pid.to_string());
            let yours = if viewer.id == you { "  (you)" } else { "" };
            let (id, role) = (viewer.short_id(), viewer.role.name());
            format!("  {id:<ID_CHARACTERS_SHOWN$}  {pid:>7}  {role}{yours}")
        });
        std::iter::once(head).chain(rows).collect()
    }
}

impl Viewer {
    fn parse(value: &Value) -> Option<Self> {
        Some(Self {
            id: value.get("id")?.as_str()?.to_owned(),
            pid: value.get("pid").and_then(Value::as_u64),
            role: Role::parse(value.get("role")?)?,
        })
    }

    fn short_id(&self) -> String {
        harmless(&self.id).chars().take(ID_CHARACTERS_SHOWN).collect()
    }
}

/// Text of somebody else's, with nothing in it that a terminal obeys.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A client of the control socket, for one viewer.
#[derive(Debug)]
pub(super) struct Operator {
    path: PathBuf,
    viewer: String,
}

impl Operator {
    pub(super) fn new(path: PathBuf, viewer: String) -> Self {
        Self { path, viewer }
    }

    /// The id that the daemon knows the viewer by.
    pub(super) fn viewer(&self) -> &str {
        &self.viewer
    }

    pub(super) async fn who(&self) -> Result<Who, OperatorError> {
        let answer = self.ask(&json!({ "command": "who", "viewer": self.viewer })).await?;
        Who::parse(&answer).ok_or_else(|| OperatorError::Answer(harmless(&answer.to_string())))
    }

    pub(super) async fn take_over(&self) -> Result<(), OperatorError> {
        self.ask(&json!({ "command": "take-over", "viewer": self.viewer })).await.map(drop)
    }

    pub(super) async fn release(&self) -> Result<(), OperatorError> {
        self.ask(&json!({ "command": "release", "viewer": self.viewer })).await.map(drop)
    }

    /// Tells the guest the window's columns and rows.
    pub(super) async fn size(
        &self,
        port: &str,
        (columns, rows): (u16, u16),
    ) -> Result<(), OperatorError> {
        let command = json!({ "command": "size", "port": port, "columns": columns, "rows": rows });
        self.ask(&command).await.map(drop)
    }

    /// What the daemon answers to a command.
    async fn ask(&self, command: &Value) -> Result<Value, OperatorError> {
        let path = || self.path.clone();
        let answered = timeout(ANSWER_MAX, exchange(&self.path, command)).await;
        let line = match answered {
            Ok(Ok(line)) => line,
            Ok(Err(Failure::Connect(error))) => {
                return Err(OperatorError::NoSocket { path: path(), error });
            }
            Ok(Err(Failure::Connection(error))) => {
                return Err(OperatorError::Connection { path: path(), error });
            }
            Err(_elapsed) => return Err(OperatorError::NoAnswer { path: path() }),
        };
        let misunderstood = || OperatorError::Answer(harmless(&String::from_utf8_lossy(&line)));
        let answer: Value = serde_json::from_slice(&line).ok().ok_or_else(misunderstood)?;
        match (answer.get("ok"), answer.get("error").and_then(Value::as_str)) {
            (Some(answer), None) => Ok(answer.clone()),
            (None, Some(refusal)) => Err(OperatorError::Refused(harmless(refusal))),
            _ => Err(misunderstood()),
        }
    }
}

enum Failure {
    Connect(io::Error),
    Connection(io::Error),
}

/// One line there, one line back.
async fn exchange(path: &Path, command: &Value) -> Result<Vec<u8>, Failure> {
    let mut stream = UnixStream::connect(path).await.map_err(Failure::Connect)?;
    let request = format!("{command}\n");
    stream.write_all(request.as_bytes()).await.map_err(Failure::Connection)?;
    let mut line = Vec::new();
    let mut answer = BufReader::new(stream).take(ANSWER_BYTES_MAX);
    answer.read_until(b'\n', &mut line).await.map_err(Failure::Connection)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    fn who() -> Value {
        json!({
            "port": { "id": 3, "name": "con3" },
            "role": "watcher",
            "viewers": [
                { "id": "1", "pid": 17, "role": "writer", "lost_bytes": 0 },
                { "id": "0123456789abcdef0123456789abcdef", "pid": null, "role": "watcher" },
            ],
        })
    }

    #[test]
    fn answer_to_who_is_a_table() {
        let who = Who::parse(&who()).expect("it has the right form");
        assert_eq!((who.port.as_str(), who.role), ("3", Role::Watcher));
        assert_eq!(who.writer().as_deref(), Some("process 17"));
        let table = who.table("0123456789abcdef0123456789abcdef");
        assert_eq!(
            table,
            [
                "  viewer    process  role",
                "  1              17  writer",
                "  01234567        ?  watcher  (you)",
            ]
        );
    }

    #[test]
    fn port_is_named_by_number_or_name() {
        for (port, wanted) in [(json!(0), "0"), (json!("con0"), "con0"), (json!({ "id": 2 }), "2")]
        {
            let mut answer = who();
            answer["port"] = port;
            assert_eq!(Who::parse(&answer).expect("it has the right form").port, wanted);
        }
    }

    #[test]
    fn answer_of_another_form_is_none() {
        for member in ["port", "role", "viewers"] {
            for wrong in [Value::Null, json!(-1), json!([{}]), json!({}), json!("guest")] {
                let mut answer = who();
                answer[member] = wrong.clone();
                // Any text may be a port's name.
                let is_right = member == "port" && wrong.is_string();
                assert_eq!(Who::parse(&answer).is_some(), is_right, "{member}: {wrong}");
            }
        }
    }

    #[test]
    fn what_terminals_obey_is_not_shown() {
        let mut answer = who();
        answer["viewers"][0]["id"] = json!("\x1b[2J\n");
        answer["viewers"][0]["pid"] = Value::Null;
        let who = Who::parse(&answer).expect("it has the right form");
        let shown = format!("{:?}{:?}", who.table("1").concat(), who.writer());
        assert!(!shown.contains("\\u{1b}") && !shown.contains("\\n"), "{shown}");
    }

    /// What an operator makes of a daemon that answers with these bytes and hangs up; `None` if it keeps silent.
    async fn answered(bytes: Option<&'static [u8]>) -> (String, Result<Who, OperatorError>) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("control.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let operator = Operator::new(path, "me".to_owned());
        let daemon = async {
            let (stream, _) = listener.accept().await.expect("a client");
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            stream.read_line(&mut line).await.expect("a line");
            match bytes {
                Some(bytes) => {
                    // The client may have had enough before the end.
                    let _gone = stream.write_all(bytes).await;
                }
                None => std::future::pending().await,
            }
            drop(stream);
            line
        };
        if bytes.is_none() {
            tokio::select! {
                _ = daemon => unreachable!("it keeps silent"),
                answer = operator.who() => (String::new(), answer),
            }
        } else {
            tokio::join!(daemon, operator.who())
        }
    }

    #[tokio::test]
    async fn command_is_one_line_and_names_the_viewer() {
        let (line, answer) = answered(Some(
            br#"{"ok":{"port":0,"role":"writer","viewers":[]}}
"#,
        ))
        .await;
        let sent: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(sent, json!({ "command": "who", "viewer": "me" }));
        assert_eq!(answer.expect("an answer").role, Role::Writer);
    }

    #[tokio::test]
    async fn refusal_is_told_in_the_daemons_words() {
        let (_, answer) = answered(Some(b"{\"error\":\"no viewer \\\"me\\\"\\u001b\"}\n")).await;
        let error = answer.expect_err("it is refused").to_string();
        assert_eq!(error, "the daemon refuses: no viewer \"me\"\u{fffd}");
    }

    #[tokio::test]
    async fn nonsense_is_no_answer() {
        static LONG: [u8; ANSWER_BYTES_MAX as usize + 1] = [b' '; ANSWER_BYTES_MAX as usize + 1];
        for nonsense in [
            &b""[..],
            b"\n",
            b"\xff\n",
            b"[]\n",
            b"{\"ok\":1}\n",
            b"{\"ok\":1,\"error\":\"x\"}\n",
            &LONG,
        ] {
            let (_, answer) = answered(Some(nonsense)).await;
            assert!(matches!(answer, Err(OperatorError::Answer(_))), "{answer:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_daemon_is_not_waited_for() {
        let (_, answer) = answered(None).await;
        assert!(matches!(answer, Err(OperatorError::NoAnswer { .. })), "{answer:?}");
    }

    #[tokio::test]
    async fn missing_socket_is_named() {
        let operator = Operator::new("/nowhere/control.sock".into(), "me".to_owned());
        let error = operator.release().await.expect_err("there is none").to_string();
        assert!(error.contains("/nowhere/control.sock") && error.contains("--control"), "{error}");
    }
}
