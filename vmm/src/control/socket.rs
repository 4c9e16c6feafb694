//! The control socket: an operator's commands, in the language of the daemons' own.
//!
//! Contract: a line is a JSON object, `{"command":"stats"}`, and is answered with one line, `{"ok":…}` or `{"error":"…"}`, as
//! often as the client likes. Who can connect may command: the socket's file is its owner's only. Each client has a thread,
//! which hands on one [`Order`] at a time and waits until the main thread has answered it. The answer is written without
//! waiting: a client that does not read is hung up on.
//!
//! What it deliberately does not do: carry an order out ([`crate::machine`]).

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, listen, send,
    socket_with,
};
use serde_json::{Value, json};

use super::Wish;
use crate::seccomp::{Role, Sandbox, confine};

/// Clients at once, as the daemons have it: more than a few shells and a supervisor are leaked connections.
const CLIENTS_MAX: usize = 16;
/// The longest line: commands have a few dozen bytes.
const LINE_BYTES_MAX: u64 = 4 << 10;
/// How long a client may say nothing: one that forgot to hang up must not keep its place for ever.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// How long to wait when no connection can be accepted, as when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const COMMANDS: [(&str, Wish); 5] = [
    ("stats", Wish::Statistics),
    ("pause", Wish::Pause),
    ("resume", Wish::Resume),
    ("powerdown", Wish::PowerButton),
    ("quit", Wish::End),
];

/// What is answered: the value of `ok` or the text of `error`.
pub(crate) type Reply = Result<Value, String>;

/// A client's command. Dropping it lets the client's thread go on.
pub(crate) struct Order {
    pub(crate) wish: Wish,
    client: Arc<UnixStream>,
    _answered: SyncSender<()>,
}

impl Order {
    pub(crate) fn answer(self, reply: Reply) {
        answer(&self.client, reply);
    }
}

/// The socket and its clients. Its descriptor is readable when there is an order.
pub(crate) struct ControlSocket {
    orders: Receiver<Order>,
    bell: Arc<OwnedFd>,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at a path where nobody else does.
    pub(crate) fn listen(path: &Path, sandbox: Sandbox) -> io::Result<Self> {
        let listener = listen_at(path)?;
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, orders) = sync_channel(CLIENTS_MAX);
        let path = path.to_owned();
        let control = Self { orders, bell: Arc::clone(&bell), path };
        let thread = std::thread::Builder::new().name("control".to_owned());
        thread.spawn(move || {
            confine(Role::Control, sandbox);
            accept(&listener, &Clients { sender, bell, present: Arc::new(()) });
        })?;
        Ok(control)
    }

    /// The next order.
    pub(crate) fn take(&self) -> Option<Order> {
        let _nobody_has_rung = rustix::io::read(&self.bell, &mut [0; 8]);
        self.orders.try_recv().ok()
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

/// A socket whose file appears with its owner's rights only. One that a dead process has left is replaced.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
        Err(_) => {}
    }
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file takes this mode over.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, i32::try_from(CLIENTS_MAX).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

/// What clients' threads have.
#[derive(Clone)]
struct Clients {
    sender: SyncSender<Order>,
    bell: Arc<OwnedFd>,
    /// Counts them, by being held by each.
    present: Arc<()>,
}

/// As long as the process lives.
fn accept(listener: &UnixListener, clients: &Clients) {
    loop {
        let Ok((client, _)) = listener.accept() else {
            std::thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        if Arc::strong_count(&clients.present) > CLIENTS_MAX {
            answer(&client, Err(format!("there are {CLIENTS_MAX} clients already")));
            continue;
        }
        let clients = clients.clone();
        let thread = std::thread::Builder::new().name("client".to_owned());
        if let Err(error) = thread.spawn(move || clients.serve(client)) {
            tracing::warn!(%error, "a client of the control socket has no thread");
        }
    }
}

impl Clients {
    fn serve(self, client: UnixStream) {
        if client.set_read_timeout(Some(IDLE_MAX)).is_err() {
            return;
        }
        let client = Arc::new(client);
        let mut lines = BufReader::new(&*client);
        loop {
            let mut line = Vec::new();
            let read = lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line);
            match (read, line.last()) {
                (Ok(_), Some(b'\n')) => {}
                (Ok(len), _) if u64::try_from(len) == Ok(LINE_BYTES_MAX) => {
                    let why = format!("the line is longer than {LINE_BYTES_MAX} bytes");
                    return answer(&client, Err(why));
                }
                _ => return,
            }
            match parse(&line) {
                Err(why) => answer(&client, Err(why)),
                Ok(wish) => {
                    let (_answered, is_answered) = sync_channel(0);
                    let order = Order { wish, client: Arc::clone(&client), _answered };
                    if self.sender.send(order).is_err() {
                        return;
                    }
                    // Full only when it has been rung 2⁶⁴ − 2 times.
                    let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
                    // It comes by the order being dropped.
                    let _ = is_answered.recv();
                }
            }
        }
    }
}

fn parse(line: &[u8]) -> Result<Wish, String> {
    let line: Value =
        serde_json::from_slice(line).map_err(|error| format!("not a command: {error}"))?;
    let members = line.as_object().ok_or("not a command: it is no JSON object")?;
    if let Some(name) = members.keys().find(|name| *name != "command") {
        return Err(format!("not a command: unknown field {name:?}"));
    }
    let name = members.get("command").and_then(Value::as_str);
    let name = name.ok_or("not a command: it has no \"command\" that is a string")?;
    let known = COMMANDS.iter().find(|(known, _)| *known == name);
    known.map(|(_, wish)| *wish).ok_or_else(|| {
        let known = COMMANDS.map(|(known, _)| known).join(", ");
        format!("not a command: {name:?} is none of {known}")
    })
}

fn answer(client: &UnixStream, reply: Reply) {
    let value = match reply {
        Ok(value) => json!({ "ok": value }),
        Err(why) => json!({ "error": why }),
    };
    let line = format!("{value}\n");
    let sent = send(client, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    if sent != Ok(line.len()) {
        let _closed_already = client.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn ask(client: &mut BufReader<UnixStream>, line: &str) -> String {
        client.get_mut().write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_line(&mut answer).unwrap();
        answer
    }

    #[test]
    fn orders_are_answered_one_after_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let control = ControlSocket::listen(&path, Sandbox::On).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let again = ControlSocket::listen(&path, Sandbox::On).map(drop).unwrap_err();
        assert!(again.to_string().contains("another process"), "{again}");
        let mut client = BufReader::new(UnixStream::connect(&path).unwrap());
        let asking = std::thread::spawn(move || {
            let lines = "{\"command\":\"pause\"}\n{\"command\":\"quit\"}\n";
            let first = ask(&mut client, lines);
            (first, ask(&mut client, ""))
        });
        for (wish, reply) in [(Wish::Pause, Ok(json!(1))), (Wish::End, Err("no".to_owned()))] {
            poll(&mut [PollFd::new(&control, PollFlags::IN)], None).unwrap();
            let order = control.take().unwrap();
            assert_eq!(order.wish, wish);
            assert!(control.take().is_none());
            order.answer(reply);
        }
        let answers = asking.join().unwrap();
        assert_eq!(answers, ("{\"ok\":1}\n".to_owned(), "{\"error\":\"no\"}\n".to_owned()));
        drop(control);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_command_is_answered_by_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        // What a dead process has left.
        drop(UnixListener::bind(&path).unwrap());
        let control = ControlSocket::listen(&path, Sandbox::On).unwrap();
        let mut client = BufReader::new(UnixStream::connect(&path).unwrap());
        for line in [
            "",
            "stats",
            "[]",
            "{}",
            "{\"command\":1}",
            "{\"command\":\"stats\",\"x\":1}",
            "{\"command\":\"x\"}",
        ] {
            let answer = ask(&mut client, &format!("{line}\n"));
            assert!(answer.starts_with("{\"error\":\"not a command: "), "{line}: {answer}");
        }
        let answer = ask(&mut client, &"x".repeat(LINE_BYTES_MAX as usize + 1));
        assert!(answer.contains("longer than"), "{answer}");
        assert!(control.take().is_none());
    }

    #[test]
    fn there_are_at_most_so_many_clients() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let _control = ControlSocket::listen(&path, Sandbox::On).unwrap();
        let connect = || BufReader::new(UnixStream::connect(&path).unwrap());
        let mut clients: Vec<_> = (0..CLIENTS_MAX).map(|_| connect()).collect();
        assert!(clients.iter_mut().all(|client| ask(client, "x\n").contains("not a command")));
        let mut answer = String::new();
        connect().read_line(&mut answer).unwrap();
        assert!(answer.contains("16 clients"), "{answer}");
    }
}
