//! The lines on the console by which a guest tells the host, before its verdict, how far it has come.

use std::fmt;

/// What every announcement begins with; nothing else in a guest prints it.
const MARK: &str = "OUTBOARD-ANNOUNCES:";
/// What ends one: a number whose last digits died with the machine is none.
const END: &str = ".";

/// How far a check has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// The load has come as far as the host may wait for: its requests are in flight.
    Loaded,
    /// So many files, the first ones, are stable: written, synchronized, and so is their directory.
    Durable(u64),
    /// The kernel has told its programs that the disk has so many bytes.
    SizeBytes(u64),
}

impl Announcement {
    /// Reads a console line, which may have a kernel's message before the mark. `None` if it is no announcement.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, words) = line.split_once(MARK)?;
        let mut words = words.split_whitespace();
        match (words.next()?, words.next()?, words.next()) {
            ("loaded", END, None) => Some(Self::Loaded),
            ("durable", count, Some(END)) => Some(Self::Durable(count.parse().ok()?)),
            ("size_bytes", size, Some(END)) => Some(Self::SizeBytes(size.parse().ok()?)),
            _ => None,
        }
    }
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loaded => write!(f, "{MARK} loaded {END}"),
            Self::Durable(count) => write!(f, "{MARK} durable {count} {END}"),
            Self::SizeBytes(size) => write!(f, "{MARK} size_bytes {size} {END}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Announcement;

    #[test]
    fn an_announcement_survives_its_own_line() {
        for announcement in
            [Announcement::Loaded, Announcement::Durable(17), Announcement::SizeBytes(1 << 30)]
        {
            assert_eq!(Announcement::parse(&announcement.to_string()), Some(announcement));
        }
    }

    #[test]
    fn a_line_that_was_cut_off_announces_nothing() {
        let whole = Announcement::Durable(17).to_string();
        for len in 0..whole.len() {
            assert_eq!(Announcement::parse(&whole[..len]), None, "{}", &whole[..len]);
        }
    }
}
