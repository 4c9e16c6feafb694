//! `endpoint=file:PATH`: a log.
//!
//! Contract: what the guest puts out is appended as it is; with `timestamps` each line begins with the time at which its first byte
//! came. Before the file grows beyond `max-size` it becomes `PATH.1`, what was that `PATH.2`, and so on; this happens
//! between two lines, unless there is no room for the rest of one that has begun. Only regular files are turned over. A new
//! file is its owner's only.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::daemon::log::time_now;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::OpenError;
use super::record::{Pen, Record};
use crate::port_spec::FileSpec;

/// Who writes a log.
#[derive(Debug)]
pub(crate) struct Log {
    spec: FileSpec,
    file: File,
    /// How long it is; of what is no regular file 0, for ever.
    size: u64,
    is_regular: bool,
    is_at_line_start: bool,
    /// What goes before a line that is about to begin, as far as it has not been written.
    stamp: Vec<u8>,
}

/// Opens a log.
pub(crate) fn open(spec: &FileSpec) -> Result<Record<Log>, OpenError> {
    let log = Log::begin(spec).map_err(|source| OpenError::File {
        endpoint: "file",
        path: spec.path.clone(),
        source,
    })?;
    Ok(Record::new("file", &spec.path, log))
}

/// Opens a file to append to. Nobody waits for a reader of a pipe that there is not.
pub(super) fn append_to(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    options.custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed());
    let file = options.open(path)?;
    // Who writes may wait.
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

impl Log {
    /// Goes on with a log that is there. The line that it ends in the middle of was another daemon's: a time begins a line.
    fn begin(spec: &FileSpec) -> io::Result<Self> {
        let mut log = Self::open(spec)?;
        if spec.timestamps && log.size > 0 && !ends_a_line(&spec.path, log.size) {
            log.stamp.push(b'\n');
        }
        Ok(log)
    }

    fn open(spec: &FileSpec) -> io::Result<Self> {
        let file = append_to(&spec.path)?;
        let metadata = file.metadata()?;
        let is_regular = metadata.is_file();
        let size = if is_regular { metadata.len() } else { 0 };
        let stamp = Vec::new();
        Ok(Self { spec: spec.clone(), file, size, is_regular, is_at_line_start: true, stamp })
    }

    /// How much more goes into this file.
    fn room_bytes(&self) -> usize {
        let max_size = self.spec.max_size.filter(|_| self.is_regular);
        let room = max_size.map_or(u64::MAX, |max_size| max_size.saturating_sub(self.size));
        usize::try_from(room).unwrap_or(usize::MAX)
    }

    /// Writes the first of `bytes`, as many as go into one file; how many.
    fn write_first(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.spec.timestamps && self.is_at_line_start {
            self.stamp.extend(format!("{} ", time_now()).as_bytes());
            // It has its time, whatever comes of writing it.
            self.is_at_line_start = false;
        }
        let line_end =
            |bytes: &[u8]| bytes.iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        let wanted = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(at) if self.spec.timestamps => &bytes[..=at],
            _ => bytes,
        };
        let (mut room, stamp_bytes) = (self.room_bytes(), self.stamp.len());
        let fits = stamp_bytes + wanted.len() <= room;
        let ends_a_line = line_end(&wanted[..wanted.len().min(room)]).is_some();
        // The rest goes into the next file, from a line's start on, if there is one and this file is not all there is of it.
        let is_full = room <= stamp_bytes || !self.spec.timestamps && !ends_a_line;
        let is_due = self.begins_a_line() || room <= stamp_bytes;
        if !fits && self.size > 0 && is_due && (is_full || self.spec.timestamps) {
            turn_over(&self.spec.path, self.spec.keep)?;
            self.reopen()?;
            room = self.room_bytes();
        }
        while !self.stamp.is_empty() {
            let count = append(&self.file, &self.stamp)?;
            self.stamp.drain(..count);
            self.grow(count);
        }
        let room = room.saturating_sub(stamp_bytes).max(1);
        let piece = match wanted.get(..room) {
            None => wanted,
            Some(first) => &first[..line_end(first).unwrap_or(room)],
        };
        let count = append(&self.file, piece)?;
        self.grow(count);
        self.is_at_line_start = piece[..count].ends_with(b"\n");
        Ok(count)
    }

    /// No byte of the line that comes next has been written.
    fn begins_a_line(&self) -> bool {
        self.is_at_line_start || !self.stamp.is_empty()
    }

    fn grow(&mut self, count: usize) {
        self.size += if self.is_regular { count as u64 } else { 0 };
    }
}

/// Writes some of `bytes`, at least one of them; how many.
fn append(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            written => return written,
        }
    }
}

/// Whether the last byte of a file of this size ends a line; of one that may not be read it is taken for granted.
fn ends_a_line(path: &Path, size: u64) -> bool {
    let mut last = [b'\n'];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut last, size - 1));
    read.is_err() || last == [b'\n']
}

impl Pen for Log {
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut done = 0;
        while done < bytes.len() {
            match self.write_first(&bytes[done..]) {
                Ok(count) => done += count,
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    }

    fn miss(&mut self, bytes: u64) -> io::Result<()> {
        let start = if self.begins_a_line() { "" } else { "\n" };
        let note = format!("{start}[{bytes} bytes lost]\n");
        let (_, written) = self.write(note.as_bytes());
        written
    }

    fn reopen(&mut self) -> io::Result<()> {
        // A line goes on where it was.
        let Self { file, size, is_regular, .. } = Self::open(&self.spec)?;
        (self.file, self.size, self.is_regular) = (file, size, is_regular);
        Ok(())
    }
}

/// What is at `path` becomes the newest of the old ones, of which so many are kept.
pub(super) fn turn_over(path: &Path, keep: u32) -> io::Result<()> {
    // The others keep their names if it has been moved away already, perhaps by a turning-over after which no new file could
    // be made: each attempt would push the oldest out.
    if let Err(error) = fs::symlink_metadata(path) {
        return if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) };
    }
    for number in (1..keep).rev() {
        rename_if_there(&numbered(path, number), &numbered(path, number + 1))?;
    }
    if keep > 0 { rename_if_there(path, &numbered(path, 1)) } else { fs::remove_file(path) }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".{number}"));
    name.into()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::{Log, numbered, turn_over};
    use crate::endpoint::record::Pen;
    use crate::port_spec::FileSpec;

    fn spec(path: &Path, max_size: Option<u64>, keep: u32) -> FileSpec {
        FileSpec { path: path.to_owned(), max_size, keep, timestamps: false }
    }

    fn write(log: &mut Log, bytes: &[u8]) {
        let (count, outcome) = log.write(bytes);
        outcome.expect("the file can be written to");
        assert_eq!(count, bytes.len());
    }

    /// All files, from the oldest on.
    fn all(path: &Path) -> Vec<u8> {
        let old = (1..100).rev().map(|number| numbered(path, number));
        let files = old.chain([path.to_owned()]);
        files.filter_map(|path| fs::read(path).ok()).flatten().collect()
    }

    #[test]
    fn log_is_appended_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "before\n").unwrap();
        let mut log = Log::open(&spec(&path, None, 5)).unwrap();
        write(&mut log, b"after\r\n");
        assert_eq!(fs::read(&path).unwrap(), b"before\nafter\r\n");
    }

    #[test]
    fn logs_are_turned_over_between_lines_and_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&spec(&path, Some(1000), 99)).unwrap();
        let mut said = Vec::new();
        for number in 0..500 {
            let line = format!("{number:03} {}\n", "x".repeat(number % 70));
            said.extend(line.as_bytes());
            // By the line, and in pieces that do not end where lines do.
            if number % 3 == 0 {
                let (first, rest) = line.as_bytes().split_at(line.len() / 2);
                write(&mut log, first);
                write(&mut log, rest);
            } else {
                write(&mut log, line.as_bytes());
            }
        }
        write(&mut log, &said.clone());
        said.extend(said.clone());
        assert_eq!(all(&path), said);
        let first = fs::read(numbered(&path, 1)).unwrap();
        assert!(first.len() <= 1000 + 70 && first.len() > 800, "{}", first.len());
        assert_eq!(first.last(), Some(&b'\n'));
    }

    #[test]
    fn line_that_is_longer_than_a_file_is_parted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&spec(&path, Some(1000), 99)).unwrap();
        let said = vec![b'y'; 5500];
        write(&mut log, b"first\n");
        write(&mut log, &said);
        assert_eq!(all(&path), [&b"first\n"[..], &said].concat());
        assert_eq!(fs::read(numbered(&path, 1)).unwrap().len(), 1000);
    }

    #[test]
    fn no_more_are_kept_than_were_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&spec(&path, Some(100), 2)).unwrap();
        for _ in 0..100 {
            write(&mut log, b"a line of which there are many\n");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
        let mut log = Log::open(&spec(&path, Some(100), 0)).unwrap();
        for _ in 0..100 {
            write(&mut log, b"a line of which there are many\n");
        }
        assert!(fs::metadata(&path).unwrap().len() <= 100);
    }

    #[test]
    fn each_line_begins_with_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let spec = FileSpec { timestamps: true, ..spec(&path, Some(4096), 50) };
        let mut log = Log::open(&spec).unwrap();
        write(&mut log, b"one\r\ntw");
        write(&mut log, b"o\r\n\r\n");
        for number in 0..200 {
            write(&mut log, format!("line {number}\n").as_bytes());
        }
        let text = String::from_utf8(all(&path)).unwrap();
        let lines: Vec<_> = text.split_inclusive('\n').collect();
        assert_eq!(lines.len(), 203);
        for line in &lines {
            let (stamp, _) = line.split_once(' ').unwrap();
            assert!(stamp.len() == 27 && stamp.ends_with('Z'), "{line:?}");
        }
        assert!(lines[0].ends_with(" one\r\n") && lines[1].ends_with(" two\r\n"));
        assert!(lines[202].ends_with(" line 199\n"));
    }

    #[test]
    fn time_begins_a_line_even_where_the_log_of_before_does_not_end_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let spec = FileSpec { timestamps: true, ..spec(&path, None, 5) };
        for said in [&b"login: "[..], b"root", b"ed\n", b"one\n"] {
            let mut log = Log::begin(&spec).unwrap();
            write(&mut log, said);
        }
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| line.split_once("Z ").unwrap().1);
        assert_eq!(lines.collect::<Vec<_>>(), ["login: ", "root", "ed", "one"]);
    }

    #[test]
    fn what_is_missing_has_a_line_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Log::open(&spec(&path, None, 5)).unwrap();
        write(&mut log, b"one\ntw");
        log.miss(7).unwrap();
        log.miss(8).unwrap();
        write(&mut log, b"three\n");
        let text = "one\ntw\n[7 bytes lost]\n[8 bytes lost]\nthree\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn logs_of_before_keep_their_names_where_there_is_nothing_to_turn_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "newest").unwrap();
        fs::write(numbered(&path, 1), "older").unwrap();
        (0..9).for_each(|_| turn_over(&path, 2).unwrap());
        assert_eq!(fs::read(numbered(&path, 1)).unwrap(), b"newest");
        assert_eq!(fs::read(numbered(&path, 2)).unwrap(), b"older");
    }

    #[test]
    fn log_that_was_renamed_is_opened_anew_in_the_middle_of_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("old"));
        let mut log = Log::open(&spec(&path, None, 5)).unwrap();
        write(&mut log, b"one\ntw");
        fs::rename(&path, &old).unwrap();
        log.reopen().unwrap();
        write(&mut log, b"o\n");
        assert_eq!(
            (fs::read(&old).unwrap(), fs::read(&path).unwrap()),
            (b"one\ntw".to_vec(), b"o\n".to_vec())
        );
    }

    #[test]
    fn full_disk_is_an_error_and_no_end() {
        let mut log = Log::open(&spec(Path::new("/dev/full"), Some(4096), 5)).unwrap();
        let (count, outcome) = log.write(b"text\n");
        assert_eq!(count, 0);
        assert!(outcome.is_err());
        assert!(Path::new("/dev/full").exists());
    }
}
