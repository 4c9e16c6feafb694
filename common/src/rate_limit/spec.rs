//! How limits are written: `[NAME=]RATE[/BURST]`, one or several with commas between.
//!
//! Contract: one parser for options and commands, which yields a [`Change`]: limits that are not
//! named stay as they are. `none` in place of a rate takes a limit away, and by itself, without a
//! name, all that there are of its [`Topic`]. The table of topics says which names there are, and is
//! what metrics call limits by.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::num::NonZeroU64;

use super::{SCOPES, Scope};

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Operations in a second.
    Operations,
    /// Bytes in a second.
    Bytes,
}

const UNITS: usize = 2;

impl Unit {
    /// Both.
    pub(crate) const ALL: [Self; UNITS] = [Self::Operations, Self::Bytes];

    /// What a step from one suffix to the next is.
    fn step(self) -> u64 {
        match self {
            Self::Operations => 1000,
            Self::Bytes => 1024,
        }
    }

    /// The smallest rate. A sector a second is slow enough for any purpose; at less, one request
    /// would hold its queue for hours.
    fn least(self) -> u64 {
        match self {
            Self::Operations => 1,
            Self::Bytes => 512,
        }
    }
}

/// The largest rate and burst: more than any device does, and far from where sums overflow.
const MOST: u64 = 1 << 50;

/// A limit, or that there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// No limit.
    None,
    /// So much in a second.
    At {
        /// In a second.
        rate: NonZeroU64,
        /// What may come at once after a pause; `None`: as little as keeps the rate.
        burst: Option<NonZeroU64>,
    },
}

/// Limits that an option, and a member of the command `limit`, sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// A disk's operations.
    Iops,
    /// A disk's bytes.
    Bps,
    /// What a network device receives.
    Rx,
    /// What a network device sends.
    Tx,
}

/// One limit of a topic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    /// What it is called in the topic.
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    pub(crate) scope: Scope,
    /// What the metric's label `direction` says.
    pub(crate) direction: &'static str,
}

impl Topic {
    /// What the option and the command's member are called, and the key in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "iops",
            Self::Bps => "bps",
            Self::Rx => "rx",
            Self::Tx => "tx",
        }
    }

    /// Its limits; the first one is meant where no name is given.
    pub(crate) fn terms(self) -> Vec<Term> {
        let of_disk = |unit| {
            let scopes =
                [("total", Scope::Total), ("read", Scope::ToDriver), ("write", Scope::FromDriver)];
            scopes.map(|(name, scope)| Term { name, unit, scope, direction: name }).to_vec()
        };
        let of_network = |scope| {
            let units = [("bytes", Unit::Bytes), ("frames", Unit::Operations)];
            let direction = self.name();
            units.map(|(name, unit)| Term { name, unit, scope, direction }).to_vec()
        };
        match self {
            Self::Iops => of_disk(Unit::Operations),
            Self::Bps => of_disk(Unit::Bytes),
            Self::Rx => of_network(Scope::ToDriver),
            Self::Tx => of_network(Scope::FromDriver),
        }
    }
}

/// What is to become of limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// By [`Unit`] and [`Scope`]; `None` leaves a limit as it is.
    wanted: [[Option<Limit>; SCOPES]; UNITS],
}

/// Why a text is no limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SpecError {
    #[error("{name:?} is none of {}", Names(*topic))]
    Name { name: String, topic: Topic },
    #[error("{name} is given twice")]
    Twice { name: &'static str },
    #[error("{text:?} is no {what}: expected a number, or one of k, M, G or T (powers of {step})")]
    Number { text: String, what: &'static str, step: u64 },
    #[error("a {what} is from {least} to 2^50, not {text}")]
    Range { text: String, what: &'static str, least: u64 },
    #[error("no limit has no burst: {text:?}")]
    BurstOfNone { text: String },
}

/// The names of a topic's limits, for a message.
struct Names(Topic);

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.0.terms().iter().map(|term| term.name).collect();
        match names.split_last() {
            Some((last, others)) => write!(f, "{} and {last}", others.join(", ")),
            None => Ok(()),
        }
    }
}

impl Change {
    /// Reads `total=100,write=50/200`, `100`, `none`, `read=none` and their like.
    ///
    /// # Errors
    /// The text is of another form.
    pub fn parse(text: &str, topic: Topic) -> Result<Self, SpecError> {
        let mut change = Self::default();
        if text == "none" {
            for term in topic.terms() {
                change.want(term, Limit::None)?;
            }
            return Ok(change);
        }
        for part in text.split(',') {
            let (name, limit) = match part.split_once('=') {
                Some((name, limit)) => (Some(name), limit),
                None => (None, part),
            };
            let mut terms = topic.terms().into_iter();
            let term = terms.find(|term| name.is_none_or(|name| name == term.name));
            let unknown = || SpecError::Name { name: name.unwrap_or_default().to_owned(), topic };
            let term = term.ok_or_else(unknown)?;
            change.want(term, limit_of(limit, term.unit)?)?;
        }
        Ok(change)
    }

    fn want(&mut self, term: Term, limit: Limit) -> Result<(), SpecError> {
        let cells = self.wanted.get_mut(term.unit as usize);
        let cell = cells.and_then(|cells| cells.get_mut(term.scope as usize));
        match cell.and_then(|cell| cell.replace(limit)) {
            Some(_before) => Err(SpecError::Twice { name: term.name }),
            None => Ok(()),
        }
    }

    /// Adds what another change names; where both name a limit, the other is right.
    pub fn and(&mut self, other: &Self) {
        let cells = self.wanted.iter_mut().flatten().zip(other.wanted.iter().flatten());
        for (cell, other) in cells {
            *cell = other.or(*cell);
        }
    }

    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.wanted.iter().flatten().all(Option::is_none)
    }

    /// What is wanted of a unit, by [`Scope`].
    pub(super) fn wanted(&self, unit: Unit) -> [Option<Limit>; SCOPES] {
        self.wanted.get(unit as usize).copied().unwrap_or_default()
    }
}

fn limit_of(text: &str, unit: Unit) -> Result<Limit, SpecError> {
    let (rate, burst) = match text.split_once('/') {
        Some((rate, burst)) => (rate, Some(burst)),
        None => (text, None),
    };
    match (rate, burst) {
        ("none", None) => Ok(Limit::None),
        ("none", Some(_)) => Err(SpecError::BurstOfNone { text: text.to_owned() }),
        _ => Ok(Limit::At {
            rate: number(rate, unit, "rate", unit.least())?,
            burst: burst.map(|burst| number(burst, unit, "burst", 1)).transpose()?,
        }),
    }
}

fn number(text: &str, unit: Unit, what: &'static str, least: u64) -> Result<NonZeroU64, SpecError> {
    let step = unit.step();
    let refused = || SpecError::Number { text: text.to_owned(), what, step };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let steps = match text.strip_prefix(digits).unwrap_or_default() {
        "" => 0,
        "k" | "K" => 1,
        "M" => 2,
        "G" => 3,
        "T" => 4,
        _ => return Err(refused()),
    };
    // `u64::from_str` takes a leading plus sign, which no rate has.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(refused());
    }
    let range = || SpecError::Range { text: text.to_owned(), what, least };
    let count = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(step.pow(steps)));
    let count = count.filter(|count| (least..=MOST).contains(count));
    count.and_then(NonZeroU64::new).ok_or_else(range)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::{Change, Limit, SpecError, Topic, Unit};

    fn at(rate: u64, burst: u64) -> Option<Limit> {
        let rate = NonZeroU64::new(rate).expect("a rate is not 0");
        Some(Limit::At { rate, burst: NonZeroU64::new(burst) })
    }

    fn operations(text: &str) -> Result<[Option<Limit>; 3], SpecError> {
        Change::parse(text, Topic::Iops).map(|change| change.wanted(Unit::Operations))
    }

    #[test]
    fn limits_are_named_or_of_the_total() {
        assert_eq!(operations("1000"), Ok([at(1000, 0), None, None]));
        assert_eq!(operations("read=2000,write=500/4000"), Ok([None, at(2000, 0), at(500, 4000)]));
        assert_eq!(
            operations("write=1,7/8,read=none"),
            Ok([at(7, 8), Some(Limit::None), at(1, 0)])
        );
        assert_eq!(operations("none"), Ok([Some(Limit::None); 3]));
        assert_eq!(operations("total=none"), Ok([Some(Limit::None), None, None]));
    }

    #[test]
    fn suffixes_are_powers_of_the_unit_s_step() {
        assert_eq!(operations("2k/3M"), Ok([at(2000, 3_000_000), None, None]));
        let bytes = Change::parse("read=2k/3M,write=1G,1T", Topic::Bps).unwrap();
        assert_eq!(bytes.wanted(Unit::Bytes), [at(1 << 40, 0), at(2048, 3 << 20), at(1 << 30, 0)]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, said) in [
            ("", "\"\" is no rate"),
            ("fast", "\"fast\" is no rate"),
            ("1.5k", "\"1.5k\" is no rate"),
            ("-1", "\"-1\" is no rate"),
            ("+1", "\"+1\" is no rate"),
            ("1000,", "\"\" is no rate"),
            ("1 k", "\"1 k\" is no rate"),
            ("5/", "\"\" is no burst"),
            ("5/6/7", "\"6/7\" is no burst"),
            ("5/0", "a burst is from 1"),
            ("0", "a rate is from 1"),
            ("2000T", "not 2000T"),
            ("99999999999999999999T", "a rate is from 1"),
            ("rx=5", "\"rx\" is none of total, read and write"),
            ("=5", "\"\" is none of total"),
            ("read=1,read=2", "read is given twice"),
            ("1,total=2", "total is given twice"),
            ("none,1", "total is given twice"),
            ("none/5", "no limit has no burst"),
        ] {
            let error = operations(text).expect_err(text).to_string();
            assert!(error.contains(said), "{text:?}: {error}");
        }
        let error = Change::parse("511", Topic::Bps).expect_err("too slow").to_string();
        assert_eq!(error, "a rate is from 512 to 2^50, not 511");
        let error = Change::parse("1x", Topic::Bps).expect_err("no suffix").to_string();
        assert!(error.contains("powers of 1024"), "{error}");
    }

    #[test]
    fn network_s_limits_are_of_bytes_and_frames_in_one_direction() {
        let rx = Change::parse("10M/1G,frames=2k", Topic::Rx).unwrap();
        assert_eq!(rx.wanted(Unit::Bytes), [None, at(10 << 20, 1 << 30), None]);
        assert_eq!(rx.wanted(Unit::Operations), [None, at(2000, 0), None]);
        let tx = Change::parse("none", Topic::Tx).unwrap();
        assert_eq!(tx.wanted(Unit::Bytes), [None, None, Some(Limit::None)]);
        assert_eq!(tx.wanted(Unit::Operations), [None, None, Some(Limit::None)]);
        let error = Change::parse("read=5", Topic::Rx).expect_err("a disk's word").to_string();
        assert_eq!(error, "\"read\" is none of bytes and frames");
        assert!(Change::parse("bytes=511", Topic::Tx).is_err());
        assert!(Change::parse("frames=1", Topic::Tx).is_ok());
    }

    #[test]
    fn later_change_goes_over_an_earlier_one() {
        let mut change = Change::parse("read=1,write=2", Topic::Iops).unwrap();
        assert!(!change.is_empty() && Change::default().is_empty());
        change.and(&Change::parse("write=3", Topic::Iops).unwrap());
        change.and(&Change::parse("4k", Topic::Bps).unwrap());
        assert_eq!(change.wanted(Unit::Operations), [None, at(1, 0), at(3, 0)]);
        assert_eq!(change.wanted(Unit::Bytes), [at(4096, 0), None, None]);
    }
}
