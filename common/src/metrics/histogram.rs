//! How long requests took: a log-linear histogram with fixed buckets.
//!
//! Each power of two of nanoseconds is cut into four equal buckets, so a quantile read from it is
//! at most 25 % above the true value, at any magnitude, and recording is a handful of instructions
//! without a branch or an allocation. The range is 256 ns (below it the clock itself is the larger
//! part) to about 69 s (above it a request is lost, not slow); what lies outside is counted in the
//! first and the last bucket. The contract is that of [`Counter`]: one writer, any reader. It
//! deliberately keeps no minimum, maximum or samples: they would cost a compare or a store per
//! request, and the bucket bounds answer the question well enough.

use super::counter::Counter;

/// Bounds are powers of two from `2^FIRST_POWER` ns (256 ns)…
const FIRST_POWER: u32 = 8;
/// …to `2^LAST_POWER` ns (68.7 s).
const LAST_POWER: u32 = 36;
/// Buckets per power of two. Four keep the error of a quantile below 25 % and a histogram below 1
/// KiB.
const SUB_BUCKETS: u32 = 4;
const SUB_BUCKET_BITS: u32 = SUB_BUCKETS.trailing_zeros();
/// One bucket for all up to 256 ns, four per power, one for all beyond the last bound.
const BUCKET_COUNT: usize = ((LAST_POWER - FIRST_POWER) * SUB_BUCKETS) as usize + 2;

const NS_PER_SECOND: f64 = 1e9;

/// Latencies since the process started, written by one thread and readable by all.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKET_COUNT],
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty histogram.
    pub const fn new() -> Self {
        Self { buckets: [const { Counter::new() }; BUCKET_COUNT], sum_ns: Counter::new() }
    }

    /// Counts one request that took `latency_ns` nanoseconds. One writer thread only, as with
    /// [`Counter::add`].
    #[inline]
    pub fn record(&self, latency_ns: u64) {
        self.buckets[bucket_of(latency_ns)].add(1);
        self.sum_ns.add(latency_ns);
    }

    /// A copy of all counts, to compute from. Requests recorded meanwhile may be in some of its
    /// numbers and not yet in others: in the sum but not in a bucket, say, never the other way
    /// round for longer than one request.
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: std::array::from_fn(|index| self.buckets[index].get()),
            sum_ns: self.sum_ns.get(),
        }
    }
}

/// The bucket that a latency belongs to. Bucket bounds are inclusive above (OpenMetrics says `le`),
/// hence the `- 1`.
#[inline]
fn bucket_of(latency_ns: u64) -> usize {
    // The clamp sends all below the first bound to the last quarter of the power before it, which
    // is index 0, and all beyond the last bound to the first quarter of the power after it: no
    // branch, and the index is always in range.
    let below_first = (1 << FIRST_POWER) - 1;
    let value = latency_ns.saturating_sub(1).clamp(below_first, 1 << LAST_POWER);
    let power = value.ilog2();
    let quarter = (value >> (power - SUB_BUCKET_BITS)) as u32 % SUB_BUCKETS;
    (power * SUB_BUCKETS + quarter - (FIRST_POWER * SUB_BUCKETS - 1)) as usize
}

/// The largest latency in ns that belongs to a bucket; the last bucket has no bound.
fn upper_bound_ns(bucket: usize) -> Option<u64> {
    let Some(above_first) = bucket.checked_sub(1) else { return Some(1 << FIRST_POWER) };
    let power = FIRST_POWER + above_first as u32 / SUB_BUCKETS;
    let quarter = u64::from(above_first as u32 % SUB_BUCKETS);
    (power < LAST_POWER)
        .then(|| (u64::from(SUB_BUCKETS) + quarter + 1) << (power - SUB_BUCKET_BITS))
}

/// The counts of a [`Histogram`] at one moment.
#[derive(Clone, Debug)]
pub struct HistogramSnapshot {
    buckets: [u64; BUCKET_COUNT],
    sum_ns: u64,
}

impl HistogramSnapshot {
    /// How many latencies were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The sum of all recorded latencies, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// The sum of all recorded latencies, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / NS_PER_SECOND
    }

    /// An upper bound, in ns, of the latency that `per_mille` thousandths of the requests did not
    /// exceed (999 is p99.9, 1000 the maximum). Zero without requests; what lies beyond the last
    /// bound is reported as that bound.
    pub fn quantile_ns(&self, per_mille: u16) -> u64 {
        let wanted = u128::from(self.count()) * u128::from(per_mille);
        let mut seen = 0_u128;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if *count > 0 && seen * 1000 >= wanted {
                return upper_bound_ns(bucket).unwrap_or(1 << LAST_POWER);
            }
        }
        0
    }

    /// For export: `(upper bound in seconds, requests that took at most that long)`, one pair per
    /// power of two, the last with an infinite bound and all requests. The quarters are summed up,
    /// because a scraper stores every pair of every queue and kind as a series of its own.
    pub fn cumulative_seconds(&self) -> Vec<(f64, u64)> {
        let mut pairs = Vec::new();
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            match upper_bound_ns(bucket) {
                Some(bound) if bound.is_power_of_two() => {
                    pairs.push((bound as f64 / NS_PER_SECOND, seen))
                }
                Some(_) => {}
                None => pairs.push((f64::INFINITY, seen)),
            }
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::{BUCKET_COUNT, Histogram, LAST_POWER, bucket_of, upper_bound_ns};

    #[test]
    fn every_bound_is_the_last_value_of_its_bucket() {
        for bucket in 0..BUCKET_COUNT - 1 {
            let bound = upper_bound_ns(bucket).expect("only the last bucket has no bound");
            assert_eq!(bucket_of(bound), bucket, "{bound} ns");
            assert_eq!(bucket_of(bound + 1), bucket + 1, "{} ns", bound + 1);
        }
        assert_eq!(upper_bound_ns(BUCKET_COUNT - 1), None);
    }

    #[test]
    fn extreme_latencies_fall_into_the_outer_buckets() {
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(256), 0);
        assert_eq!(bucket_of(1 << LAST_POWER), BUCKET_COUNT - 2);
        assert_eq!(bucket_of(u64::MAX), BUCKET_COUNT - 1);
    }

    #[test]
    fn bounds_are_at_most_a_quarter_apart() {
        for bucket in 1..BUCKET_COUNT - 1 {
            let (low, high) =
                (upper_bound_ns(bucket - 1).unwrap(), upper_bound_ns(bucket).unwrap());
            assert!(low < high && (high - low) * 4 <= low, "bucket {bucket}: {low}..{high}");
        }
    }

    #[test]
    fn quantiles_are_upper_bounds_within_a_quarter() {
        let histogram = Histogram::new();
        (1..=1000).for_each(|us| histogram.record(us * 1000));
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count(), 1000);
        assert_eq!(snapshot.sum_ns(), 500_500_000);
        for (per_mille, exact) in
            [(500, 500_000), (900, 900_000), (990, 990_000), (999, 999_000), (1000, 1_000_000)]
        {
            let read = snapshot.quantile_ns(per_mille);
            assert!(read >= exact && read <= exact + exact / 4, "p{per_mille}: {read} for {exact}");
        }
    }

    #[test]
    fn empty_histogram_has_zero_quantiles() {
        let snapshot = Histogram::new().snapshot();
        assert_eq!(
            (snapshot.count(), snapshot.quantile_ns(500), snapshot.quantile_ns(1000)),
            (0, 0, 0)
        );
    }

    #[test]
    fn latency_beyond_the_last_bound_is_reported_as_that_bound() {
        let histogram = Histogram::new();
        histogram.record(u64::MAX / 2);
        assert_eq!(histogram.snapshot().quantile_ns(1000), 1 << LAST_POWER);
    }

    #[test]
    fn exported_pairs_are_cumulative_powers_of_two_up_to_infinity() {
        let histogram = Histogram::new();
        [100, 300, 512, 513, u64::MAX / 2].into_iter().for_each(|ns| histogram.record(ns));
        let pairs = histogram.snapshot().cumulative_seconds();
        assert_eq!(pairs.len(), 30);
        assert_eq!(pairs[..3], [(256e-9, 1), (512e-9, 3), (1024e-9, 4)]);
        assert_eq!(pairs[28..], [((1_u64 << LAST_POWER) as f64 / 1e9, 4), (f64::INFINITY, 5)]);
    }
}
