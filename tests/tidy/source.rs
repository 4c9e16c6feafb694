//! The tree as the rules see it: files, their lines, and in each line of Rust what the compiler reads (code), what
//! people read (comment), and whether only tests are built with it.
//!
//! Deliberately no parser: string literals are emptied and comments set apart, so that a rule can search the rest as
//! text. A file that is not Rust is all comment.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// One thing that a rule found.
pub(crate) struct Finding {
    pub(crate) path: String,
    pub(crate) line: usize,
    pub(crate) what: String,
    pub(crate) rule: &'static str,
    pub(crate) reason: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: [{}] {}: {}", self.path, self.line, self.rule, self.what, self.reason)
    }
}

pub(crate) struct Tree {
    pub(crate) root: PathBuf,
    pub(crate) files: Vec<SourceFile>,
}

impl Tree {
    /// Every text file below `root` except build products and hidden folders; `.ci` is ours.
    pub(crate) fn read(root: &Path) -> Tree {
        let mut files = Vec::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder of the tree can be read") {
                let entry = entry.expect("a folder of the tree can be read");
                let name = entry.file_name().to_string_lossy().into_owned();
                let kind = entry.file_type().expect("a file of the tree has a type");
                if kind.is_dir() && name != "target" && (!name.starts_with('.') || name == ".ci") {
                    folders.push(entry.path());
                } else if let (true, Ok(text)) = (kind.is_file(), fs::read_to_string(entry.path()))
                {
                    let path = entry
                        .path()
                        .strip_prefix(root)
                        .expect("below the root")
                        .to_string_lossy()
                        .into_owned();
                    files.push(SourceFile::new(&path, &text));
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Tree { root: root.to_owned(), files }
    }

    pub(crate) fn rust(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.iter().filter(|file| file.path.ends_with(".rs"))
    }

    /// Findings of a check on each line of Rust that is not test code.
    pub(crate) fn find_code(
        &self,
        path: impl Fn(&str) -> bool,
        check: impl Fn(&str) -> Option<String>,
    ) -> Vec<Finding> {
        self.find_lines(
            |file, line| path(&file.path) && !line.in_test && !file.is_test_file(),
            check,
        )
    }

    /// Findings of a check on each line of Rust, tests included.
    pub(crate) fn find_all_code(
        &self,
        path: impl Fn(&str) -> bool,
        check: impl Fn(&str) -> Option<String>,
    ) -> Vec<Finding> {
        self.find_lines(|file, _| path(&file.path), check)
    }

    fn find_lines(
        &self,
        take: impl Fn(&SourceFile, &Line) -> bool,
        check: impl Fn(&str) -> Option<String>,
    ) -> Vec<Finding> {
        let mut findings = Vec::new();
        for file in self.rust() {
            for (number, line) in file.numbered().filter(|(_, line)| take(file, line)) {
                findings.extend(check(&line.code).map(|what| file.finding(number, what)));
            }
        }
        findings
    }

    /// Whether `tidy(rule): reason` stands on the finding's line or on the one above.
    pub(crate) fn waives(&self, finding: &Finding, rule: &str) -> bool {
        let mark = format!("tidy({rule}):");
        let file = self.files.iter().find(|file| file.path == finding.path);
        file.is_some_and(|file| {
            let near =
                file.lines.iter().skip(finding.line.saturating_sub(2)).take(2.min(finding.line));
            near.filter_map(|line| line.comment.split_once(&mark))
                .any(|(_, reason)| !reason.trim().is_empty())
        })
    }

    /// Whether a Markdown link from the file `from` leads to a file of the tree, and to a heading of it.
    pub(crate) fn has_link_target(&self, from: &str, target: &str) -> bool {
        let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
        let folder = Path::new(from).parent().unwrap_or(Path::new(""));
        let path = if path.is_empty() { from.to_owned() } else { normal(&folder.join(path)) };
        if anchor.is_empty() {
            let below = format!("{path}/");
            return self
                .files
                .iter()
                .any(|file| file.path == path || file.path.starts_with(&below));
        }
        let page = self.files.iter().find(|file| file.path == path);
        page.is_some_and(|page| {
            page.lines.iter().any(|line| line.raw.starts_with('#') && slug(&line.raw) == anchor)
        })
    }
}

/// `docs/../systemd/README.md` → `systemd/README.md`.
fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(parts.pop()),
            Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            _ => {}
        }
    }
    parts.join("/")
}

/// The anchor that Markdown viewers make of a heading.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

pub(crate) struct SourceFile {
    /// From the root of the tree, with `/`.
    pub(crate) path: String,
    pub(crate) lines: Vec<Line>,
}

impl SourceFile {
    pub(crate) fn new(path: &str, text: &str) -> SourceFile {
        let mut lines = if path.ends_with(".rs") {
            split_rust(text)
        } else {
            text.lines().map(Line::prose).collect()
        };
        mark_tests(&mut lines);
        SourceFile { path: path.to_owned(), lines }
    }

    pub(crate) fn finding(&self, line: usize, what: String) -> Finding {
        Finding { path: self.path.clone(), line, what, rule: "", reason: "" }
    }

    /// Lines with their numbers, from 1.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (usize, &Line)> {
        self.lines.iter().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// A module that only tests are built with: `#[cfg(test)] mod tests;` names it.
    pub(crate) fn is_test_file(&self) -> bool {
        self.path.ends_with("/tests.rs")
            || self.path.contains("/src/") && self.path.contains("/tests/")
    }

    /// Whether `other` is the root of a module around this file.
    pub(crate) fn is_below(&self, other: &SourceFile) -> bool {
        let folder = other.path.strip_suffix("/mod.rs").or_else(|| other.path.strip_suffix(".rs"));
        folder.is_some_and(|folder| within(&self.path, folder))
    }

    /// The text of the file's own `#![deny(…)]` attributes.
    pub(crate) fn denied_lints(&self) -> String {
        let code: String = self.lines.iter().map(|line| line.code.as_str()).collect();
        let attributes = code.split("#![").skip(1).filter_map(|rest| rest.split(']').next());
        attributes.filter(|text| text.contains("deny(") || text.contains("forbid(")).collect()
    }

    /// The first names of all `crate::…` paths outside tests, with their lines: `use crate::{a::b, c}` yields `a`, `c`.
    pub(crate) fn crate_paths(&self) -> Vec<(usize, String)> {
        let code: Vec<&str> = self
            .lines
            .iter()
            .map(|line| if line.in_test { "" } else { line.code.as_str() })
            .collect();
        let code = code.join("\n");
        let mut paths = Vec::new();
        for (at, _) in code
            .match_indices("crate::")
            .filter(|(at, _)| !code[..*at].ends_with(|c| is_word(c) || c == '$'))
        {
            let line = code[..at].matches('\n').count() + 1;
            paths.extend(
                first_names(&code[at + "crate::".len()..]).into_iter().map(|name| (line, name)),
            );
        }
        paths
    }
}

/// The names that a path, or a braced group of paths, begins with.
fn first_names(rest: &str) -> Vec<String> {
    let Some(group) = rest.strip_prefix('{') else {
        return rest.split(|c: char| !is_word(c)).next().map(str::to_owned).into_iter().collect();
    };
    let (mut depth, mut names, mut current) = (0_usize, Vec::new(), String::new());
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(std::mem::take(&mut current)),
            c if depth == 0 => current.push(c),
            _ => {}
        }
    }
    names.push(current);
    names
        .iter()
        .filter_map(|name| name.trim().split("::").next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// One line, told apart into what the compiler reads and what people read.
#[derive(Default)]
pub(crate) struct Line {
    pub(crate) raw: String,
    /// Without comments; string literals are emptied, so that a rule never trips over its own examples.
    pub(crate) code: String,
    pub(crate) comment: String,
    pub(crate) in_test: bool,
}

impl Line {
    fn prose(raw: &str) -> Line {
        Line { raw: raw.to_owned(), comment: raw.to_owned(), ..Line::default() }
    }
}

/// What the splitter is inside of.
enum Inside {
    Code,
    LineComment,
    /// How deep: Rust's block comments nest.
    BlockComment(usize),
    /// The text that ends the literal, and whether a backslash escapes.
    Literal(String, bool),
}

fn split_rust(text: &str) -> Vec<Line> {
    let mut inside = Inside::Code;
    let mut lines = Vec::new();
    for raw in text.lines() {
        let mut line = Line { raw: raw.to_owned(), ..Line::default() };
        let mut at = 0;
        while at < raw.len() {
            at += step(&raw[at..], &mut inside, &mut line);
        }
        if matches!(inside, Inside::LineComment) {
            inside = Inside::Code;
        }
        lines.push(line);
    }
    lines
}

/// Takes one token or character off `rest`; the number of bytes taken.
fn step(rest: &str, inside: &mut Inside, line: &mut Line) -> usize {
    let first = rest.chars().next().map_or(1, char::len_utf8);
    match inside {
        Inside::LineComment => {
            line.comment.push_str(rest);
            rest.len()
        }
        Inside::BlockComment(depth) => {
            let taken = if rest.starts_with("*/") || rest.starts_with("/*") { 2 } else { first };
            match (rest.starts_with("*/"), rest.starts_with("/*"), *depth) {
                (true, _, 1) => *inside = Inside::Code,
                (true, _, deep) => *inside = Inside::BlockComment(deep - 1),
                (_, true, deep) => *inside = Inside::BlockComment(deep + 1),
                _ => line.comment.push_str(&rest[..taken]),
            }
            taken
        }
        Inside::Literal(end, escapes) => {
            if *escapes && rest.starts_with('\\') {
                return rest.chars().take(2).map(char::len_utf8).sum();
            }
            let taken = if rest.starts_with(end.as_str()) {
                end.len()
            } else {
                return first;
            };
            line.code.push('"');
            *inside = Inside::Code;
            taken
        }
        Inside::Code => step_code(rest, inside, line),
    }
}

fn step_code(rest: &str, inside: &mut Inside, line: &mut Line) -> usize {
    let first = rest.chars().next().map_or(1, char::len_utf8);
    if rest.starts_with("//") {
        *inside = Inside::LineComment;
        return 2;
    }
    if rest.starts_with("/*") {
        *inside = Inside::BlockComment(1);
        return 2;
    }
    let follows_word = line.code.ends_with(is_word);
    let hashes = rest
        .strip_prefix('r')
        .filter(|_| !follows_word || line.code.ends_with('b'))
        .map(|rest| rest.len() - rest.trim_start_matches('#').len());
    if let Some(hashes) = hashes.filter(|hashes| rest[1 + hashes..].starts_with('"')) {
        *inside = Inside::Literal(format!("\"{}", "#".repeat(hashes)), false);
        line.code.push('"');
        return hashes + 2;
    }
    if rest.starts_with('"') {
        *inside = Inside::Literal("\"".into(), true);
        line.code.push('"');
        return 1;
    }
    if let Some(len_bytes) = char_literal(rest) {
        line.code.push_str("' '");
        return len_bytes;
    }
    line.code.push_str(&rest[..first]);
    first
}

/// The length of the character literal that `rest` begins with; a lifetime is none.
fn char_literal(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix('\'')?;
    if body.starts_with('\\') {
        return body[2..].find('\'').map(|end| end + 4);
    }
    let len_bytes = body.chars().next()?.len_utf8();
    body[len_bytes..].starts_with('\'').then_some(len_bytes + 2)
}

/// Marks the items that stand under `#[cfg(test)]`.
fn mark_tests(lines: &mut [Line]) {
    let (mut waiting, mut depth) = (false, 0_usize);
    for line in lines {
        waiting |= depth == 0 && line.code.trim_start().starts_with("#[cfg(test)]");
        line.in_test = waiting || depth > 0;
        for c in line.code.chars().filter(|_| line.in_test) {
            match c {
                '{' => (waiting, depth) = (false, depth + 1),
                '}' => depth = depth.saturating_sub(1),
                ';' if depth == 0 => waiting = false,
                _ => {}
            }
        }
    }
}

pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

pub(crate) fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !is_word(c)).any(|found| found == word)
}

/// `path` is `place`, or lies below it.
pub(crate) fn within(path: &str, place: &str) -> bool {
    path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
