//! The terminal at stdin: raw while somebody is attached, and as it was afterwards.
//!
//! Contract: whoever has a [`Terminal`] has it raw; when that is dropped, or the process panics (which aborts it, and drops
//! nothing), the terminal is as it was. Signals that end the process are the session's to catch: it ends then, and the
//! guard goes with it. Nothing here waits for a terminal that takes no output.
//!
//! What it deliberately does not do: be stopped by `^Z`, which is the guest's key; after a SIGSTOP from elsewhere,
//! [`Terminal::make_raw`] is for the SIGCONT that follows.

use std::io::{self, IsTerminal};
use std::panic;
use std::sync::{Mutex, Once, PoisonError, TryLockError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// How stdin was. Here, and not in the guard, since a panic hook must find it; the process has one stdin.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

static PANIC_HOOK: Once = Once::new();

/// A raw terminal, until it is dropped.
#[derive(Debug)]
pub(super) struct Terminal(());

impl Terminal {
    /// Makes the terminal at stdin raw; none if there is no terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        PANIC_HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |panic| {
                restore();
                previous(panic);
            }));
        });
        let now = tcgetattr(io::stdin())?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        // From here on it is restored, whatever comes.
        let terminal = Self(());
        terminal.make_raw()?;
        Ok(Some(terminal))
    }

    /// Makes it raw, again if somebody else has changed it meanwhile.
    pub(super) fn make_raw(&self) -> io::Result<()> {
        let mut raw = tcgetattr(io::stdin())?;
        raw.make_raw();
        // Not "drain": that waits until the terminal has shown everything.
        Ok(tcsetattr(io::stdin(), OptionalActions::Now, &raw)?)
    }

    /// The window's columns and rows, where the terminal knows them.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(io::stdin()).ok()?;
        (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let mut before = match BEFORE.try_lock() {
        Ok(before) => before,
        Err(TryLockError::Poisoned(before)) => before.into_inner(),
        // A panic in the few lines that hold the lock: waiting for them would be for ever.
        Err(TryLockError::WouldBlock) => return,
    };
    if let Some(before) = before.take() {
        // A terminal that is gone needs nothing, and there is nobody to tell.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::mem;
    use std::process::{Command, Stdio};

    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    /// Tells this program, started anew by its test, that stdin is a terminal to panic on.
    const PANICS: &str = "OUTBOARD_TEST_PANICS";

    #[test]
    fn panic_restores_the_terminal() {
        if env::var_os(PANICS).is_some() {
            // Released builds drop nothing in a panic.
            mem::forget(Terminal::enter().unwrap().expect("stdin is a terminal"));
            let now = format!("{:?}", tcgetattr(io::stdin()).unwrap());
            panic!("raw: {now}");
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let user = openpt(flags).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let terminal = ioctl_tiocgptpeer(&user, flags).unwrap();
        let before = format!("{:?}", tcgetattr(&terminal).unwrap());
        let output = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "attach::terminal::tests::panic_restores_the_terminal",
                "--nocapture",
            ])
            .env(PANICS, "1")
            .stdin(Stdio::from(terminal.try_clone().unwrap()))
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("raw: "), "it has panicked: {said}");
        assert!(!said.contains(&before), "it was not raw: {said}");
        assert_eq!(format!("{:?}", tcgetattr(&terminal).unwrap()), before);
    }
}
