//! The rules, one function each: a tree in, findings out.
//!
//! Contract: a rule names the line and what it found there; its name and reason stand in the table of `tidy.rs`, and
//! a bad example in `examples.rs` shows that it bites. A rule neither prints nor panics on what it reads.

use std::collections::BTreeSet;
use std::path::Path;

use crate::source::{Finding, SourceFile, Tree, has_word, is_word, within};

/// What each module of `common` may name. `device`, `virtqueue` and `engine` stand side by side: they may name each
/// other, but never in a circle. A module that is missing here has no place in the house yet.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("simulation", &["worker", "device", "virtqueue", "engine", "memory"]),
    ("daemon", &["session", "protocol", "worker", "device", "virtqueue", "engine", "memory"]),
    ("session", &["protocol", "worker", "device", "virtqueue", "engine", "memory"]),
    ("worker", &["device", "virtqueue", "engine", "memory"]),
    ("device", &["virtqueue", "engine", "memory"]),
    ("engine", &["device", "virtqueue", "memory"]),
    ("virtqueue", &["device", "engine", "memory"]),
    ("protocol", &["memory"]),
    ("memory", &[]),
    ("metrics", &[]),
    ("rate_limit", &[]),
    ("sandbox", &[]),
];

/// Modules that any other may name, and that name none.
const LEAVES: &[&str] = &["metrics", "rate_limit", "sandbox"];

/// Where `unsafe` may be written; the reasons stand at the heads of these modules. The two below `tests` are the other
/// ends of the same memory: the scripted front end's and the stock daemon's.
const UNSAFE_HOMES: &[&str] = &[
    "common/src/memory",
    "common/src/engine",
    "common/src/protocol/connection.rs",
    "common/src/sandbox/mod.rs",
    "vhost-net/src/backend/descriptor.rs",
    "vhost-console/src/watch.rs",
    "vmm/src/daemons.rs",
    "vmm/src/front_end/channel.rs",
    "vmm/src/memory.rs",
    "tests/frontend/src/memory.rs",
    "tests/bench/stock/src/disk.rs",
    "tests/harness/tap.rs",
];

/// Modules whose input comes from a guest, a front end or an operator.
const PARSERS: &[&str] = &[
    "common/src/protocol",
    "common/src/session",
    "common/src/virtqueue/chain.rs",
    "common/src/virtqueue/split.rs",
    "common/src/daemon/control.rs",
    "common/src/daemon/store",
    "common/src/rate_limit/spec.rs",
    "vhost-blk/src/request.rs",
    "vhost-console/src/command.rs",
    "vhost-net/src/command.rs",
    "vhost-net/src/header.rs",
    "vhost-net/src/kept.rs",
    "vhost-net/src/backend/netlink.rs",
    "vhost-net/src/backend/spec.rs",
    "vhost-net/src/backend/stream/framing.rs",
    "vhost-console/src/config.rs",
    "vhost-console/src/control.rs",
    "vhost-console/src/control",
    "vhost-console/src/attach/escape.rs",
    "vhost-console/src/attach/operator.rs",
    "vmm/src/bus.rs",
    "vmm/src/control/socket.rs",
    "vmm/src/front_end/control.rs",
    "vmm/src/front_end/keeper.rs",
    "vmm/src/front_end/relay.rs",
    "vmm/src/front_end/session.rs",
    "vmm/src/front_end/setup.rs",
    "vmm/src/interrupts.rs",
    "vmm/src/loader.rs",
    "vmm/src/pci/config.rs",
    "vmm/src/pci/msix.rs",
    "vmm/src/power.rs",
    "vmm/src/serial.rs",
    "vmm/src/virtio/common.rs",
    "vmm/src/virtio/transport.rs",
];

/// The lints that a parsing module denies.
const PARSER_LINTS: &[&str] =
    &["unwrap_used", "expect_used", "indexing_slicing", "arithmetic_side_effects", "panic"];

/// One screen's worth of scrolling, ten times: beyond it nobody holds a file in mind.
const FILE_LINES_MAX: usize = 600;

/// How far above an `unsafe` its comment may start: a statement of a few lines can stand between them.
const SAFETY_DISTANCE_LINES: usize = 6;

pub(crate) fn layers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut edges: Vec<(&SourceFile, usize, String, String)> = Vec::new();
    for file in
        tree.rust().filter(|file| file.path.starts_with("common/src/") && !file.is_test_file())
    {
        let module = common_module(&file.path);
        if module == "lib" {
            continue;
        }
        let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == module) else {
            findings.push(
                file.finding(1, format!("`{module}` has no place among the layers of `common`")),
            );
            continue;
        };
        for (line, target) in file.crate_paths() {
            let known = MAY_NAME.iter().any(|(name, _)| *name == target);
            if known
                && target != module
                && !allowed.contains(&&*target)
                && !LEAVES.contains(&&*target)
            {
                findings.push(
                    file.finding(
                        line,
                        format!("`{module}` names `{target}`, which stands above it"),
                    ),
                );
            } else if known && target != module {
                edges.push((file, line, module.to_owned(), target));
            }
        }
    }
    for (file, line, from, to) in &edges {
        if reaches(&edges, to, from, &mut BTreeSet::new()) {
            findings.push(
                file.finding(*line, format!("`{from}` and `{to}` name each other in a circle")),
            );
        }
    }
    findings
}

fn reaches(
    edges: &[(&SourceFile, usize, String, String)],
    from: &str,
    to: &str,
    seen: &mut BTreeSet<String>,
) -> bool {
    from == to
        || seen.insert(from.to_owned())
            && edges
                .iter()
                .filter(|edge| edge.2 == from)
                .any(|edge| reaches(edges, &edge.3, to, seen))
}

/// `common/src/session/image.rs` and `common/src/session.rs` are both `session`.
fn common_module(path: &str) -> &str {
    let inside = path.trim_start_matches("common/src/");
    inside.split('/').next().unwrap_or(inside).trim_end_matches(".rs")
}

pub(crate) fn session_io(tree: &Tree) -> Vec<Finding> {
    const IO: &[&str] = &[
        "std::fs",
        "std::net",
        "std::os::unix::net",
        "rustix::",
        "nix::",
        "libc::",
        "tokio::",
        ".await",
    ];
    tree.find_code(
        |path| common_path(path, "session"),
        |code| IO.iter().find(|io| code.contains(**io)).map(|io| format!("`{io}` in the session")),
    )
}

pub(crate) fn data_path(tree: &Tree) -> Vec<Finding> {
    const FORBIDDEN: &[&str] = &["Mutex", "RwLock", "std::fs", "File", "Path", "PathBuf"];
    tree.find_code(
        |path| common_path(path, "virtqueue"),
        |code| {
            FORBIDDEN
                .iter()
                .find(|name| has_word(code, name))
                .map(|name| format!("`{name}` beside a running ring"))
        },
    )
}

fn common_path(path: &str, module: &str) -> bool {
    path.starts_with("common/src/") && common_module(path) == module
}

pub(crate) fn front_end_independence(tree: &Tree) -> Vec<Finding> {
    let mut findings = tree.find_code(
        |path| path.starts_with("tests/frontend/"),
        |code| {
            (has_word(code, "common") && code.contains("common::"))
                .then(|| "the scripted front end uses `common`".into())
        },
    );
    for file in tree.files.iter().filter(|file| file.path == "tests/frontend/Cargo.toml") {
        for (number, line) in file.numbered() {
            let key = line.raw.split(['=', '.']).next().unwrap_or_default().trim();
            if key == "common" || line.raw.contains("../common") {
                findings.push(
                    file.finding(number, "the scripted front end depends on `common`".into()),
                );
            }
        }
    }
    findings
}

pub(crate) fn length(tree: &Tree) -> Vec<Finding> {
    let too_long = tree.rust().filter_map(|file| {
        let lines =
            file.lines.iter().filter(|line| !line.in_test && !line.code.trim().is_empty()).count();
        (lines > FILE_LINES_MAX)
            .then(|| file.finding(1, format!("{lines} lines of code, {FILE_LINES_MAX} allowed")))
    });
    too_long.collect()
}

pub(crate) fn words(tree: &Tree) -> Vec<Finding> {
    const BANNED: &[&str] = &["master", "slave", "vhu", "mgr"];
    let mut findings = Vec::new();
    for file in &tree.files {
        for (number, line) in file.numbered() {
            // A web address is somebody else's wording.
            let ours = format!("{} {}", line.code, line.comment);
            let text: Vec<&str> =
                ours.split_whitespace().filter(|word| !word.contains("://")).collect();
            for segment in segments(&text.join(" ")) {
                if BANNED.contains(&&*segment.trim_end_matches('s').to_lowercase()) {
                    findings.push(file.finding(number, format!("`{segment}`")));
                }
            }
        }
    }
    findings
}

pub(crate) fn names(tree: &Tree) -> Vec<Finding> {
    const DRAWERS: &[&str] = &["util", "utils", "helper", "helpers", "misc", "types", "traits"];
    let mut findings = Vec::new();
    for file in &tree.files {
        let drawer = Path::new(&file.path)
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .find(|part| {
                let stem = part.split('.').next().unwrap_or_default();
                DRAWERS.contains(&stem)
            });
        if let Some(drawer) = drawer {
            findings.push(file.finding(1, format!("`{drawer}` in the path")));
        }
    }
    findings.extend(tree.find_code(
        |_| true,
        |code| {
            let (_, name) = code.split_once("mod ")?;
            let name = name.trim_end_matches([';', '{', ' ']);
            DRAWERS.contains(&name).then(|| format!("module `{name}`"))
        },
    ));
    findings
}

pub(crate) fn discarded_errors(tree: &Tree) -> Vec<Finding> {
    tree.find_all_code(
        |_| true,
        |code| code.contains("map_err(|_").then(|| "`map_err(|_| …)`".into()),
    )
}

pub(crate) fn unsafe_home(tree: &Tree) -> Vec<Finding> {
    tree.find_all_code(
        |path| !UNSAFE_HOMES.iter().any(|home| within(path, home)),
        |code| {
            let opened = has_word(code, "unsafe_code")
                && (code.contains("allow(") || code.contains("expect("));
            (has_word(code, "unsafe") || opened).then(|| "`unsafe` outside its homes".into())
        },
    )
}

pub(crate) fn safety_comments(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for (number, line) in file.numbered() {
            // The type of a foreign function is no operation.
            if !has_word(&line.code, "unsafe") || line.code.contains("unsafe extern") {
                continue;
            }
            let first = number.saturating_sub(1 + SAFETY_DISTANCE_LINES);
            let above = &file.lines[first..number];
            // A declaration states its duty to callers under the heading that rustdoc knows.
            if !above
                .iter()
                .any(|line| line.comment.contains("SAFETY:") || line.comment.contains("# Safety"))
            {
                findings.push(file.finding(number, "`unsafe` without `SAFETY:`".into()));
            }
        }
    }
    findings
}

pub(crate) fn open_work(tree: &Tree) -> Vec<Finding> {
    const MARKS: &[&str] = &["TODO", "FIXME", "XXX", "HACK"];
    let mut findings = Vec::new();
    for file in &tree.files {
        for (number, line) in file.numbered() {
            let mark = MARKS.iter().find(|mark| has_word(&line.comment, mark));
            let stub =
                ["todo!", "unimplemented!"].into_iter().find(|name| line.code.contains(name));
            if let Some(found) = mark.copied().or(stub) {
                findings.push(file.finding(number, format!("`{found}`")));
            }
        }
    }
    findings
}

pub(crate) fn switched_off(tree: &Tree) -> Vec<Finding> {
    tree.find_all_code(
        |_| true,
        |code| {
            let found = ["#[ignore", "#[should_panic"]
                .into_iter()
                .find(|attribute| code.contains(attribute));
            found.map(|attribute| format!("`{attribute}`"))
        },
    )
}

pub(crate) fn sleeps(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for (number, line) in file.numbered() {
            let test = line.in_test || file.path.starts_with("tests/");
            if test && has_word(&line.code, "sleep") {
                findings.push(file.finding(number, "`sleep` in a test".into()));
            }
        }
    }
    findings
}

pub(crate) fn parsers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust().filter(|file| {
        !file.is_test_file() && PARSERS.iter().any(|parser| within(&file.path, parser))
    }) {
        // A lint level set in a module's root holds in its children.
        let denied: String = tree
            .rust()
            .filter(|other| file.path == other.path || file.is_below(other))
            .map(SourceFile::denied_lints)
            .collect();
        let missing: Vec<&str> =
            PARSER_LINTS.iter().copied().filter(|lint| !has_word(&denied, lint)).collect();
        if !missing.is_empty() {
            // At the attribute that says less than it should, where a waiver can stand above it.
            let line = file.numbered().find(|(_, line)| line.code.contains("#![deny("));
            let line = line.map_or(1, |(number, _)| number);
            findings.push(
                file.finding(line, format!("does not deny clippy::{{{}}}", missing.join(", "))),
            );
        }
    }
    findings
}

pub(crate) fn globs(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for (number, line) in file.numbered().filter(|(_, line)| line.code.contains("::*")) {
            // A crate's prelude is made to be taken whole; a file's own tests are part of the file.
            let own = line.in_test && line.code.contains("super::*");
            if !own && !line.code.contains("prelude::*") {
                findings.push(file.finding(number, format!("`{}`", line.code.trim())));
            }
        }
    }
    findings
}

pub(crate) fn heads(tree: &Tree) -> Vec<Finding> {
    let headless = tree.rust().filter_map(|file| {
        let first = file
            .lines
            .iter()
            .map(|line| line.raw.trim())
            .find(|line| !line.is_empty() && !line.starts_with("#!"));
        (!first.is_some_and(|line| line.starts_with("//!")))
            .then(|| file.finding(1, "no `//!` head".into()))
    });
    headless.collect()
}

pub(crate) fn lints(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|file| file.path.ends_with("/Cargo.toml")) {
        let text: Vec<&str> =
            file.lines.iter().map(|line| line.raw.trim()).filter(|line| !line.is_empty()).collect();
        if !text.windows(2).any(|pair| pair == ["[lints]", "workspace = true"]) {
            findings.push(file.finding(1, "no `[lints] workspace = true`".into()));
        }
    }
    findings
}

pub(crate) fn conformance(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|file| file.path == "docs/conformance.md") {
        for (number, line) in file.numbered() {
            let cells: Vec<&str> =
                line.raw.trim().trim_matches('|').split('|').map(str::trim).collect();
            let is_row =
                line.raw.starts_with('|') && cells[0] != "clause" && !cells[0].starts_with("--");
            if is_row && cells.len() != 4 {
                findings.push(file.finding(
                    number,
                    format!("{} columns, not clause | what | code | test", cells.len()),
                ));
            } else if is_row {
                findings.extend(
                    dead_cells(tree, &cells[2..])
                        .into_iter()
                        .map(|what| file.finding(number, what)),
                );
            }
        }
    }
    findings
}

/// What is wrong with a row's code and test cells: each holds references, or says in words why there are none.
fn dead_cells(tree: &Tree, cells: &[&str]) -> Vec<String> {
    let mut dead = Vec::new();
    for (cell, column) in cells.iter().zip(["code", "test"]) {
        let spans = cell.split('`').skip(1).step_by(2);
        let references: Vec<&str> =
            spans.filter(|span| span.contains("::") || span.contains('/')).collect();
        if references.is_empty() && cell.split_whitespace().count() < 2 {
            dead.push(format!("the {column} column has neither a reference nor a reason"));
        }
        dead.extend(
            references
                .iter()
                .filter(|reference| !resolves(tree, reference, column))
                .map(|r| format!("`{r}` is gone")),
        );
    }
    dead
}

/// Whether `path::name` names an item of that file: in the test column, a function. A `path` alone names a file.
fn resolves(tree: &Tree, reference: &str, column: &str) -> bool {
    const KINDS: &[&str] =
        &["fn", "struct", "enum", "const", "static", "trait", "type", "mod", "union"];
    let kinds = if column == "test" { &KINDS[..1] } else { KINDS };
    let Some((path, name)) = reference.split_once("::") else {
        return tree.files.iter().any(|file| file.path == reference);
    };
    let name = name.rsplit("::").next().unwrap_or(name);
    tree.files.iter().filter(|file| file.path == path).any(|file| {
        file.lines.iter().any(|line| {
            let words: Vec<&str> =
                line.code.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()).collect();
            words.windows(2).any(|pair| pair[1] == name && kinds.contains(&pair[0]))
        })
    })
}

pub(crate) fn links(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|file| file.path.ends_with(".md")) {
        let mut fenced = false;
        for (number, line) in file.numbered() {
            fenced ^= line.raw.trim_start().starts_with("```");
            for target in line.raw.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                if !fenced && !target.contains("://") && !tree.has_link_target(&file.path, target) {
                    findings.push(file.finding(number, format!("`{target}` leads nowhere")));
                }
            }
        }
    }
    findings
}

/// The parts of every name in a text: `set_memTable` → `set`, `mem`, `Table`.
fn segments(text: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let mut was_lower = false;
    for c in text.chars() {
        if !c.is_alphanumeric() || (was_lower && c.is_uppercase()) {
            segments.push(String::new());
        }
        if let (true, Some(segment)) = (c.is_alphanumeric(), segments.last_mut()) {
            segment.push(c);
        }
        was_lower = c.is_lowercase();
    }
    segments
}
