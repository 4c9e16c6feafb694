//! The house rules that neither the compiler nor Clippy can hold: which way modules may point, how long a file may
//! grow, where `unsafe` may live, whether a document's references still lead somewhere.
//!
//! Contract: reads every text file of the tree, changes nothing, needs nothing but the standard library, and reports
//! *all* findings at once as `path:line: [rule] what: why`. A rule that would make a file worse is broken openly: a
//! comment `tidy(rule): reason` on the line, or on the line above, waives that one finding.
//!
//! Deliberately not here: what a lint can say (function length, parameter count, undocumented `unsafe`): those are in
//! the workspace lint table, and the `lints` rule only makes sure that every package inherits it. Nor is Rust parsed:
//! a line splitter that knows comments from strings is enough, and a rule that needs more belongs in a lint.

#[cfg(test)]
#[path = "tidy/examples.rs"]
mod examples;
#[path = "tidy/rules.rs"]
mod rules;
#[path = "tidy/source.rs"]
mod source;

use std::path::Path;

use source::{Finding, Tree};

/// A rule's name, the reason a reader gets with each finding, and the check.
struct Rule {
    name: &'static str,
    reason: &'static str,
    check: fn(&Tree) -> Vec<Finding>,
}

const RULES: &[Rule] = &[
    Rule {
        name: "layers",
        reason: "one arrow keeps every layer testable without those above it (docs/architecture.md, \"The tree\")",
        check: rules::layers,
    },
    Rule {
        name: "session-io",
        reason: "a session turns messages into state; without I/O in it, a test needs no socket",
        check: rules::session_io,
    },
    Rule {
        name: "data-path",
        reason: "a ring has one owner thread and sees no file: a lock there is a shared ring, a file there is a device's work",
        check: rules::data_path,
    },
    Rule {
        name: "front-end-independence",
        reason: "a front end built on the code under test would share its mistakes",
        check: rules::front_end_independence,
    },
    Rule {
        name: "length",
        reason: "a longer file holds a second noun: give that one its own file",
        check: rules::length,
    },
    Rule {
        name: "words",
        reason: "the specifications have a word for it: device, driver, front end, back end, vring",
        check: rules::words,
    },
    Rule {
        name: "names",
        reason: "a file is named for a thing of the domain, not for a drawer",
        check: rules::names,
    },
    Rule {
        name: "errors",
        reason: "a discarded cause is the one that the operator needs; keep it as source",
        check: rules::discarded_errors,
    },
    Rule {
        name: "unsafe-home",
        reason: "unsafe has few homes, so that a reviewer can read all of it",
        check: rules::unsafe_home,
    },
    Rule {
        name: "safety",
        reason: "an unsafe operation rests on an invariant: `SAFETY:` names it and who keeps it",
        check: rules::safety_comments,
    },
    Rule {
        name: "open-work",
        reason: "open work belongs in an issue: on main it is never found again",
        check: rules::open_work,
    },
    Rule {
        name: "switched-off",
        reason: "a test that is ignored, or that passes on any panic, proves nothing",
        check: rules::switched_off,
    },
    Rule {
        name: "sleep",
        reason: "a test waits for the event: a sleep is too long on a fast machine and too short on a slow one",
        check: rules::sleeps,
    },
    Rule {
        name: "parsers",
        reason: "foreign input must not reach a panic: the module denies unwrap, expect, indexing, bare arithmetic, panic",
        check: rules::parsers,
    },
    Rule {
        name: "globs",
        reason: "a name without an origin costs every reader a search",
        check: rules::globs,
    },
    Rule {
        name: "heads",
        reason: "a file begins with `//!`: what it is for, its contract, what it leaves out",
        check: rules::heads,
    },
    Rule {
        name: "lints",
        reason: "the workspace lint table binds only the packages that inherit it",
        check: rules::lints,
    },
    Rule {
        name: "conformance",
        reason: "a clause whose code or test is gone is no longer met",
        check: rules::conformance,
    },
    Rule {
        name: "links",
        reason: "a reader who follows a dead link stops trusting the page",
        check: rules::links,
    },
];

#[test]
fn tree_is_tidy() {
    let tree = Tree::read(
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the tree"),
    );
    assert!(
        tree.files.iter().any(|file| file.path == "tests/tidy.rs"),
        "tidy did not find itself in {:?}",
        tree.root
    );
    let findings: Vec<String> = RULES
        .iter()
        .flat_map(|rule| report(rule, &tree))
        .map(|finding| finding.to_string())
        .collect();
    assert!(findings.is_empty(), "\n{}\n{} findings", findings.join("\n"), findings.len());
}

/// Runs one rule and drops what a comment waives.
fn report(rule: &Rule, tree: &Tree) -> Vec<Finding> {
    let mut findings = (rule.check)(tree);
    findings.retain(|finding| !tree.waives(finding, rule.name));
    for finding in &mut findings {
        finding.rule = rule.name;
        finding.reason = rule.reason;
    }
    findings
}
