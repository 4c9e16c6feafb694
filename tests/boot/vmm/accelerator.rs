//! What runs the outer machine: the host's own virtualisation where a guest may have it in turn, else QEMU's software
//! processor, which has AMD's.
//!
//! Contract: the tests are the same on either. `REQUIRE_KVM=1` says that the host's must be there.

use std::fs::{self, OpenOptions};
use std::path::Path;

/// What a machine needs to have KVM inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Accelerator {
    /// QEMU's options.
    pub(super) arguments: [&'static str; 4],
    /// The module of the machine's kernel.
    pub(super) module: &'static str,
}

const SOFTWARE: Accelerator =
    Accelerator { arguments: ["-accel", "tcg", "-cpu", "max"], module: "kvm-amd" };

/// What there is on this host.
pub(super) fn accelerator() -> Accelerator {
    match on_hardware() {
        Ok(accelerator) => accelerator,
        Err(why) => {
            let is_required = std::env::var_os("REQUIRE_KVM").is_some_and(|value| value == "1");
            assert!(!is_required, "REQUIRE_KVM=1, but this host runs no nested machines: {why}");
            SOFTWARE
        }
    }
}

fn on_hardware() -> Result<Accelerator, String> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.map_err(|error| format!("/dev/kvm: {error}"))?;
    let module = nesting_module(Path::new("/sys/module"))
        .ok_or("no module of KVM has the parameter \"nested\" set")?;
    Ok(Accelerator { arguments: ["-accel", "kvm", "-cpu", "host"], module })
}

/// The host's module of KVM, if its guests may have guests: their processor is of the same kind.
fn nesting_module(modules: &Path) -> Option<&'static str> {
    [("kvm-amd", "kvm_amd"), ("kvm-intel", "kvm_intel")].into_iter().find_map(|(name, folder)| {
        let nested = fs::read_to_string(modules.join(folder).join("parameters/nested")).ok()?;
        matches!(nested.trim(), "1" | "Y").then_some(name)
    })
}

#[test]
fn the_host_s_kvm_is_taken_only_if_its_guests_may_have_guests() {
    let directory = tests::temp_dir();
    assert_eq!(nesting_module(directory.path()), None);
    let parameters = directory.path().join("kvm_intel/parameters");
    fs::create_dir_all(&parameters).expect("a directory");
    for (value, module) in [("N\n", None), ("Y\n", Some("kvm-intel")), ("1\n", Some("kvm-intel"))] {
        fs::write(parameters.join("nested"), value).expect("a file");
        assert_eq!(nesting_module(directory.path()), module, "{value:?}");
    }
}
