//! From what a case has printed to what it says of the back end.
//!
//! The cases are test functions and print for people. What is read here is their own wording, in
//! `subject` and in the harness: the marks below. No other line means anything.

/// A case that has nothing to test here says so with one of these, and why.
const NOT_APPLICABLE: [&str; 3] = ["skipped: ", "not run: ", "cannot run here: "];
/// What the back end does otherwise than ours promises to, and no specification demands.
const BEYOND: &str = "beyond the specifications: ";
/// The line before a panic's message: begins with the first, has the second in it.
const PANICKED: [&str; 2] = ["thread '", " panicked at "];

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The back end does what the case asks for; where it goes another way than ours, how.
    Passed {
        /// One line each.
        differences: Vec<String>,
    },
    /// It does not; why.
    Failed(String),
    /// The case is about something that this back end or this machine does not have; what.
    NotApplicable(String),
}

impl Verdict {
    /// The verdict of a case that has ended, by its exit status and by what it wrote to stderr.
    pub(crate) fn of(success: bool, stderr: &str) -> Self {
        if !success {
            return Verdict::Failed(reason(stderr));
        }
        let after = |mark: &str| stderr.lines().find_map(|line| line.strip_prefix(mark));
        if let Some(why) = NOT_APPLICABLE.into_iter().find_map(after) {
            return Verdict::NotApplicable(why.to_owned());
        }
        let mut differences: Vec<String> = stderr
            .lines()
            .filter_map(|line| line.strip_prefix(BEYOND))
            .map(str::to_owned)
            .collect();
        differences.dedup();
        Verdict::Passed { differences }
    }
}

/// The first panic's message, on one line.
fn reason(stderr: &str) -> String {
    let [thread, panicked] = PANICKED;
    let is_panic = |line: &&str| line.starts_with(thread) && line.contains(panicked);
    let mut lines = stderr.lines().skip_while(|line| !is_panic(line)).skip(1);
    let message: Vec<&str> = lines
        .by_ref()
        .take_while(|line| !line.starts_with("note: ") && !line.starts_with("stack backtrace:"))
        .map(str::trim)
        .collect();
    if message.is_empty() { "it ended without a word".to_owned() } else { message.join(" ") }
}

#[cfg(test)]
mod tests {
    use super::Verdict;

    #[test]
    fn case_that_is_skipped_is_not_passed() {
        let verdict = Verdict::of(true, "log of something\nskipped: it has another command line\n");
        assert_eq!(verdict, Verdict::NotApplicable("it has another command line".into()));
    }

    #[test]
    fn differences_are_told_once() {
        let stderr = "beyond the specifications: a\nbeyond the specifications: a\nbeyond: b\n";
        assert_eq!(Verdict::of(true, stderr), Verdict::Passed { differences: vec!["a".into()] });
    }

    #[test]
    fn failure_is_told_by_its_first_panic() {
        let stderr = "noise\n\nthread 'rings::x' (7) panicked at tests/conformance/rings.rs:1:5:\n\
                      assertion failed: two\n  lines\nnote: run with `RUST_BACKTRACE=1`\n\
                      thread 'main' panicked at b.rs:2:3:\nanother\n";
        let why = "assertion failed: two lines".into();
        assert_eq!(Verdict::of(false, stderr), Verdict::Failed(why));
        assert_eq!(Verdict::of(false, ""), Verdict::Failed("it ended without a word".into()));
    }
}
