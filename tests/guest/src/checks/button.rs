//! The power button: it is pressed, and the machine powers off as after any check. Until then there is a shell on its console,
//! if it has one.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use guest::announcement::Announcement;
use rustix::fs::OFlags;

use super::Failure;
use super::console::{install_commands, shell};

/// The first input device: these machines have no other.
const DEVICE: &str = "/dev/input/event0";
const CONSOLE: &str = "/dev/hvc0";
/// `struct input_event`: a time, a type, a code and a value.
const EVENT_BYTES: usize = 24;
const TYPE_AT: usize = 16;
/// The type of a key, and the button's code (`linux/input-event-codes.h`).
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

pub(super) fn run() -> Result<String, Failure> {
    let mut button = File::open(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
    if Path::new(CONSOLE).exists() {
        start_shell()?;
    }
    println!("{}", Announcement::Loaded);
    let mut event = [0; EVENT_BYTES];
    button.read_exact(&mut event)?;
    let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
    match (word(TYPE_AT), word(TYPE_AT + 2)) {
        (EV_KEY, KEY_POWER) => Ok("the button was pressed".into()),
        other => Err(format!("another event came: {other:?}").into()),
    }
}

/// It ends with the machine.
fn start_shell() -> Result<(), Failure> {
    install_commands()?;
    // It becomes the terminal of the shell's own session, not of this process.
    let flags = i32::try_from(OFlags::NOCTTY.bits())?;
    let console = OpenOptions::new().read(true).write(true).custom_flags(flags).open(CONSOLE)?;
    let (input, output) = (console.try_clone()?, console.try_clone()?);
    shell("exec setsid -c sh -i").stdin(input).stdout(output).stderr(console).spawn()?;
    Ok(())
}
