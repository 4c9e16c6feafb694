//! `--print-capabilities`: what management software (libvirt for one) asks a back end before it
//! starts it for real.
//!
//! The form is fixed by vhost-user, "Backend program conventions", and QEMU's `vhost-user.json`: an
//! object with the device `type` and, for some types, the list of optional command line `features`.
//! What a device supports is for the device to say; this module only knows how to say it.

use std::ffi::OsStr;
use std::io::{self, Write};

use serde::Serialize;

/// The option's name on the command line.
const OPTION: &str = "--print-capabilities";

#[derive(Serialize)]
struct Capabilities<'a> {
    r#type: &'a str,
    features: &'a [&'a str],
}

/// Whether the command line asks for the capabilities. To be asked before parsing.
// vhost-user, "Backend program conventions": with --print-capabilities, other options and arguments
// should be ignored. A parser would still complain of a missing or unknown one.
pub fn requested(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> bool {
    arguments
        .into_iter()
        .take_while(|argument| argument.as_ref() != "--")
        .any(|argument| argument.as_ref() == OPTION)
}

/// Writes the capabilities of a back end for devices of `device_type` (a `VHostUserBackendType` of
/// QEMU's `vhost-user.json`) with the given optional `features`, as one JSON line on standard
/// output.
///
/// # Errors
/// Standard output cannot be written to.
pub fn print(device_type: &str, features: &[&str]) -> io::Result<()> {
    write(&mut io::stdout().lock(), device_type, features)
}

fn write(out: &mut impl Write, device_type: &str, features: &[&str]) -> io::Result<()> {
    serde_json::to_writer(&mut *out, &Capabilities { r#type: device_type, features })?;
    out.write_all(b"\n")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::{requested, write};

    #[test]
    fn capabilities_are_one_json_object_with_type_and_features() {
        let mut out = Vec::new();
        write(&mut out, "block", &["blk-file", "read-only"]).unwrap();
        assert_eq!(out, b"{\"type\":\"block\",\"features\":[\"blk-file\",\"read-only\"]}\n");
    }

    #[test]
    fn request_is_found_among_other_and_wrong_options() {
        assert!(requested(["vhost-blk", "--no-such-option", "--print-capabilities"]));
        assert!(!requested(["vhost-blk", "--blk-file", "x"]));
        assert!(!requested(["vhost-blk", "--", "--print-capabilities"]));
    }
}
