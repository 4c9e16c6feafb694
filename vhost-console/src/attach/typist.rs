//! Whoever types: what is typed becomes input for the guest, or is obeyed.
//!
//! Contract: input reaches the daemon in order and whole, or the person is told that it does not. What the daemon does not
//! take yet waits here, and then at stdin; so the escape works although the guest takes nothing, up to [`PENDING_MAX`]
//! bytes of what was typed before it. Nothing waits for the control socket longer than a command may take.
//!
//! A person's input is not sent while somebody else types: the daemon would throw it away without a word. So whoever has not
//! typed for a while asks first. Of a script's input, which cannot be asked about again and again, stderr says so once.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::time::{Duration, Instant};

use tokio::net::unix::OwnedWriteHalf;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

use super::escape::{Command, Escape, EscapeKey, Typed, help, key_name};
use super::keyboard::Keyboard;
use super::operator::{Operator, OperatorError, Role};
use super::screen::Screen;
use super::session::Ending;
use super::terminal::Terminal;

/// Input that waits for the daemon: a large paste, so that an escape typed after it is seen.
const PENDING_MAX: usize = 1 << 20;

/// How long it is believed who types, and how often at most a person is told that it is somebody else.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often it is asked who types, of a daemon that may not have accepted the connection yet; a refusal after these is
/// meant (a data port has no viewers).
const FIRST_LOOKS: u32 = 10;

const FIRST_LOOK_PAUSE: Duration = Duration::from_millis(20);

/// What a typist works with.
pub(super) struct Desk<'a> {
    /// Where there is none, nothing is typed.
    pub(super) keyboard: Option<Keyboard>,
    /// A script types where there is none.
    pub(super) terminal: Option<&'a Terminal>,
    pub(super) screen: &'a Screen,
    pub(super) operator: Operator,
    pub(super) key: EscapeKey,
    /// Nothing that is typed is sent.
    pub(super) watch: bool,
}

pub(super) struct Typist<'a> {
    desk: Desk<'a>,
    escape: Escape,
    /// The console's socket; dropping it ends the input.
    input: OwnedWriteHalf,
    pending: VecDeque<u8>,
    /// The daemon takes no input any more; what it still says is read all the same.
    is_refused: bool,
    /// What the last look found; none where there is no control socket, too.
    role: Option<Role>,
    /// Who types, as the last look found it.
    writer: Option<String>,
    looked: Option<Instant>,
    told: Option<Instant>,
}

impl<'a> Typist<'a> {
    pub(super) fn new(desk: Desk<'a>, input: OwnedWriteHalf) -> Self {
        let escape = Escape::new(desk.key);
        Self {
            desk,
            escape,
            input,
            pending: VecDeque::new(),
            is_refused: false,
            role: None,
            writer: None,
            looked: None,
            told: None,
        }
    }

    /// Types until something ends that.
    pub(super) async fn run(mut self) -> Ending {
        let resized = self.desk.terminal.map(|_| signal(SignalKind::window_change())).transpose();
        let mut resized = match resized {
            Ok(resized) => resized,
            Err(error) => return Ending::Failed(format!("SIGWINCH cannot be caught: {error}")),
        };
        if self.desk.terminal.is_some() && !self.desk.watch {
            self.first_look().await;
        }
        let mut has_ended = false;
        loop {
            if has_ended && self.pending.is_empty() && !self.is_refused {
                return Ending::InputEnded;
            }
            let has_room = !has_ended && self.pending.len() < PENDING_MAX;
            tokio::select! {
                biased;
                writable = self.input.writable(), if !self.pending.is_empty() => {
                    self.send_pending(writable);
                }
                typed = next_piece(&mut self.desk.keyboard), if has_room => match typed {
                    Some(Ok(bytes)) => {
                        if let Some(ending) = self.typed(&bytes).await {
                            return ending;
                        }
                    }
                    Some(Err(error)) => {
                        return Ending::Failed(format!("input cannot be read: {error}"));
                    }
                    None if self.desk.terminal.is_some() => {
                        return Ending::Failed("the terminal has gone".to_owned());
                    }
                    None => has_ended = true,
                },
                () = next_signal(&mut resized) => self.resized().await,
            }
        }
    }

    async fn typed(&mut self, bytes: &[u8]) -> Option<Ending> {
        for typed in self.escape.feed(bytes) {
            match typed {
                Typed::Input(bytes) => self.take(&bytes).await,
                Typed::Command(Command::Detach) => {
                    // What was typed before it; what there is no room for now may wait for ever.
                    self.send_pending(Ok(()));
                    return Some(Ending::Detached);
                }
                Typed::Command(command) => self.obey(command).await,
            }
        }
        None
    }

    /// Takes input that is to be sent.
    async fn take(&mut self, bytes: &[u8]) {
        if self.desk.watch {
            return self.tell("not sent: --watch only watches".to_owned()).await;
        }
        let is_person = self.desk.terminal.is_some();
        if self.looked.is_none_or(|looked| is_person && looked.elapsed() >= LOOK_EVERY) {
            // Without an answer it is sent: the daemon decides.
            let _unknown = self.look().await;
        }
        if self.role == Some(Role::Watcher) {
            if is_person {
                return self.tell(format!("not sent: {}", self.who_types())).await;
            }
            self.tell(format!("the daemon may discard the input: {}", self.who_types())).await;
        }
        if !self.is_refused {
            self.pending.extend(bytes);
        }
    }

    /// Sends what there is room for.
    fn send_pending(&mut self, writable: io::Result<()>) {
        let (next, _) = self.pending.as_slices();
        match writable.and_then(|()| self.input.try_write(next)) {
            Ok(sent) => drop(self.pending.drain(..sent)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The end of its output, which comes next, says that the daemon has gone.
            Err(_gone) => {
                self.is_refused = true;
                self.pending.clear();
            }
        }
    }

    async fn obey(&mut self, command: Command) {
        let key = self.desk.key;
        let lines = match command {
            Command::Help => help(key),
            Command::Unknown(other) => {
                vec![format!("{key} {} means nothing; {key} ? for help", key_name(other))]
            }
            Command::Who => match self.desk.operator.who().await {
                Ok(who) => who.table(self.desk.operator.viewer()),
                Err(error) => vec![error.to_string()],
            },
            Command::TakeOver if self.desk.watch => vec!["--watch only watches".to_owned()],
            Command::TakeOver => match self.desk.operator.take_over().await {
                Ok(()) => {
                    self.role = None;
                    let _unknown = self.look().await;
                    vec!["you type now".to_owned()]
                }
                Err(error) => vec![error.to_string()],
            },
            Command::Release => match self.desk.operator.release().await {
                Ok(()) => {
                    let _unknown = self.look().await;
                    vec![format!("released: {}", self.who_types())]
                }
                Err(error) => vec![error.to_string()],
            },
            // Not a command that is obeyed and gone on from: see `typed`.
            Command::Detach => Vec::new(),
        };
        self.desk.screen.notice(&lines).await;
    }

    async fn first_look(&mut self) {
        for _ in 0..FIRST_LOOKS {
            match self.look().await {
                Err(OperatorError::Refused(_)) => sleep(FIRST_LOOK_PAUSE).await,
                _ => break,
            }
        }
        if self.role == Some(Role::Watcher) {
            self.tell(self.who_types()).await;
        }
    }

    /// Asks who types. Whoever has become the writer tells the guest the window's size.
    async fn look(&mut self) -> Result<(), OperatorError> {
        let was = self.role.take();
        let who = self.desk.operator.who().await;
        self.looked = Some(Instant::now());
        let who = who?;
        self.role = Some(who.role);
        self.writer = who.writer();
        let size = self.desk.terminal.and_then(Terminal::size);
        if let (Role::Writer, Some(size)) = (who.role, size.filter(|_| was != self.role)) {
            // A console without a size is no reason to disturb whoever looks at it.
            let _refused = self.desk.operator.size(&who.port, size).await;
        }
        Ok(())
    }

    async fn resized(&mut self) {
        if !self.desk.watch {
            self.role = None;
            let _unknown = self.look().await;
        }
    }

    fn who_types(&self) -> String {
        let writer = match (&self.writer, self.role) {
            (_, Some(Role::Writer)) => "you type".to_owned(),
            (Some(writer), _) => format!("{writer} types, you watch"),
            (None, _) => "nobody types, you watch".to_owned(),
        };
        let key = self.desk.key;
        let can_take_over = self.desk.terminal.is_some() && !key.is_none();
        match self.role {
            Some(Role::Watcher) if can_take_over => format!("{writer}; {key} t takes over"),
            _ => writer,
        }
    }

    /// Tells a person what need not be said at every key.
    async fn tell(&mut self, line: String) {
        if self.told.is_none_or(|told| told.elapsed() >= LOOK_EVERY) {
            self.told = Some(Instant::now());
            self.desk.screen.notice(&[line]).await;
        }
    }
}

async fn next_piece(keyboard: &mut Option<Keyboard>) -> Option<io::Result<Vec<u8>>> {
    match keyboard {
        Some(keyboard) => keyboard.next().await,
        None => pending().await,
    }
}

/// The next signal of a kind that is caught.
async fn next_signal(caught: &mut Option<Signal>) {
    if let Some(signal) = caught
        && signal.recv().await.is_some()
    {
        return;
    }
    pending().await
}
