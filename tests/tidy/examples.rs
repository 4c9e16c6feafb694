//! Each rule catches a bad example, and lets its good twin pass.

use crate::source::{SourceFile, Tree};
use crate::{RULES, report};

/// What the named rule says about a tree of these files.
fn findings(rule: &str, files: &[(&str, &str)]) -> Vec<String> {
    let files = files.iter().map(|(path, text)| SourceFile::new(path, text)).collect();
    let tree = Tree { root: "/".into(), files };
    let rule = RULES.iter().find(|known| known.name == rule).expect("a rule of that name");
    report(rule, &tree).iter().map(|finding| format!("{}:{}", finding.path, finding.line)).collect()
}

/// The rule finds exactly line `line` of `bad`, and nothing in `good`.
fn catches(rule: &str, path: &str, (bad, line): (&str, usize), good: &str) {
    assert_eq!(findings(rule, &[(path, bad)]), [format!("{path}:{line}")], "{rule} on {bad:?}");
    assert_eq!(findings(rule, &[(path, good)]), [""; 0], "{rule} on {good:?}");
}

#[test]
fn arrow_that_points_up_is_caught() {
    let good = "use crate::{memory::Map, metrics::{Counter, session}};\n#[cfg(test)]\nmod tests { use crate::daemon::Serve; }";
    catches(
        "layers",
        "common/src/virtqueue/split.rs",
        ("//! x\nuse crate::session::Session;", 2),
        good,
    );
    catches(
        "layers",
        "common/src/metrics/mod.rs",
        ("use crate::{\n memory::Map};", 1),
        "use std::fmt;",
    );
    catches(
        "layers",
        "common/src/junk.rs",
        ("fn f() {}", 1),
        "#![cfg(any())] // tidy(layers): an example\nfn f() {}",
    );
}

#[test]
fn siblings_that_name_each_other_in_a_circle_are_caught() {
    let device = ("common/src/device.rs", "use crate::engine::Op;");
    let engine = ("common/src/engine/mod.rs", "use crate::device::Step;");
    assert_eq!(findings("layers", &[device]), [""; 0]);
    assert_eq!(findings("layers", &[device, engine]).len(), 2);
}

#[test]
fn session_that_does_io_is_caught() {
    catches(
        "session-io",
        "common/src/session/mod.rs",
        ("fn f() { rustix::io::read(); }", 1),
        "use std::os::fd::OwnedFd;",
    );
}

#[test]
fn ring_with_a_lock_or_a_file_is_caught() {
    catches(
        "data-path",
        "common/src/virtqueue/split.rs",
        ("use std::sync::Mutex;", 1),
        "/// No `Mutex` here.\nstruct Ring;",
    );
}

#[test]
fn front_end_on_common_is_caught() {
    catches(
        "front-end-independence",
        "tests/frontend/Cargo.toml",
        ("[dependencies]\ncommon.workspace = true", 2),
        "libc = \"1\"",
    );
    catches(
        "front-end-independence",
        "tests/frontend/src/lib.rs",
        ("use common::memory::Region;", 1),
        "// common::x\n",
    );
}

#[test]
fn file_of_601_lines_is_caught() {
    let lines = |count: usize| {
        "fn f() {}\n".repeat(count)
            + "// a comment\n\n#[cfg(test)]\nmod tests {\n    fn f() {}\n}\n"
    };
    catches("length", "a.rs", (&lines(601), 1), &lines(600));
}

#[test]
fn banned_word_is_caught_in_code_comment_and_prose() {
    catches(
        "words",
        "a.rs",
        ("let x = 1;\nfn set_slave_fd() {}", 2),
        "let text = \"slave\"; // see https://x/master/y\n",
    );
    catches("words", "a.rs", ("// the Masters of rings", 1), "// a masterpiece");
    catches("words", "a.md", ("the vhu_ prefix", 1), "the vhost-user prefix");
}

#[test]
fn drawer_is_caught_as_file_and_as_module() {
    catches("names", "common/src/utils.rs", ("", 1), "// tidy(names): an example\n");
    catches("names", "a.rs", ("pub mod helpers {", 1), "pub mod ring {");
}

#[test]
fn discarded_cause_is_caught() {
    catches(
        "errors",
        "a.rs",
        ("x.map_err(|_| Error::Bad)", 1),
        "x.map_err(|source| Error::Bad { source })",
    );
}

#[test]
fn unsafe_outside_its_homes_is_caught() {
    catches(
        "unsafe-home",
        "vhost-blk/src/main.rs",
        ("unsafe { f() }", 1),
        "#![forbid(unsafe_code)]",
    );
    catches(
        "unsafe-home",
        "vhost-blk/src/main.rs",
        ("#![allow(unsafe_code)]", 1),
        "let why = \"unsafe\";",
    );
    assert_eq!(findings("unsafe-home", &[("common/src/memory/map.rs", "unsafe { f() }")]), [""; 0]);
}

#[test]
fn unsafe_without_its_invariant_is_caught() {
    catches(
        "safety",
        "a.rs",
        ("unsafe { f() }", 1),
        "// SAFETY: the map outlives the ring.\nlet x =\n    unsafe { f() };",
    );
}

#[test]
fn open_work_is_caught() {
    catches("open-work", "a.rs", ("// TODO: later", 1), "let x = \"TODO\";");
    catches("open-work", "a.rs", ("fn f() { todo!() }", 1), "fn f() { g() }");
}

#[test]
fn switched_off_test_is_caught() {
    catches("switched-off", "a.rs", ("#[test]\n#[ignore]", 2), "#[test]\nfn f() {}");
    catches("switched-off", "a.rs", ("#[should_panic]", 1), "// #[should_panic] is banned");
}

#[test]
fn sleeping_test_is_caught() {
    catches("sleep", "tests/boot/uml.rs", ("thread::sleep(second);", 1), "child.wait();");
    catches(
        "sleep",
        "common/src/a.rs",
        ("fn f() { sleep(1) }\n#[cfg(test)]\nmod tests {\nfn g() { sleep(1) }\n}", 4),
        "fn f() { sleep(1) }",
    );
}

#[test]
fn parser_without_denied_lints_is_caught() {
    let deny = "//! Head.\n#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing,\n  clippy::arithmetic_side_effects, clippy::panic))]";
    let child = ("common/src/protocol/table.rs", "fn f() {}");
    catches("parsers", "common/src/protocol/mod.rs", ("#![deny(clippy::unwrap_used)]", 1), deny);
    assert_eq!(findings("parsers", &[child]), ["common/src/protocol/table.rs:1"]);
    assert_eq!(findings("parsers", &[child, ("common/src/protocol/mod.rs", deny)]), [""; 0]);
}

#[test]
fn glob_import_is_caught() {
    catches(
        "globs",
        "a.rs",
        ("use super::*;", 1),
        "use proptest::prelude::*;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}",
    );
    catches("globs", "a.rs", ("pub use session::*;", 1), "use a::{b, c};");
}

#[test]
fn headless_file_is_caught() {
    catches("heads", "a.rs", ("use a::b;", 1), "//! What it is for.\nuse a::b;");
}

#[test]
fn package_outside_the_lint_table_is_caught() {
    catches("lints", "common/Cargo.toml", ("[package]", 1), "[package]\n[lints]\nworkspace = true");
}

#[test]
fn conformance_row_without_its_code_or_test_is_caught() {
    let code = ("common/src/ring.rs", "impl Ring { pub(crate) fn pop(&self) {} }");
    let row = |text: &str| findings("conformance", &[code, ("docs/conformance.md", text)]);
    let head = "| clause | what | code | test |\n|--|--|--|--|\n";
    assert_eq!(
        row(&format!("{head}| 2.7.1 | x | `common/src/ring.rs::Ring::pop` | not met: reason |")),
        [""; 0]
    );
    assert_eq!(
        row("| 2.7.1 | x | `common/src/ring.rs::push` | no test: reason |"),
        ["docs/conformance.md:1"]
    );
    assert_eq!(row("| 2.7.1 | x | `common/src/ring.rs` | no test yet |"), [""; 0]);
    assert_eq!(
        row("| 2.7.1 | x | `common/src/gone.rs` | no test yet |"),
        ["docs/conformance.md:1"]
    );
    assert_eq!(
        row("| 2.7.1 | x | `common/src/gone.rs::pop` | no test: reason |"),
        ["docs/conformance.md:1"]
    );
    assert_eq!(row("| 2.7.1 | x | `common/src/ring.rs::Ring::pop` | |"), ["docs/conformance.md:1"]);
    assert_eq!(row("| 2.7.1 | x |"), ["docs/conformance.md:1"]);
}

#[test]
fn dead_link_is_caught() {
    let page = ("docs/a.md", "# The tree: a map\n");
    let links = |text: &str| findings("links", &[page, ("docs/b.md", text)]);
    assert_eq!(
        links("[a](a.md) [b](../docs/a.md#the-tree-a-map) [c](https://example.org/x) [d](../docs)"),
        [""; 0]
    );
    assert_eq!(links("text\n[a](gone.md)"), ["docs/b.md:2"]);
    assert_eq!(links("[a](a.md#the-roof)"), ["docs/b.md:1"]);
}

#[test]
fn waiver_needs_a_reason_and_its_own_rule() {
    catches(
        "globs",
        "a.rs",
        ("use a::*; // tidy(globs):", 1),
        "// tidy(globs): generated bindings\nuse a::*;",
    );
    catches(
        "globs",
        "a.rs",
        ("// tidy(words): wrong rule\nuse a::*;", 2),
        "use a::*; // tidy(globs): one file, one origin",
    );
}

#[test]
fn splitter_tells_code_from_strings_and_comments() {
    let text = "let a = r#\"unsafe \" {\"#; /* one /* two */ TODO */ let b = '\"';\nlet c: &'static str = \"x\n unsafe \\\" y\"; d()";
    let file = SourceFile::new("a.rs", text);
    let code: Vec<&str> = file.lines.iter().map(|line| line.code.as_str()).collect();
    assert_eq!(code, ["let a = \"\";  let b = ' ';", "let c: &'static str = \"", "\"; d()"]);
    assert!(file.lines[0].comment.contains("TODO"));
}
