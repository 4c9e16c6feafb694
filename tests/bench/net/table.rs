//! The bench's table, in Markdown.

use crate::contender::{Contender, PEER};
use crate::sample::Sample;

/// One contender in one cell.
pub(crate) struct Row<'a> {
    pub(crate) contender: &'a Contender,
    pub(crate) samples: Vec<Sample>,
}

impl<'a> Row<'a> {
    pub(crate) fn new(contender: &'a Contender) -> Self {
        Self { contender, samples: Vec::new() }
    }

    fn column(&self, value: fn(&Sample) -> f64) -> Vec<f64> {
        self.samples.iter().map(value).collect()
    }
}

pub(crate) fn print_head() {
    println!(
        "| cell | back end | M frames/s | (min–max) | × | Gbit/s | CPU s per M frames | CPU s per GiB |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
}

/// Prints the rows of a cell, each with the ratio to the peer.
pub(crate) fn print_rows(cell: &str, rows: &[Row<'_>]) {
    let rate = |sample: &Sample| sample.frames_per_second / 1e6;
    let peer = rows.iter().find(|row| row.contender.name() == PEER);
    let peer_rates = peer.map_or(Vec::new(), |row| row.column(rate));
    for row in rows {
        let rates = row.column(rate);
        // Round by round, so that a disturbance that lasts longer than a round cancels out.
        let ratios: Vec<f64> =
            rates.iter().zip(&peer_rates).map(|(rate, peer_rate)| rate / peer_rate).collect();
        println!(
            "| {cell} | {} | {:.3} | ({:.3}–{:.3}) | {:.2} | {:.2} | {:.3} | {:.2} |",
            row.contender.name(),
            median(&rates),
            rates.iter().copied().fold(f64::INFINITY, f64::min),
            rates.iter().copied().fold(0.0, f64::max),
            median(&ratios),
            median(&row.column(|sample| sample.gbit_per_second)),
            median(&row.column(|sample| sample.cpu_seconds_per_million)),
            median(&row.column(|sample| sample.cpu_seconds_per_gib)),
        );
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (Some(below), Some(above)) if sorted.len().is_multiple_of(2) => (below + above) / 2.0,
        (_, Some(middle)) => *middle,
        (_, None) => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn median_of_an_even_number_of_samples_lies_between_the_middle_two() {
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 3.0, 4.0]), 3.5);
    }
}
