//! What a run of iperf3 came to, as it says itself and as one word of the console says it.

use std::fmt;

use serde_json::Value;

/// A run of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throughput {
    /// What the sender has sent.
    pub sent_bytes: u64,
    /// What the receiver has received meanwhile: less, where some was still under way at the end, or was lost.
    pub received_bytes: u64,
    /// What the receiver has received in a second.
    pub bits_per_second: u64,
}

impl Throughput {
    /// Reads what `iperf3 --json` prints.
    ///
    /// # Errors
    /// What iperf3 says went wrong, or in what it is not as expected.
    pub fn from_iperf(said: &str) -> Result<Self, String> {
        let said: Value =
            serde_json::from_str(said).map_err(|error| format!("{error}: {said:?}"))?;
        if let Some(error) = said.get("error") {
            return Err(error.to_string());
        }
        let number = |sum: &str, name: &str| {
            let number = &said["end"][sum][name];
            let whole = number.as_u64().or_else(|| number.as_f64().map(|number| number as u64));
            whole.ok_or_else(|| format!("iperf3 says no end.{sum}.{name}: {}", said["end"]))
        };
        Ok(Self {
            sent_bytes: number("sum_sent", "bytes")?,
            received_bytes: number("sum_received", "bytes")?,
            bits_per_second: number("sum_received", "bits_per_second")?,
        })
    }

    /// Reads what `Display` writes. `None` if it is something else.
    pub fn parse(word: &str) -> Option<Self> {
        let numbers: Vec<u64> = word.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
        let &[sent_bytes, received_bytes, bits_per_second] = &*numbers else { return None };
        Some(Self { sent_bytes, received_bytes, bits_per_second })
    }
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.sent_bytes, self.received_bytes, self.bits_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::Throughput;

    #[test]
    fn throughput_survives_its_own_word() {
        let found = Throughput { sent_bytes: 1, received_bytes: 2, bits_per_second: 3 };
        assert_eq!(Throughput::parse(&found.to_string()), Some(found));
        assert_eq!(Throughput::parse("1,2"), None);
    }

    #[test]
    fn what_iperf_says_went_wrong_is_the_error() {
        let said = r#"{"start": {}, "end": {}, "error": "unable to connect"}"#;
        assert_eq!(Throughput::from_iperf(said), Err(r#""unable to connect""#.into()));
        assert!(Throughput::from_iperf(r#"{"end": {}}"#).is_err());
        assert!(Throughput::from_iperf("iperf3: error").is_err());
    }

    #[test]
    fn sums_of_the_end_are_read() {
        let said = r#"{"end": {
            "sum_sent": {"bytes": 1048576, "bits_per_second": 9.5e8},
            "sum_received": {"bytes": 1040000, "bits_per_second": 943718400.5}
        }}"#;
        let expected = Throughput {
            sent_bytes: 1_048_576,
            received_bytes: 1_040_000,
            bits_per_second: 943_718_400,
        };
        assert_eq!(Throughput::from_iperf(said), Ok(expected));
    }
}
