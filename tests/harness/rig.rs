//! Where `tests/rig/setup` has put kernels, emulators and file system tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::requirement::cannot_run;

/// Which kernel runs under an emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelRelease {
    /// Debian 12's.
    Stable,
    /// One of 2024 that has had no correction since: Debian 11's.
    Old,
    /// The newest that Debian has. What a console takes is built in.
    New,
}

/// The unpacked packages. See `tests/rig/README.md` for the layout.
#[derive(Clone, Debug)]
pub struct Rig {
    directory: PathBuf,
}

impl Rig {
    /// The rig, or `None` where it has not been set up, which the caller takes as "cannot run here".
    ///
    /// # Panics
    /// Where `REQUIRE_ALL=1` demands it.
    pub fn find() -> Option<Self> {
        let directory = std::env::var_os("OUTBOARD_RIG_DIR").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/rig"),
            PathBuf::from,
        );
        if directory.join("stamp").is_file() {
            let directory =
                directory.canonicalize().expect("a directory that holds a file has a path");
            return Some(Self { directory });
        }
        cannot_run(&format!("{} is not set up: run tests/rig/setup", directory.display()));
        None
    }

    /// The path of a file of the packages, as it would be on a system that has them installed.
    pub fn path(&self, below_root: &str) -> PathBuf {
        self.directory.join("root").join(below_root)
    }

    /// A command that runs one of the rig's tools on the host, with the rig's tools first in its search path.
    pub fn tool(&self, name: &str) -> Command {
        let bin = self.directory.join("bin");
        let mut path = bin.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = Command::new(bin.join(name));
        command.env("PATH", path);
        command
    }

    /// The kernel that runs under an emulator.
    ///
    /// # Panics
    /// If the package has not exactly one.
    pub fn kernel(&self, release: KernelRelease) -> PathBuf {
        let root = self.kernel_root(release);
        find(&root.join("boot"), &is_kernel)
            .or_else(|| find(&root.join("usr/lib/modules"), &is_kernel))
            .unwrap_or_else(|| panic!("no kernel below {}", root.display()))
    }

    /// A module of that kernel, by its name without `.ko`. The newest has them compressed, and unpacks them itself.
    ///
    /// # Panics
    /// If there is not exactly one.
    pub fn kernel_module(&self, release: KernelRelease, name: &str) -> PathBuf {
        let root = self.kernel_root(release);
        let folder = if release == KernelRelease::New { "usr/lib/modules" } else { "lib/modules" };
        find_module(&only(&root.join(folder), |_| true), name)
    }

    fn kernel_root(&self, release: KernelRelease) -> PathBuf {
        match release {
            KernelRelease::Stable => self.path(""),
            KernelRelease::Old => self.directory.join("linux-old"),
            KernelRelease::New => self.directory.join("linux-new"),
        }
    }

    /// A module of the User-Mode Linux kernel, by its name without `.ko`.
    ///
    /// # Panics
    /// If there is not exactly one.
    pub fn uml_module(&self, name: &str) -> PathBuf {
        find_module(&only(&self.path("usr/lib/uml/modules"), |_| true), name)
    }
}

fn only(directory: &Path, wanted: impl Fn(&Path) -> bool) -> PathBuf {
    let entries = fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("cannot list {}: {error}", directory.display()));
    let mut found: Vec<_> = entries
        .map(|entry| entry.expect("a listed entry").path())
        .filter(|path| wanted(path))
        .collect();
    assert!(found.len() == 1, "one entry expected in {}, found {found:?}", directory.display());
    found.remove(0)
}

fn is_kernel(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
}

fn find_module(tree: &Path, name: &str) -> PathBuf {
    let file_names = [format!("{name}.ko"), format!("{name}.ko.xz")];
    let is_it = |path: &Path| {
        file_names.iter().any(|file_name| path.file_name().is_some_and(|name| name == &**file_name))
    };
    find(tree, &is_it).unwrap_or_else(|| panic!("no module {name} below {}", tree.display()))
}

/// The first file that is wanted, in a directory or below. None, too, where there is no such directory.
fn find(tree: &Path, is_wanted: &dyn Fn(&Path) -> bool) -> Option<PathBuf> {
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten() {
            let entry = entry.expect("a listed entry");
            if entry.file_type().expect("a listed entry has a type").is_dir() {
                directories.push(entry.path());
            } else if is_wanted(&entry.path()) {
                return Some(entry.path());
            }
        }
    }
    None
}
