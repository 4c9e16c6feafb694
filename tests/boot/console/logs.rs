//! Logs: nothing is lost to them, however fast the guest talks, but where the disk is full; then the guest goes on.

use std::fs;
use std::path::Path;
use std::process::Command;

use guest::pattern;
use tests::lacks_root;

use super::FrontEnd;
use super::server::Server;

/// What the guest says, and how much of it is in a file.
const OUTPUT_BYTES: u64 = 16 << 20;
const ROTATED: &str = "console,endpoint=file:@/log,max-size=1M,keep=30";
/// The room on the small disk, and what is in it.
const DISK_BYTES: u64 = 4 << 20;
const FILLER_BYTES: u64 = 3 << 20;

fn expected(seed: u64, len_bytes: u64) -> Vec<u8> {
    let mut all = Vec::new();
    pattern::write(&mut all, seed, len_bytes).expect("a vector takes all");
    all
}

/// The files of a log, the oldest first, as one.
fn whole_log(server: &Server, count: usize) -> Vec<u8> {
    let older = (1..count).rev().map(|number| format!("log.{number}"));
    older.chain(["log".to_owned()]).flat_map(|name| server.read(&name)).collect()
}

/// Under load the files of a log have all that the guest said; and a log that is moved away is begun anew.
pub(super) fn rotate_and_lose_nothing(front_end: &impl FrontEnd) {
    let server = Server::start(&[ROTATED], &[]);
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("open hvc0");
    guest.do_line(&format!("send hvc0 1 {OUTPUT_BYTES}"));
    let len_bytes = || {
        let files = fs::read_dir(server.path("")).expect("it is ours").filter_map(Result::ok);
        let logs = files.filter(|file| file.file_name().to_string_lossy().starts_with("log"));
        logs.filter_map(|file| file.metadata().ok()).map(|found| found.len()).collect::<Vec<_>>()
    };
    let is_written = || Some(len_bytes()).filter(|all| all.iter().sum::<u64>() >= OUTPUT_BYTES);
    let files = super::server::wait_for(is_written);
    let files = files.unwrap_or_else(|| panic!("{:?} in all", len_bytes()));
    assert!(files.len() > 10 && files.iter().all(|len| *len <= 1 << 20), "{files:?}");
    assert!(whole_log(&server, files.len()) == expected(1, OUTPUT_BYTES), "the log is another");

    fs::rename(server.path("log"), server.path("moved")).expect("it is ours");
    server.hang_up();
    super::server::wait_for(|| server.path("log").exists().then_some(())).expect("a new log");
    guest.do_line("send hvc0 2 1000");
    server.wait_for_file("log", 1000);
    assert!(server.read("log") == expected(2, 1000));
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// A full disk is told, and does not stop the guest; when there is room again, the log goes on and says what it lacks.
pub(super) fn live_with_a_full_disk(front_end: &impl FrontEnd) {
    if lacks_root("a small disk") {
        return;
    }
    let port = "console,endpoint=unix:@/con,endpoint=file:@/small/log";
    let server = Server::start_through(&[port], &[], |directory| {
        fs::create_dir(directory.join("small")).expect("it is ours");
        let small = directory.join("small").display().to_string();
        let script = format!(
            "mount -t tmpfs -o size={DISK_BYTES} small {small} && \
             head -c {FILLER_BYTES} /dev/zero >{small}/filler && exec \"$@\""
        );
        ["unshare", "--mount", "sh", "-c", &script, "sh"].map(str::to_owned).into()
    });
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("open hvc0");
    guest.do_line(&format!("send hvc0 1 {OUTPUT_BYTES}"));
    let port = server.wait_for(0, |port| port["endpoints"][1]["lost_bytes"].as_u64() > Some(0));
    assert_ne!(port["endpoints"][1]["state"], "ok", "{port}");
    server.wait_for_log("small/log");

    let small = server.path("small");
    in_namespace(&server, "rm", &small.join("filler"));
    guest.do_line("send hvc0 2 1000");
    server.wait_for(0, |port| port["endpoints"][1]["state"] == "ok");
    let log = in_namespace(&server, "cat", &small.join("log"));
    let lost = server.port(0)["endpoints"][1]["lost_bytes"].as_u64().expect("a number");
    expect_note(&log, lost);
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// A log has the first of what was said, a note of how much is missing, and then all that was said since.
fn expect_note(log: &[u8], lost_bytes: u64) {
    let said = [expected(1, OUTPUT_BYTES), expected(2, 1000)].concat();
    let before = log.iter().zip(&said).take_while(|(logged, said)| logged == said).count();
    let after = said.len() - before - usize::try_from(lost_bytes).expect("a test's");
    let (rest, last) = log[before..].split_at(log.len() - before - after);
    assert!(last == &said[said.len() - after..], "the log goes on with something else");
    let note = String::from_utf8_lossy(rest);
    assert!(note.contains(&lost_bytes.to_string()) && note.len() < 200, "{note:?}");
}

/// Runs a program on a file that only the daemon sees.
fn in_namespace(server: &Server, program: &str, file: &Path) -> Vec<u8> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--mount=/proc/{}/ns/mnt", server.id())).arg(program).arg(file);
    let output = command.output().expect("nsenter is there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
