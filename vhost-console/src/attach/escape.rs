//! What is typed at a terminal: input for the guest, and commands to `attach`, which an escape character begins.
//!
//! Contract: bytes in, in pieces of any size; out come input and commands in the order in which they were typed. How the
//! bytes are cut makes no difference. Without an escape character everything is input. Nothing here can fail, and nothing
//! is kept but whether an escape is under way.
//!
//! What it deliberately does not do: know of time (an escape waits for its key for ever, as one of `telnet` or `ssh` does),
//! or of escape sequences: an arrow key is three bytes like any others.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fmt;
use std::str::FromStr;

/// What Linux's hvc console takes for the SysRq key: the next byte is then the command.
// Linux, drivers/tty/hvc/hvc_console.c, hvc_poll: "^O".
const SYSRQ: u8 = 0x0f;

/// What a control key makes of a character's code: its five lowest bits.
const CONTROL_MASK: u8 = 0x1f;

/// DEL, which terminals write as `^?`.
const DELETE: u8 = 0x7f;

/// The character that begins a command, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EscapeKey(Option<u8>);

impl EscapeKey {
    pub(super) const NONE: Self = Self(None);

    pub(super) fn is_none(self) -> bool {
        self.0.is_none()
    }
}

impl FromStr for EscapeKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match *text.as_bytes() {
            [b'^', b'?'] => Ok(Self(Some(DELETE))),
            [b'^', key] if matches!(key.to_ascii_uppercase(), b'@'..=b'_') => {
                Ok(Self(Some(key & CONTROL_MASK)))
            }
            [byte] if byte.is_ascii() => Ok(Self(Some(byte))),
            _ if text == "none" => Ok(Self(None)),
            _ => Err(format!(
                "{text:?} is no escape character: expected ^ and a key of @ A to Z [ \\ ] ^ _ ?, a single ASCII character, or none"
            )),
        }
    }
}

impl fmt::Display for EscapeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.pad("none"),
            Some(byte) => f.pad(&key_name(byte)),
        }
    }
}

/// How a key is written for a person, with nothing in it that a terminal would obey.
pub(super) fn key_name(byte: u8) -> String {
    match byte {
        DELETE => "^?".to_owned(),
        0..=CONTROL_MASK => format!("^{}", char::from(byte | b'@')),
        b' '..DELETE => char::from(byte).to_string(),
        _ => format!("byte {byte:#04x}"),
    }
}

/// What has been typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// For the guest; never empty.
    Input(Vec<u8>),
    /// For `attach`.
    Command(Command),
}

/// What `attach` itself is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Help,
    Detach,
    TakeOver,
    Release,
    Who,
    /// A key that means nothing.
    Unknown(u8),
}

/// Takes what is typed apart.
#[derive(Debug)]
pub(super) struct Escape {
    key: EscapeKey,
    state: State,
}

#[derive(Debug)]
enum State {
    Plain,
    /// The escape character was typed; a command follows.
    Escaped,
    /// As was the SysRq command; its key follows.
    SysRq,
}

impl Escape {
    pub(super) fn new(key: EscapeKey) -> Self {
        Self { key, state: State::Plain }
    }

    /// The next bytes that were typed.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        for &byte in bytes {
            let is_key = self.key.0 == Some(byte);
            let (next, what) = match self.state {
                State::Plain if is_key => (State::Escaped, None),
                State::Plain => (State::Plain, Some(Ok(vec![byte]))),
                State::Escaped if is_key => (State::Plain, Some(Ok(vec![byte]))),
                State::Escaped if byte == b's' => (State::SysRq, None),
                State::Escaped => (State::Plain, Some(Err(command(byte)))),
                // Whoever wants another command instead can have it.
                State::SysRq if is_key => (State::Escaped, None),
                State::SysRq => (State::Plain, Some(Ok(vec![SYSRQ, byte]))),
            };
            self.state = next;
            match (what, typed.last_mut()) {
                (None, _) => {}
                (Some(Ok(more)), Some(Typed::Input(input))) => input.extend(more),
                (Some(Ok(input)), _) => typed.push(Typed::Input(input)),
                (Some(Err(command)), _) => typed.push(Typed::Command(command)),
            }
        }
        typed
    }
}

/// The command of a key; the help (`help`) lists them.
fn command(key: u8) -> Command {
    match key {
        b'?' => Command::Help,
        b'.' | b'd' => Command::Detach,
        b't' => Command::TakeOver,
        b'r' => Command::Release,
        b'w' => Command::Who,
        other => Command::Unknown(other),
    }
}

/// What the help command shows, a line each.
pub(super) fn help(key: EscapeKey) -> Vec<String> {
    let lines = [
        ("?", "this help"),
        (". or d", "detach; the guest goes on"),
        ("t", "take over: from now on you type, and nobody else"),
        ("r", "release: the keyboard is free for others"),
        ("w", "who is here, and who types"),
        ("s KEY", "SysRq KEY, where the guest's kernel takes it from its console"),
    ];
    let commands = lines.map(|(keys, what)| format!("  {key} {keys:<7} {what}"));
    let itself = format!("  {key} {key:<7} {key} itself");
    commands.into_iter().chain([itself]).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn escape() -> Escape {
        Escape::new("^]".parse().unwrap())
    }

    fn input(bytes: &[u8]) -> Typed {
        Typed::Input(bytes.to_vec())
    }

    #[test]
    fn what_is_typed_is_input_up_to_the_escape() {
        let typed = escape().feed(b"ls\r\x1dwid\x1d.x");
        let wanted = [
            input(b"ls\r"),
            Typed::Command(Command::Who),
            input(b"id"),
            Typed::Command(Command::Detach),
            input(b"x"),
        ];
        assert_eq!(typed, wanted);
    }

    #[test]
    fn each_key_has_its_command() {
        for (key, command) in [
            (b'?', Command::Help),
            (b'.', Command::Detach),
            (b'd', Command::Detach),
            (b't', Command::TakeOver),
            (b'r', Command::Release),
            (b'w', Command::Who),
            (b'x', Command::Unknown(b'x')),
            (0, Command::Unknown(0)),
        ] {
            assert_eq!(escape().feed(&[0x1d, key]), [Typed::Command(command)], "{key}");
        }
    }

    #[test]
    fn escape_twice_is_itself() {
        assert_eq!(escape().feed(b"a\x1d\x1db"), [input(b"a\x1db")]);
    }

    #[test]
    fn sysrq_is_control_o_and_its_key() {
        assert_eq!(escape().feed(b"\x1dsh"), [input(b"\x0fh")]);
        assert_eq!(escape().feed(b"\x1dss"), [input(b"\x0fs")]);
        assert_eq!(escape().feed(b"\x1ds\x1dd"), [Typed::Command(Command::Detach)]);
    }

    #[test]
    fn escape_characters_are_written_as_terminals_do() {
        for (text, byte) in [
            ("^]", 0x1d),
            ("^a", 1),
            ("^A", 1),
            ("^@", 0),
            ("^_", 0x1f),
            ("^?", 0x7f),
            ("~", b'~'),
            ("^", b'^'),
            ("\x1d", 0x1d),
        ] {
            assert_eq!(text.parse(), Ok(EscapeKey(Some(byte))), "{text:?}");
        }
        assert_eq!("none".parse(), Ok(EscapeKey(None)));
        for wrong in ["", "^^^", "^ ", "^1", "ab", "ä", "None"] {
            let error = wrong.parse::<EscapeKey>().expect_err(wrong);
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn keys_are_named_without_what_a_terminal_obeys() {
        for (byte, name) in
            [(0x1d, "^]"), (0x1b, "^["), (0x7f, "^?"), (b'x', "x"), (0xe4, "byte 0xe4")]
        {
            assert_eq!(key_name(byte), name);
        }
        assert_eq!(EscapeKey(Some(0x1d)).to_string(), "^]");
        assert_eq!(EscapeKey(None).to_string(), "none");
    }

    #[test]
    fn help_names_every_command() {
        let help = help("^]".parse().unwrap()).join("\n");
        for keys in ["^] ?", "^] . or d", "^] t", "^] r", "^] w", "^] s KEY", "^] ^]"] {
            assert!(help.contains(keys), "{keys}: {help}");
        }
        assert!(help.lines().all(|line| line.len() <= 80));
    }

    /// All that was typed, with neighbouring input joined: what is left of how it was cut.
    fn joined(pieces: impl IntoIterator<Item = Typed>) -> Vec<Typed> {
        let mut joined: Vec<Typed> = Vec::new();
        for piece in pieces {
            match (joined.last_mut(), piece) {
                (Some(Typed::Input(input)), Typed::Input(more)) => input.extend(more),
                (_, piece) => joined.push(piece),
            }
        }
        joined
    }

    /// Bytes among which the escape and the keys of commands are many.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![Just(0x1d), Just(b's'), Just(b'd'), any::<u8>()];
        proptest::collection::vec(byte, 0..64)
    }

    proptest! {
        #[test]
        fn how_it_is_cut_makes_no_difference(typed in bytes(), cut in 1_usize..9) {
            let mut escape_of_pieces = escape();
            let pieces: Vec<Typed> =
                typed.chunks(cut).flat_map(|piece| escape_of_pieces.feed(piece)).collect();
            prop_assert_eq!(joined(pieces), escape().feed(&typed));
        }

        #[test]
        fn doubled_escapes_carry_any_bytes(wanted in bytes()) {
            let typed: Vec<u8> =
                wanted.iter().flat_map(|byte| if *byte == 0x1d { vec![0x1d; 2] } else { vec![*byte] }).collect();
            let pieces = escape().feed(&typed);
            if wanted.is_empty() {
                prop_assert!(pieces.is_empty());
            } else {
                prop_assert_eq!(pieces, [Typed::Input(wanted)]);
            }
        }

        #[test]
        fn without_an_escape_everything_is_input(typed in bytes()) {
            let pieces = Escape::new(EscapeKey(None)).feed(&typed);
            prop_assert_eq!(pieces, if typed.is_empty() { vec![] } else { vec![Typed::Input(typed)] });
        }
    }
}
