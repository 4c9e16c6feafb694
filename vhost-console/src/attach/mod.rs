//! `vhost-console attach`: a person's terminal, or a script's pipe, at a guest's console.
//!
//! Contract: raw bytes and nothing else go over the console's socket; what is extra (who types, the window's size) goes over
//! the daemon's control socket, and without one everything else works. The terminal is given back as it was, whatever ends
//! the session. Nothing is polled: who only looks at a quiet console uses no CPU.
//!
//! What it deliberately does not do: connect again when the daemon has gone (a shell's loop can), keep a scrollback (the
//! daemon replays, and the terminal has its own), or interpret what the guest says.

mod escape;
mod keyboard;
mod operator;
mod screen;
mod session;
mod terminal;
mod typist;
mod viewer;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use self::escape::EscapeKey;
use self::session::Ending;

/// The control socket's name, beside the console's socket, unless `--control` says otherwise.
const CONTROL_NAME: &str = "control.sock";

/// What a shell adds to the number of the signal that has ended a process.
const SIGNAL_STATUS: u8 = 128;

/// Attach this terminal to a guest's console
///
/// What is typed goes to the guest, and what the guest says is shown, the last of what it said before included. Who attaches first types;
/// those who come while he is there watch, and may take over. The terminal is raw meanwhile: every key is
/// the guest's, but for the escape character, which begins a command. ^] ? lists them.
///
/// Without a terminal at stdin, input and output are copied as they are, without an escape character.
#[derive(Debug, Parser)]
#[command(name = "attach", bin_name = "vhost-console attach", version, after_long_help = EXAMPLES, max_term_width = 100)]
struct Options {
    /// Socket of the console: the PATH of its endpoint=unix:PATH
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// Control socket of the daemon [default: control.sock in the directory of PATH]
    ///
    /// It is needed for taking over, for knowing who types, and for telling the guest the window's size.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Only watch: nothing that is typed goes to the guest
    #[arg(long)]
    watch: bool,

    /// Escape character: ^ and a key, a single character, or none
    #[arg(long, value_name = "CHAR", default_value = "^]")]
    escape: EscapeKey,
}

impl Options {
    fn control(&self) -> PathBuf {
        self.control.clone().unwrap_or_else(|| self.path.with_file_name(CONTROL_NAME))
    }

    /// The escape character: only a person has one.
    fn escape_key(&self, is_person: bool) -> EscapeKey {
        if is_person { self.escape } else { EscapeKey::NONE }
    }
}

/// All of `attach`, with these arguments, the program's name first and `attach` second.
pub(crate) fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    // Usage says "vhost-console attach" for both.
    let options = match Options::try_parse_from(arguments.into_iter().skip(1)) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    match session::run(&options) {
        Ending::Detached | Ending::InputEnded | Ending::Copied => ExitCode::SUCCESS,
        Ending::Signal(number) => ExitCode::from(SIGNAL_STATUS.saturating_add(number)),
        Ending::Failed(why) => {
            // A closed stderr is no reason to panic.
            let _closed = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("vhost-console attach: {why}\n").as_bytes(),
            );
            ExitCode::FAILURE
        }
    }
}

const EXAMPLES: &str = "\
Examples:
  A console, with the control socket beside it:
    vhost-console attach /run/vm1/console.sock

  Only watch, and keep what is shown:
    vhost-console attach --watch /run/vm1/console.sock | tee console.log

  Another escape character, within a session that has ^] already:
    vhost-console attach --escape ^A /run/vm1/console.sock

  A script's commands, and what the guest says, until the console ends:
    vhost-console attach /run/vm1/console.sock <commands >output

Exit status:
  0    detached; or, without a terminal, input and then output have ended
  1    the console has ended, or there is none
  2    the command line is wrong
  128  and the number of the signal that ended it";

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;

    use super::*;

    fn parse_words(words: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(format!("attach {words}").split_whitespace())
    }

    #[test]
    fn definition_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn examples_are_right_and_fit_80_columns() {
        let lines = EXAMPLES.lines().map(str::trim);
        for line in lines.filter(|line| line.starts_with("vhost-console")) {
            let words = line.split(['|', '<']).next().unwrap_or_default();
            let words = words.trim_start_matches("vhost-console attach");
            assert!(parse_words(words).is_ok(), "{line}");
        }
        assert!(EXAMPLES.lines().all(|line| line.len() <= 80));
    }

    #[test]
    fn control_socket_is_beside_the_consoles() {
        for (words, control) in [
            ("/run/vm1/console.sock", "/run/vm1/control.sock"),
            ("console.sock", "control.sock"),
            ("/run/vm1/console.sock --control c", "c"),
        ] {
            assert_eq!(parse_words(words).unwrap().control(), Path::new(control));
        }
    }

    #[test]
    fn options_arrive() {
        let options = parse_words("s").unwrap();
        assert_eq!((options.watch, options.escape), (false, "^]".parse().unwrap()));
        let options = parse_words("--watch --escape none s").unwrap();
        assert!(options.watch && options.escape.is_none());
    }

    #[test]
    fn wrong_usage_has_status_2() {
        for words in ["", "a b", "--escape ab s", "--escape= s", "--what s"] {
            assert_eq!(parse_words(words).expect_err(words).exit_code(), 2, "{words}");
        }
    }
}
