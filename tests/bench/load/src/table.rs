//! The bench's tables, in Markdown.

use crate::contender::Contender;
use crate::sample::Sample;

/// One contender in one cell.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// The name of the row that the ratios refer to.
    peer: String,
    pub(crate) samples: Vec<Sample>,
    /// Why there are no more samples.
    pub(crate) failure: Option<String>,
}

impl Row {
    pub(crate) fn new(contender: &Contender) -> Self {
        Self {
            name: contender.name.clone(),
            peer: contender.peer.clone(),
            samples: Vec::new(),
            failure: None,
        }
    }

    fn column(&self, value: fn(&Sample) -> f64) -> Vec<f64> {
        self.samples.iter().map(value).collect()
    }
}

pub(crate) fn print_head() {
    println!(
        "| 4 KiB random | daemon | requests/s | (min–max) | × | daemon CPU s per million | peak MiB |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|");
}

/// Prints the rows of a cell, each with the ratio to its peer.
pub(crate) fn print_rows(cell: &str, rows: &[Row]) {
    let rate = |sample: &Sample| sample.requests_per_second;
    for row in rows {
        if let Some(failure) = &row.failure {
            println!("| {cell} | {} | failed: {failure} | | | | |", row.name);
            continue;
        }
        let rates = row.column(rate);
        let peer_rates = rows
            .iter()
            .find(|peer| peer.name == row.peer)
            .map_or(Vec::new(), |peer| peer.column(rate));
        // Round by round, so that a disturbance that lasts longer than a round cancels out.
        let ratios: Vec<f64> =
            rates.iter().zip(&peer_rates).map(|(rate, peer_rate)| rate / peer_rate).collect();
        println!(
            "| {cell} | {} | {:.0} | ({:.0}–{:.0}) | {} | {:.2} | {:.1} |",
            row.name,
            median(&rates),
            rates.iter().copied().fold(f64::INFINITY, f64::min),
            rates.iter().copied().fold(0.0, f64::max),
            if ratios.is_empty() { "–".into() } else { format!("{:.2}", median(&ratios)) },
            median(&row.column(|sample| sample.cpu_seconds_per_million)),
            median(&row.column(|sample| sample.peak_mib)),
        );
    }
}

/// Prints the idle CPU use of each contender in percent.
pub(crate) fn print_idle(rows: &[(&str, Result<f64, String>)]) {
    println!("\n| daemon | CPU when idle, client connected |\n|---|---:|");
    for (name, percent) in rows {
        match percent {
            Ok(percent) => println!("| {name} | {percent:.1} % |"),
            Err(failure) => println!("| {name} | failed: {failure} |"),
        }
    }
}

fn median(values: &[f64]) -> f64 {
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
