//! What `packaging/install` and the Debian package put in place, and what they take away again.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::{cannot_run, program, temp_dir};

use crate::systemd::{
    INSIDE, JournalOnPanic, configure, output, outside_with_the_rig, run, show,
    starts_when_a_vmm_connects, systemctl, text, verify,
};

#[test]
fn what_is_installed_is_taken_away_again() {
    let destination = temp_dir();
    let prefix = "/opt/out-board";
    let installer = |arguments: &[&str]| {
        let mut command = Command::new(project().join("packaging/install"));
        command.env("DESTDIR", destination.path()).env("PREFIX", prefix).args(arguments);
        command
    };
    let built = program("vhost-blk");
    let built = built.parent().expect("a file is in a directory").to_str().expect("a plain path");
    run(&mut installer(&[built]));

    let root = destination.path();
    let listed = text(&output(&mut installer(&["--list"])).stdout);
    let listed: BTreeSet<PathBuf> = listed.lines().map(PathBuf::from).collect();
    assert_eq!(files(root), listed);
    for file in listed.iter().filter(|file| file.extension().is_none_or(|kind| kind != "md")) {
        let Ok(words) = fs::read_to_string(file) else { continue };
        assert!(!words.contains("/usr/"), "{} is of another place", file.display());
        for named in words.split(['"', '=', ' ']).filter(|word| word.starts_with(prefix)) {
            let named = named.split([':', '\n']).next().unwrap_or(named).trim_end_matches('.');
            assert!(root.join(&named[1..]).exists(), "{}: there is no {named}", file.display());
        }
    }

    run(&mut installer(&["--remove"]));
    assert_eq!(files(root), BTreeSet::new());
    let documents = root.join(&prefix[1..]).join("share/doc");
    assert_eq!(fs::read_dir(&documents).expect("it is not ours").count(), 0);
}

#[test]
fn a_prefix_that_no_unit_could_name_is_refused() {
    for prefix in ["usr", "/opt/out board", "/opt/$(reboot)", "/opt/100%"] {
        let mut installer = Command::new(project().join("packaging/install"));
        let refusal = output(installer.env("PREFIX", prefix).arg("--list"));
        assert_eq!(refusal.status.code(), Some(2), "{prefix}: {}", text(&refusal.stdout));
    }
}

#[test]
fn the_debian_package_is_installed_serves_and_is_purged() {
    if env::var_os(INSIDE).is_some() {
        return inside();
    }
    match package() {
        Some(_) => {
            outside_with_the_rig("package::the_debian_package_is_installed_serves_and_is_purged")
        }
        None => cannot_run("there is no package in target/debian: packaging/deb makes one"),
    }
}

/// In the namespace, as a unit of the systemd there.
fn inside() {
    let _journal = JournalOnPanic;
    let package = package().expect("there is one outside");
    let before = traces();
    run(dpkg().arg("--install").arg(&package));
    assert_ne!(traces(), before);
    configure("blk", "first", "DISK=null:16M\n");
    configure("console", "first", "OPTIONS=--port console,endpoint=null\n");
    verify("vhost-blk@first", 10);
    for device in ["blk", "console"] {
        let instance = format!("vhost-{device}@first");
        systemctl(&["enable", &format!("{instance}.socket")]);
        let socket = format!("/run/outboard/{device}/first.sock");
        starts_when_a_vmm_connects(&instance, Path::new(&socket));
    }

    // An upgrade leaves alone what runs.
    let process = show("vhost-blk@first.service", "MainPID");
    run(dpkg().arg("--install").arg(&package));
    assert_eq!(show("vhost-blk@first.service", "MainPID"), process);

    // An image outlives the package, and its owner outlives it, too.
    let image = Path::new("/var/lib/outboard/blk/first/disk.raw");
    fs::write(image, "precious").expect("root may");
    run(dpkg().args(["--purge", "outboard"]));
    assert!(!Path::new("/proc").join(process).exists(), "the daemon has lost its program");
    assert_eq!(fs::read_to_string(image).expect("it is there"), "precious");
    assert!(has_account("passwd", "outboard"));
    assert!(!has_account("group", "outboard-vmm"));

    fs::remove_file(image).expect("root may");
    run(dpkg().arg("--install").arg(&package));
    run(dpkg().args(["--purge", "outboard"]));
    assert_eq!(traces(), before, "something is left behind");
}

/// The package that was made last.
fn package() -> Option<PathBuf> {
    let made = fs::read_dir(project().join("target/debian")).ok()?;
    made.filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
}

fn dpkg() -> Command {
    Command::new("dpkg")
}

fn has_account(database: &str, name: &str) -> bool {
    output(Command::new("getent").args([database, name])).status.success()
}

/// All that has our name in any place that a package, its daemons or its administrator write to, and our accounts.
fn traces() -> BTreeSet<PathBuf> {
    let places = [
        "/etc",
        "/run/outboard",
        "/usr/bin",
        "/usr/lib/systemd",
        "/usr/lib/sysusers.d",
        "/usr/lib/tmpfiles.d",
        "/usr/share/doc",
        "/usr/share/qemu",
        "/var/lib",
        "/var/log",
    ];
    let ours = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| {
            ["outboard", "vhost-blk", "vhost-net", "vhost-console"]
                .iter()
                .any(|word| name.contains(word))
        })
    };
    let mut found: BTreeSet<PathBuf> =
        places.iter().flat_map(|place| entries(Path::new(place))).filter(ours).collect();
    for (database, name) in
        [("passwd", "outboard"), ("group", "outboard"), ("group", "outboard-vmm")]
    {
        if has_account(database, name) {
            found.insert(Path::new(database).join(name));
        }
    }
    found
}

fn files(root: &Path) -> BTreeSet<PathBuf> {
    entries(root).into_iter().filter(|path| !path.is_dir()).collect()
}

/// All that is below a directory, itself too; links are not followed.
fn entries(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut next = 0;
    while let Some(path) = found.get(next) {
        next += 1;
        if path.is_symlink() {
            continue;
        }
        if let Ok(below) = fs::read_dir(path) {
            let below: Vec<_> = below.filter_map(|entry| Some(entry.ok()?.path())).collect();
            found.extend(below);
        }
    }
    found.retain(|path| path.is_symlink() || path.exists());
    found
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
