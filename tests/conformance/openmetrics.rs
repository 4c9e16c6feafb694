//! A small, strict reader of OpenMetrics 1.0 text: what it takes, a scraper takes.
//!
//! It knows counters, gauges, histograms, information and the rules that writers break: every sample under its
//! family's header, names with the suffix of their type, no series twice, buckets cumulative and
//! complete, `# EOF` at the end. It knows no timestamps and no exemplars, which our daemons do not
//! write.

use std::collections::{BTreeMap, BTreeSet};

/// Labels of a sample.
type Labels = BTreeMap<String, String>;

/// Everything that was scraped.
#[derive(Debug, Default)]
pub(crate) struct Exposition {
    samples: Vec<(String, Labels, f64)>,
}

#[derive(Debug, Default)]
struct Family {
    name: String,
    kind: String,
    unit: String,
    /// Words of the header that have been seen.
    seen: BTreeSet<String>,
    has_samples: bool,
}

impl Exposition {
    /// Reads a whole exposition, or says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let body = text.strip_suffix("# EOF\n").ok_or("no # EOF at the end")?;
        if !body.is_empty() && !body.ends_with('\n') {
            return Err("a line that does not end before # EOF".into());
        }
        let mut exposition = Exposition::default();
        let mut families = BTreeSet::new();
        let mut series = BTreeSet::new();
        let mut family = Family::default();
        for line in body.lines() {
            let complaint = |what: &str| format!("{what}: {line:?}");
            if let Some(header) = line.strip_prefix("# ") {
                let (word, name, value) =
                    header_parts(header).ok_or_else(|| complaint("a header of another form"))?;
                if name != family.name {
                    if !families.insert(name.to_owned()) {
                        return Err(complaint("a family that was there before"));
                    }
                    family = Family { name: name.to_owned(), ..Family::default() };
                }
                family.take_header(word, value).map_err(|what| complaint(&what))?;
                continue;
            }
            let (name, labels, value) =
                sample(line).ok_or_else(|| complaint("a sample of another form"))?;
            family.check_sample(&name, &labels, value).map_err(|what| complaint(&what))?;
            if !series.insert((name.clone(), labels.clone())) {
                return Err(complaint("a series that was there before"));
            }
            exposition.samples.push((name, labels, value));
        }
        exposition.check_histograms()?;
        Ok(exposition)
    }

    /// The one sample of that name whose labels include `wanted`.
    pub(crate) fn sample(&self, name: &str, wanted: &[(&str, &str)]) -> Option<f64> {
        let mut found = self.samples.iter().filter(|(sample, labels, _)| {
            sample == name
                && wanted
                    .iter()
                    .all(|(label, value)| labels.get(*label).is_some_and(|is| is == value))
        });
        let (_, _, value) = found.next()?;
        found.next().is_none().then_some(*value)
    }

    /// Buckets are cumulative, end at infinity, and agree with the count.
    fn check_histograms(&self) -> Result<(), String> {
        let mut buckets: BTreeMap<(&str, Labels), Vec<(f64, f64)>> = BTreeMap::new();
        for (name, labels, count) in &self.samples {
            let Some(family) = name.strip_suffix("_bucket") else { continue };
            let mut others = labels.clone();
            let bound = others
                .remove("le")
                .and_then(|le| number(&le))
                .ok_or_else(|| format!("{name}: a bucket without bound"))?;
            buckets.entry((family, others)).or_default().push((bound, *count));
        }
        for ((family, labels), bounds) in buckets {
            let rising =
                bounds.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
            let last = bounds.last().copied().unwrap_or_default();
            let count = self
                .samples
                .iter()
                .find(|(name, others, _)| *name == format!("{family}_count") && *others == labels);
            if !rising
                || last.0 != f64::INFINITY
                || count.is_none_or(|(_, _, count)| *count != last.1)
            {
                return Err(format!(
                    "{family}: buckets of {labels:?} are not those of a histogram: {bounds:?}"
                ));
            }
        }
        Ok(())
    }
}

impl Family {
    fn take_header(&mut self, word: &str, value: &str) -> Result<(), String> {
        if self.has_samples {
            return Err("a header after samples".into());
        }
        if !self.seen.insert(word.to_owned()) {
            return Err(format!("a second {word}"));
        }
        match word {
            "TYPE" if ["counter", "gauge", "histogram", "info"].contains(&value) => {
                self.kind = value.to_owned()
            }
            "UNIT" if self.name.ends_with(&format!("_{value}")) => self.unit = value.to_owned(),
            "HELP" => {}
            _ => return Err(format!("{word} {value}")),
        }
        Ok(())
    }

    fn check_sample(&mut self, name: &str, labels: &Labels, value: f64) -> Result<(), String> {
        self.has_samples = true;
        let suffix = name.strip_prefix(self.name.as_str()).ok_or("a sample outside its family")?;
        let suffixes: &[&str] = match self.kind.as_str() {
            "counter" => &["_total", "_created"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_count", "_sum", "_created"],
            "info" => &["_info"],
            _ => return Err("a sample of a family without type".into()),
        };
        if !suffixes.contains(&suffix) {
            return Err(format!("a {} with the suffix {suffix:?}", self.kind));
        }
        if labels.contains_key("le") != (suffix == "_bucket") {
            return Err("a bound where none belongs, or none where one does".into());
        }
        if self.kind == "info" && value != 1.0 {
            return Err(format!("information of the value {value}"));
        }
        if self.kind != "gauge" && (value < 0.0 || !value.is_finite()) {
            return Err(format!("a {} of {value}", self.kind));
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    let mut characters = text.chars();
    characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|other| other.is_ascii_alphanumeric() || other == '_')
}

fn header_parts(header: &str) -> Option<(&str, &str, &str)> {
    let (word, rest) = header.split_once(' ')?;
    let (name, value) = rest.split_once(' ')?;
    is_name(name).then_some((word, name, value))
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        _ if text.starts_with(|first: char| first.is_ascii_digit() || first == '-') => {
            text.parse().ok()
        }
        _ => None,
    }
}

fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, labels(rest.strip_suffix('}')?)?),
        None => (series, Labels::new()),
    };
    is_name(name).then_some(())?;
    Some((name.to_owned(), labels, number(value)?))
}

/// `a="1",b="2"`; the values of our labels have nothing to escape, so that a quote or backslash in
/// one is a mistake.
fn labels(text: &str) -> Option<Labels> {
    let mut labels = Labels::new();
    for pair in text.split(',') {
        let (name, quoted) = pair.split_once('=')?;
        let value = quoted.strip_prefix('"')?.strip_suffix('"')?;
        if !is_name(name)
            || value.contains(['"', '\\', '\n'])
            || labels.insert(name.to_owned(), value.to_owned()).is_some()
        {
            return None;
        }
    }
    Some(labels)
}

#[test]
fn strict_reader_takes_what_is_right_and_nothing_else() {
    let right = "# TYPE a counter\n# HELP a Things.\na_total{x=\"1\"} 3\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\n\
                 b_seconds_bucket{le=\"0.5\"} 1\nb_seconds_bucket{le=\"+Inf\"} 2\nb_seconds_count 2\nb_seconds_sum 0.75\n# EOF\n";
    let exposition = Exposition::parse(right).expect("all of it is right");
    assert_eq!(exposition.sample("a_total", &[("x", "1")]), Some(3.0));
    for (from, to) in [
        ("# EOF\n", ""),
        ("a_total", "a"),
        ("# TYPE a counter\n", ""),
        ("x=\"1\"", "x=1"),
        ("} 3", "} three"),
        ("UNIT b_seconds seconds", "UNIT b_seconds bytes"),
        ("le=\"+Inf\"", "le=\"inf\""),
        ("_bucket{le=\"0.5\"} 1", "_bucket{le=\"0.5\"} 7"),
        ("b_seconds_count 2", "b_seconds_count 3"),
        ("a_total{x=\"1\"} 3\n", "a_total{x=\"1\"} 3\na_total{x=\"1\"} 3\n"),
    ] {
        assert!(Exposition::parse(&right.replace(from, to)).is_err(), "{from:?} became {to:?}");
    }
}
