//! How limits are written: `[total=|read=|write=]RATE[/BURST]`, one or several with commas between.
//!
//! Contract: one parser for options and commands, which yields a [`Change`]: limits that are not
//! named stay as they are. `none` in place of a rate takes a limit away, and by itself, without a
//! name, all that there are of its unit.

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

impl Unit {
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

/// What is to become of the limits of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// In the order of [`Scope::ALL`]; `None` leaves a limit as it is.
    wanted: [Option<Limit>; SCOPES],
}

/// Why a text is no limit.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SpecError {
    #[error("{name:?} is none of total, read and write")]
    Scope { name: String },
    #[error("{name} is given twice")]
    Twice { name: &'static str },
    #[error("{text:?} is no {what}: expected a number, or one of k, M, G or T (powers of {step})")]
    Number { text: String, what: &'static str, step: u64 },
    #[error("a {what} is from {least} to 2^50, not {text}")]
    Range { text: String, what: &'static str, least: u64 },
    #[error("no limit has no burst: {text:?}")]
    BurstOfNone { text: String },
}

impl Change {
    /// Reads `total=100,write=50/200`, `100`, `none`, `read=none` and their like.
    ///
    /// # Errors
    /// The text is of another form.
    pub fn parse(text: &str, unit: Unit) -> Result<Self, SpecError> {
        if text == "none" {
            return Ok(Self { wanted: [Some(Limit::None); SCOPES] });
        }
        let mut change = Self::default();
        for part in text.split(',') {
            let (scope, limit) = match part.split_once('=') {
                Some((name, limit)) => (scope(name)?, limit),
                None => (Scope::Total, part),
            };
            let limit = limit_of(limit, unit)?;
            let wanted = Scope::ALL.into_iter().zip(&mut change.wanted);
            for (_, wanted) in wanted.filter(|(other, _)| *other == scope) {
                if wanted.replace(limit).is_some() {
                    return Err(SpecError::Twice { name: scope.name() });
                }
            }
        }
        Ok(change)
    }

    /// What is wanted, in the order of [`Scope::ALL`].
    pub(super) fn wanted(&self) -> [Option<Limit>; SCOPES] {
        self.wanted
    }
}

fn scope(name: &str) -> Result<Scope, SpecError> {
    let found = Scope::ALL.into_iter().find(|scope| scope.name() == name);
    found.ok_or_else(|| SpecError::Scope { name: name.to_owned() })
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

    use super::{Change, Limit, SpecError, Unit};

    fn at(rate: u64, burst: u64) -> Option<Limit> {
        let rate = NonZeroU64::new(rate).expect("a rate is not 0");
        Some(Limit::At { rate, burst: NonZeroU64::new(burst) })
    }

    fn operations(text: &str) -> Result<[Option<Limit>; 3], SpecError> {
        Change::parse(text, Unit::Operations).map(|change| change.wanted())
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
        let bytes = Change::parse("read=2k/3M,write=1G,1T", Unit::Bytes).unwrap();
        assert_eq!(bytes.wanted(), [at(1 << 40, 0), at(2048, 3 << 20), at(1 << 30, 0)]);
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
            ("read=1,read=2", "read is given twice"),
            ("1,total=2", "total is given twice"),
            ("none,1", "total is given twice"),
            ("none/5", "no limit has no burst"),
        ] {
            let error = operations(text).expect_err(text).to_string();
            assert!(error.contains(said), "{text:?}: {error}");
        }
        let error = Change::parse("511", Unit::Bytes).expect_err("too slow").to_string();
        assert_eq!(error, "a rate is from 512 to 2^50, not 511");
        let error = Change::parse("1x", Unit::Bytes).expect_err("no suffix").to_string();
        assert!(error.contains("powers of 1024"), "{error}");
    }
}
