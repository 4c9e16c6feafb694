//! The power button: it is pressed, and the machine powers off as after any check.

use std::fs::File;
use std::io::Read;

use guest::announcement::Announcement;

use super::Failure;

/// The first input device: these machines have no other.
const DEVICE: &str = "/dev/input/event0";
/// `struct input_event`: a time, a type, a code and a value.
const EVENT_BYTES: usize = 24;
const TYPE_AT: usize = 16;
/// The type of a key, and the button's code (`linux/input-event-codes.h`).
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

pub(super) fn run() -> Result<String, Failure> {
    let mut button = File::open(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
    println!("{}", Announcement::Loaded);
    let mut event = [0; EVENT_BYTES];
    button.read_exact(&mut event)?;
    let word = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
    match (word(TYPE_AT), word(TYPE_AT + 2)) {
        (EV_KEY, KEY_POWER) => Ok("the button was pressed".into()),
        other => Err(format!("another event came: {other:?}").into()),
    }
}
