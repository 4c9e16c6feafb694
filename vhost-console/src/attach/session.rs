//! A session: from the connection to its end, and what is said of that.
//!
//! Contract: whatever ends it (the person, the daemon, a signal, a screen that cannot be written to), what was received
//! before is shown, and then the terminal is as it was. A terminal that takes nothing is waited for [`LAST_WORDS_MAX`] at most.
//!
//! Signals are caught only where there is a terminal to restore; elsewhere they do what they do to any program, or to one
//! that was started to ignore them (`nohup`).

use std::future::pending;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

use super::Options;
use super::keyboard::Keyboard;
use super::operator::Operator;
use super::screen::{Screen, Shown};
use super::terminal::Terminal;
use super::typist::{Desk, Typist};
use super::viewer::Viewer;

/// What is read of the console's output at once.
const OUTPUT_BYTES: usize = 64 << 10;

/// How long a terminal may take to show the last of what there is.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// What a guest's program may have left a terminal in, undone: colours, a hidden cursor, application keys, reports of the
/// mouse, bracketed paste. Not the alternate screen: to leave one that was not entered moves the cursor.
const CALM: &[u8] =
    b"\x1b[0m\x1b[?25h\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l";

/// Why a session is over.
#[derive(Debug)]
pub(super) enum Ending {
    /// The person said so.
    Detached,
    /// There is no more input: of a session without a terminal, which goes on showing.
    InputEnded,
    /// Input has ended, and then output.
    Copied,
    /// This signal came.
    Signal(u8),
    /// Something else, in words.
    Failed(String),
}

/// A session with these options.
pub(super) fn run(options: &Options) -> Ending {
    // While it waits, the terminal is as it was, and every signal does what it does.
    let viewer = match Viewer::connect(&options.path, options.watch) {
        Ok(viewer) => viewer,
        Err(error) => {
            let path = options.path.display();
            return Ending::Failed(format!(
                "cannot connect to {path}: {error} (is vhost-console running?)"
            ));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(live(options, viewer))) {
        Ok(ending) => ending,
        Err(error) => Ending::Failed(format!("cannot start: {error}")),
    }
}

async fn live(options: &Options, viewer: Viewer) -> io::Result<Ending> {
    let mut signals = io::stdin().is_terminal().then(Signals::catch).transpose()?;
    if signals.is_some() {
        greet(options);
    }
    let terminal = Terminal::enter()?;
    let (screen, mut shown) = Screen::start(terminal.is_some())?;
    let Viewer { stream, id } = viewer;
    stream.set_nonblocking(true)?;
    let (output, input) = UnixStream::from_std(stream)?.into_split();
    let is_read = terminal.is_some() || !options.watch;
    let desk = Desk {
        keyboard: is_read.then(Keyboard::start).transpose()?,
        terminal: terminal.as_ref(),
        screen: &screen,
        operator: Operator::new(options.control(), id),
        key: options.escape_key(terminal.is_some()),
        watch: options.watch,
    };
    let ending = {
        let mut show = pin!(show(output, &screen));
        let mut interrupted = pin!(interrupted(&mut signals, terminal.as_ref()));
        let ending = tokio::select! {
            () = &mut show => gone(&options.path),
            ending = Typist::new(desk, input).run() => ending,
            number = &mut interrupted => Ending::Signal(number),
            ended = &mut shown => return Ok(unshown(ended)),
        };
        match ending {
            Ending::InputEnded => tokio::select! {
                () = &mut show => Ending::Copied,
                number = &mut interrupted => Ending::Signal(number),
                ended = &mut shown => return Ok(unshown(ended)),
            },
            ending => ending,
        }
    };
    Ok(finish(ending, screen, shown, terminal).await)
}

/// The one line before everything else.
fn greet(options: &Options) {
    let path = options.path.display();
    let watching = if options.watch { ", to watch" } else { "" };
    let key = options.escape;
    let line = if key.is_none() {
        format!("connected to {path}{watching}; there is no escape\n")
    } else {
        format!("connected to {path}{watching}; escape is {key}; {key} ? for help\n")
    };
    // A closed stderr is no reason to end.
    let _closed = io::Write::write_all(&mut io::stderr(), line.as_bytes());
}

/// Shows what the console says, to its end.
async fn show(output: OwnedReadHalf, screen: &Screen) {
    let mut bytes = vec![0; OUTPUT_BYTES];
    loop {
        // An error is an end, too: the daemon was killed with input that it had not read.
        if output.readable().await.is_err() {
            return;
        }
        match output.try_read(&mut bytes) {
            Ok(0) => return,
            Ok(length) => screen.output(bytes.iter().take(length).copied().collect()).await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_gone) => return,
        }
    }
}

/// Shows what there still is, and restores the terminal.
async fn finish(
    ending: Ending,
    screen: Screen,
    shown: Shown,
    terminal: Option<Terminal>,
) -> Ending {
    if terminal.is_none() {
        drop(screen);
        return match shown.await {
            Ok(Ok(())) => ending,
            ended => unshown(ended),
        };
    }
    let last_words = async {
        if io::stdout().is_terminal() {
            screen.output(CALM.to_vec()).await;
        }
        let line = matches!(ending, Ending::Detached).then(|| "detached".to_owned());
        screen.notice(line.as_slice()).await;
        drop(screen);
        // There is no other place to say anything.
        let _unshown = shown.await;
    };
    let _too_slow = timeout(LAST_WORDS_MAX, last_words).await;
    drop(terminal);
    ending
}

fn gone(path: &Path) -> Ending {
    Ending::Failed(format!(
        "{} has closed the connection: its daemon has ended, or takes no more clients",
        path.display()
    ))
}

fn unshown(ended: Result<io::Result<()>, impl std::fmt::Display>) -> Ending {
    let why = match ended {
        Ok(Ok(())) => "its end".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    Ending::Failed(format!("output cannot be written: {why}"))
}

/// Waits for a signal that ends the session.
async fn interrupted(signals: &mut Option<Signals>, terminal: Option<&Terminal>) -> u8 {
    let Some(signals) = signals else { return pending().await };
    loop {
        let number = tokio::select! {
            Some(()) = signals.hang_up.recv() => SignalKind::hangup(),
            Some(()) = signals.interrupt.recv() => SignalKind::interrupt(),
            Some(()) = signals.quit.recv() => SignalKind::quit(),
            Some(()) = signals.terminate.recv() => SignalKind::terminate(),
            Some(()) = signals.proceed.recv() => {
                // The shell has had the terminal while we were stopped. What cannot be made raw has gone, which
                // reading it will tell.
                let _gone = terminal.map(Terminal::make_raw);
                continue;
            }
            else => return pending().await,
        };
        return u8::try_from(number.as_raw_value()).unwrap_or(u8::MAX);
    }
}

struct Signals {
    hang_up: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    proceed: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            proceed: signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()))?,
        })
    }
}
