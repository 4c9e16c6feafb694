//! The initial RAM disk of a guest: a cpio archive in the "newc" form, uncompressed, written in memory and without root.
//!
//! Every entry belongs to root and has time 0, so the same parts make the same archive.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::daemon::build_directory;
use crate::rig::Rig;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// What runs programs that are linked to libraries.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Initrd {
    archive: Vec<u8>,
    present: BTreeSet<String>,
    module_count: usize,
}

impl Initrd {
    /// An archive whose `/init` is the `guest` package's program, with busybox and these kernel modules, which it loads in
    /// this order.
    ///
    /// # Panics
    /// If a part is missing or cannot be read.
    pub fn with_guest(rig: &Rig, modules: &[PathBuf]) -> Self {
        let mut initrd = Self::default();
        initrd.file("init", &guest_program());
        initrd.file("bin/busybox", &rig.path("bin/busybox"));
        for module in modules {
            initrd.module(module);
        }
        initrd
    }

    /// Adds an empty directory, and those above it.
    pub fn directory(&mut self, path: &str) {
        if self.present.contains(path) {
            return;
        }
        self.parents(path);
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file of the host, executable, at `path` (without a leading slash).
    ///
    /// # Panics
    /// If the file cannot be read.
    pub fn file(&mut self, path: &str, from: &Path) {
        let content = fs::read(from)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", from.display()));
        self.content(path, &content);
    }

    /// Adds a file with this content, executable, at `path`. The first one at a path stays.
    pub fn content(&mut self, path: &str, content: &[u8]) {
        if !self.present.contains(path) {
            self.parents(path);
            self.entry(path, PROGRAM, content);
        }
    }

    /// Adds a symbolic link at `path`.
    pub fn symlink(&mut self, path: &str, to: &str) {
        self.parents(path);
        self.entry(path, SYMLINK, to.as_bytes());
    }

    /// Adds a program of the rig with the loader and the libraries it needs, where that loader looks for them.
    ///
    /// # Panics
    /// If its libraries cannot be listed.
    pub fn program(&mut self, rig: &Rig, path: &str) {
        let folders =
            ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];
        let search: Vec<_> =
            folders.iter().map(|folder| rig.path(folder).display().to_string()).collect();
        let loader = rig.path(LOADER);
        let mut list = Command::new(&loader);
        list.arg("--library-path").arg(search.join(":"));
        self.linked(path, &rig.path(path), &loader, list);
    }

    /// Adds a program of this build at `bin`, with the host's loader and libraries. Where a program of the rig needs the same
    /// ones, these must come first: the host's are no older.
    ///
    /// # Panics
    /// If it is not built, or its libraries cannot be listed.
    pub fn own_program(&mut self, name: &str) {
        let loader = Path::new("/").join(LOADER);
        let program = build_directory().join(name);
        assert!(program.is_file(), "{} is missing: run `cargo build` first", program.display());
        self.linked(&format!("bin/{name}"), &program, &loader, Command::new(&loader));
    }

    /// Adds a program, its loader and what that lists, asked by `list`.
    fn linked(&mut self, path: &str, program: &Path, loader: &Path, mut list: Command) {
        let listed = list.arg("--list").arg(program).output();
        let listed =
            listed.unwrap_or_else(|error| panic!("cannot run {}: {error}", loader.display()));
        assert!(
            listed.status.success(),
            "{} lacks a library: {}",
            program.display(),
            String::from_utf8_lossy(&listed.stderr)
        );
        self.file(path, program);
        self.file(LOADER, loader);
        // Lines are "NAME => PATH (ADDRESS)"; the kernel's own object and the loader have no arrow.
        for line in String::from_utf8_lossy(&listed.stdout).lines() {
            if let Some((name, rest)) = line.trim().split_once(" => ") {
                let library = rest.split(" (").next().unwrap_or(rest);
                self.file(&format!("lib/x86_64-linux-gnu/{name}"), Path::new(library));
            }
        }
    }

    /// Writes the archive to a file.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn write(mut self, path: &Path) {
        // The first four are mount points; iperf3 wants the last one.
        for directory in ["dev", "proc", "sys", "mnt", "tmp"] {
            self.directory(directory);
        }
        self.entry("TRAILER!!!", 0, &[]);
        fs::write(path, &self.archive)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    fn module(&mut self, module: &Path) {
        // The number keeps the order of loading in the order of names.
        let name = module.file_name().expect("a module is a file").to_string_lossy();
        self.file(&format!("modules/{:02}-{name}", self.module_count), module);
        self.module_count += 1;
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            if !self.present.contains(&path[..at]) {
                self.entry(&path[..at], DIRECTORY, &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.present.insert(path.to_owned());
        let inode = self.present.len();
        let len = content.len();
        let name_len = path.len() + 1;
        // Documentation/driver-api/early-userspace/buffer-format.rst: magic, then inode, mode, uid, gid, links, time, size,
        // device (major, minor), special device (major, minor), name size with its zero byte, checksum; eight digits each.
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{len:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_len:08x}{0:08x}",
            0, 1
        );
        self.archive.extend_from_slice(header.as_bytes());
        self.archive.extend_from_slice(path.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

/// The static program that is PID 1 in the guest: beside this test's own build, under its own target's name.
fn guest_program() -> PathBuf {
    let build = std::env::var_os("OUTBOARD_GUEST").map_or_else(
        || build_directory().join("../x86_64-unknown-linux-gnu/debug/guest"),
        PathBuf::from,
    );
    assert!(
        build.is_file(),
        "{} is missing: run `make guest` first (`make test-fast` does)",
        build.display()
    );
    build
}
