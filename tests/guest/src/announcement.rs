//! The lines on the console by which a guest tells the host, before its verdict, how far it has come.

use std::fmt;

use crate::throughput::Throughput;

/// What every announcement begins with; nothing else in a guest prints it.
const MARK: &str = "OUTBOARD-ANNOUNCES:";
/// What ends one: a number whose last digits died with the machine is none.
const END: &str = ".";

/// The requests that the check "rate" has in flight at most.
pub const MOST_IN_FLIGHT: u64 = 32;

/// How far a check has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// The load has come as far as the host may wait for: its requests are in flight.
    Loaded,
    /// So many files, the first ones, are stable: written, synchronized, and so is their directory.
    Durable(u64),
    /// The kernel has told its programs that the disk has so many bytes.
    SizeBytes(u64),
    /// A run of requests has been measured.
    Measured(Measurement),
    /// What the host has asked for is done.
    Done,
    /// What the host has asked for is this number.
    Found(u64),
    /// The load that the host has asked for has moved so much.
    Moved(Throughput),
}

/// What a run of requests came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// How many there were.
    pub requests: u64,
    /// From the first one's beginning to the last one's end.
    pub time_us: u64,
    /// The fewest that ended within 100 ms.
    pub least_in_window: u64,
    /// The most that ended within 100 ms.
    pub most_in_window: u64,
}

impl Announcement {
    /// Reads a console line, which may have a kernel's message before the mark. `None` if it is no announcement.
    pub fn parse(line: &str) -> Option<Self> {
        let (_, words) = line.split_once(MARK)?;
        let (words, after) = words.split_once(END)?;
        let mut words = words.split_whitespace();
        let name = words.next()?;
        let numbers: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
        match (name, &*numbers, after) {
            ("loaded", [], "") => Some(Self::Loaded),
            ("durable", [count], "") => Some(Self::Durable(*count)),
            ("size_bytes", [size], "") => Some(Self::SizeBytes(*size)),
            ("measured", &[requests, time_us, least_in_window, most_in_window], "") => {
                let measurement =
                    Measurement { requests, time_us, least_in_window, most_in_window };
                Some(Self::Measured(measurement))
            }
            ("done", [], "") => Some(Self::Done),
            ("found", [number], "") => Some(Self::Found(*number)),
            ("moved", &[sent_bytes, received_bytes, bits_per_second], "") => {
                Some(Self::Moved(Throughput { sent_bytes, received_bytes, bits_per_second }))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Announcement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loaded => write!(f, "{MARK} loaded {END}"),
            Self::Durable(count) => write!(f, "{MARK} durable {count} {END}"),
            Self::Measured(found) => write!(
                f,
                "{MARK} measured {} {} {} {} {END}",
                found.requests, found.time_us, found.least_in_window, found.most_in_window
            ),
            Self::SizeBytes(size) => write!(f, "{MARK} size_bytes {size} {END}"),
            Self::Done => write!(f, "{MARK} done {END}"),
            Self::Found(number) => write!(f, "{MARK} found {number} {END}"),
            Self::Moved(Throughput { sent_bytes, received_bytes, bits_per_second }) => {
                write!(f, "{MARK} moved {sent_bytes} {received_bytes} {bits_per_second} {END}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Announcement, Measurement};
    use crate::throughput::Throughput;

    #[test]
    fn an_announcement_survives_its_own_line() {
        let measurement =
            Measurement { requests: 1, time_us: 2, least_in_window: 3, most_in_window: 4 };
        for announcement in [
            Announcement::Loaded,
            Announcement::Durable(17),
            Announcement::SizeBytes(1 << 30),
            Announcement::Measured(measurement),
            Announcement::Done,
            Announcement::Found(1),
            Announcement::Moved(Throughput {
                sent_bytes: 1,
                received_bytes: 2,
                bits_per_second: 3,
            }),
        ] {
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
