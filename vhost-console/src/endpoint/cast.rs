//! `endpoint=cast:FILE`: a recording with its times, in asciicast v2.
//!
//! Contract: a line of JSON that says how large the terminal is, then a line for each piece of output, with the seconds since the
//! beginning. What is no UTF-8 is replaced, since JSON has nothing else; a character that comes in two pieces is
//! whole. Each time the daemon starts, or is told to open anew a file that was moved away, a recording begins: one that is
//! there becomes `FILE.1`, like a log, for two in one file would be none.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::OpenError;
use super::file::append_to;
use super::record::{Pen, Record};
use crate::config::Size;

/// Recordings that are kept when another begins.
const KEEP: u32 = 5;
/// The longest beginning of a character that may be followed by the rest.
const PARTIAL_BYTES_MAX: usize = 3;

/// Who writes a recording.
#[derive(Debug)]
pub(crate) struct Cast {
    path: PathBuf,
    file: fs::File,
    began: Instant,
    size: Option<Size>,
    /// The beginning of a character.
    partial: Vec<u8>,
    /// What a failed write has left of a line.
    rest: Vec<u8>,
}

/// Begins a recording.
pub(crate) fn open(path: &Path) -> Result<Record<Cast>, OpenError> {
    let cast = Cast::begin(path);
    let cast =
        cast.map_err(|source| OpenError::File { endpoint: "cast", path: path.to_owned(), source })?;
    Ok(Record::new("cast", path, cast))
}

impl Cast {
    fn begin(path: &Path) -> io::Result<Self> {
        if fs::metadata(path).is_ok_and(|old| old.is_file() && old.len() > 0) {
            super::file::turn_over(path, KEEP)?;
        }
        let file = append_to(path)?;
        let (partial, rest) = (Vec::new(), Vec::new());
        Ok(Self { path: path.to_owned(), file, began: Instant::now(), size: None, partial, rest })
    }

    /// Writes a line, and what is left of the one before.
    fn line(&mut self, line: &str) -> io::Result<()> {
        self.rest.extend(line.as_bytes());
        self.rest.push(b'\n');
        self.flush()
    }

    /// The first line.
    fn head(&mut self, size: Size) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let Size { columns, rows } = size;
        let head = json!({ "version": 2, "width": columns, "height": rows, "timestamp": now });
        self.line(&head.to_string())
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.rest.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the file has still its name.
    fn is_there(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (named, open) = (fs::metadata(&self.path), self.file.metadata());
        named.is_ok_and(|named| open.is_ok_and(|open| identity(named) == identity(open)))
    }

    fn event(&mut self, code: &str, data: &str) -> io::Result<()> {
        let seconds = self.began.elapsed().as_micros() as f64 / 1e6;
        self.line(&json!([seconds, code, data]).to_string())
    }
}

impl Pen for Cast {
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        // What is left of a line goes first: then nothing is held of bytes that were not taken.
        if let Err(error) = self.flush() {
            return (0, Err(error));
        }
        self.partial.extend(bytes);
        let whole = whole_characters(&self.partial);
        let text = String::from_utf8_lossy(&self.partial[..whole]).into_owned();
        self.partial.drain(..whole);
        let written = if text.is_empty() { Ok(()) } else { self.event("o", &text) };
        // In `rest`, if not in the file.
        (bytes.len(), written)
    }

    fn miss(&mut self, bytes: u64) -> io::Result<()> {
        self.flush()?;
        let begun = String::from_utf8_lossy(&std::mem::take(&mut self.partial)).into_owned();
        // In `rest`, if not in the file: it is not to be there twice.
        let _ = self.event("o", &format!("{begun}\r\n[{bytes} bytes lost]\r\n"));
        Ok(())
    }

    fn resize(&mut self, size: Size) -> io::Result<()> {
        self.flush()?;
        // Likewise.
        let _ = match self.size.replace(size) {
            Some(_) => self.event("r", &size.to_string()),
            None => self.head(size),
        };
        Ok(())
    }

    fn reopen(&mut self) -> io::Result<()> {
        if self.is_there() {
            return Ok(());
        }
        // What does not go into the old file any more is the end of it that is missing there.
        let _ = self.flush();
        let partial = self.partial.clone();
        let size = self.size;
        *self = Self { partial, ..Self::begin(&self.path)? };
        size.map_or(Ok(()), |size| self.resize(size))
    }
}

/// Bytes that end with a character's end: all, or those before a character that has only begun.
fn whole_characters(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(PARTIAL_BYTES_MAX);
    let begun = (tail..bytes.len()).rev().find(|at| bytes[*at] & 0b1100_0000 != 0b1000_0000);
    match begun {
        Some(at) if character_bytes(bytes[at]) > bytes.len() - at => at,
        _ => bytes.len(),
    }
}

/// Length of the character that this byte begins.
fn character_bytes(first: u8) -> usize {
    match first {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::Value;

    use super::Cast;
    use crate::config::Size;
    use crate::endpoint::record::Pen;

    const SIZE: Size = Size { columns: 80, rows: 24 };

    fn write(cast: &mut Cast, bytes: &[u8]) {
        let (count, outcome) = cast.write(bytes);
        outcome.expect("the file can be written to");
        assert_eq!(count, bytes.len());
    }

    fn lines(path: &std::path::Path) -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn recording_is_an_asciicast() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cast");
        let mut cast = Cast::begin(&path).unwrap();
        cast.resize(SIZE).unwrap();
        write(&mut cast, b"\x1b[1mhello\r\n");
        cast.resize(Size { columns: 100, rows: 50 }).unwrap();
        write(&mut cast, "gr\u{fc}\u{20ac}".as_bytes());
        let lines = lines(&path);
        assert_eq!(lines[0]["version"], 2);
        assert_eq!((&lines[0]["width"], &lines[0]["height"]), (&80.into(), &24.into()));
        assert_eq!((&lines[1][1], &lines[1][2]), (&"o".into(), &"\x1b[1mhello\r\n".into()));
        assert_eq!((&lines[2][1], &lines[2][2]), (&"r".into(), &"100x50".into()));
        assert_eq!(lines[3][2], "gr\u{fc}\u{20ac}");
        assert!(lines[3][0].as_f64() >= lines[1][0].as_f64());
    }

    #[test]
    fn character_in_pieces_is_whole_and_nonsense_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cast");
        let mut cast = Cast::begin(&path).unwrap();
        cast.resize(SIZE).unwrap();
        let text = "a\u{20ac}b\u{1f600}c".as_bytes();
        text.iter().for_each(|byte| write(&mut cast, &[*byte]));
        write(&mut cast, b"\xff\xfe!");
        write(&mut cast, b"\xe2");
        write(&mut cast, b"x");
        let said: String =
            lines(&path)[1..].iter().map(|line| line[2].as_str().unwrap().to_owned()).collect();
        assert_eq!(said, "a\u{20ac}b\u{1f600}c\u{fffd}\u{fffd}!\u{fffd}x");
    }

    #[test]
    fn recording_that_is_there_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cast");
        for _ in 0..3 {
            let mut cast = Cast::begin(&path).unwrap();
            cast.resize(SIZE).unwrap();
            write(&mut cast, b"x");
        }
        for old in ["cast", "cast.1", "cast.2"] {
            assert_eq!(lines(&directory.path().join(old)).len(), 2, "{old}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn recording_begins_anew_where_it_was_moved_away_and_only_there() {
        let directory = tempfile::tempdir().unwrap();
        let (path, moved) = (directory.path().join("cast"), directory.path().join("moved"));
        let mut cast = Cast::begin(&path).unwrap();
        cast.resize(SIZE).unwrap();
        write(&mut cast, b"one\xe2\x82");
        // As often as it is told to: no recording is pushed out.
        (0..9).for_each(|_| cast.reopen().unwrap());
        fs::rename(&path, &moved).unwrap();
        cast.reopen().unwrap();
        write(&mut cast, b"\xactwo");
        assert_eq!((&lines(&moved)[1][2], lines(&moved).len()), (&"one".into(), 2));
        assert_eq!(
            (&lines(&path)[0]["width"], &lines(&path)[1][2]),
            (&80.into(), &"\u{20ac}two".into())
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn full_disk_has_each_line_once_as_soon_as_there_is_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cast");
        let mut cast = Cast::begin(&path).unwrap();
        let file =
            std::mem::replace(&mut cast.file, super::append_to("/dev/full".as_ref()).unwrap());
        cast.resize(SIZE).unwrap();
        assert!(cast.miss(7).is_err());
        let (count, outcome) = cast.write(b"text");
        assert!(count == 0 && outcome.is_err(), "{count} bytes, {outcome:?}");
        cast.file = file;
        cast.miss(7).unwrap();
        write(&mut cast, b"text");
        let said: Vec<_> = lines(&path)[1..].iter().map(|line| line[2].clone()).collect();
        assert_eq!(said, ["\r\n[7 bytes lost]\r\n", "text"]);
    }
}
