//! The line on the console that ends a check.

use std::fmt;

/// What every verdict line begins with; nothing else in a guest prints it.
pub const MARK: &str = "OUTBOARD-VERDICT:";

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passed; what it found is for the host to compare.
    Pass(String),
    /// It failed, for this reason.
    Fail(String),
}

impl Verdict {
    /// Reads a console line, which may have a kernel's message before the mark. `None` if it is no verdict.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, verdict) = line.split_once(MARK)?;
        let verdict = verdict.trim();
        match verdict.split_once(' ').unwrap_or((verdict, "")) {
            ("pass", details) => Some(Self::Pass(details.to_owned())),
            ("fail", reason) => Some(Self::Fail(reason.to_owned())),
            _ => None,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass(details) => write!(f, "{MARK} pass {details}"),
            Self::Fail(reason) => write!(f, "{MARK} fail {reason}"),
        }
    }
}

/// The value of the word `name=value` among a verdict's details.
pub fn word<'a>(details: &'a str, name: &str) -> Option<&'a str> {
    details.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::{Verdict, word};

    #[test]
    fn words_are_found_by_their_whole_names() {
        assert_eq!(word("in_all=1 in=2", "in"), Some("2"));
        assert_eq!(word("in_all=1", "in"), None);
    }

    #[test]
    fn a_verdict_survives_its_own_line() {
        for verdict in [Verdict::Pass("sha 12".into()), Verdict::Fail("no disk".into())] {
            assert_eq!(Verdict::parse(&verdict.to_string()), Some(verdict));
        }
    }

    #[test]
    fn kernel_messages_are_no_verdict() {
        assert_eq!(Verdict::parse("reboot: System halted"), None);
        assert_eq!(Verdict::parse("OUTBOARD-VERDICT: perhaps"), None);
    }
}
