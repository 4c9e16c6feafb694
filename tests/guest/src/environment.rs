//! What a kernel leaves to its first process: mounting its own file systems, loading drivers, ending the machine.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::checks::Failure;

const NO_PARAMETERS: &CStr = c"";
/// `linux/module.h`: MODULE_INIT_COMPRESSED_FILE.
const COMPRESSED: i32 = 4;

/// Mounts `/proc`, `/sys` and `/dev`.
pub(crate) fn mount_kernel_file_systems() -> Result<(), Failure> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        match mount(kind, at, kind, MountFlags::empty(), None::<&CStr>) {
            // Some kernels are built to mount /dev themselves.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {at}: {error}").into()),
        }
    }
    Ok(())
}

/// Loads every module in `/modules`, in the order of their names, which is the order of their dependencies.
pub(crate) fn load_modules() -> Result<(), Failure> {
    let mut modules: Vec<_> = match fs::read_dir("/modules") {
        Ok(entries) => {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(format!("cannot list /modules: {error}").into()),
    };
    modules.sort();
    for path in modules {
        let module = File::open(&path)?;
        let is_compressed = path.extension().is_some_and(|extension| extension == "xz");
        finit_module(&module, NO_PARAMETERS, if is_compressed { COMPRESSED } else { 0 })
            .map_err(|error| format!("cannot load {}: {error}", path.display()))?;
    }
    Ok(())
}

/// Ends the machine. Where the kernel refuses, the process waits for the host's deadline: PID 1 must not return.
pub(crate) fn power_off() -> ! {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        println!("cannot power off: {error}");
    }
    loop {
        std::thread::park();
    }
}
