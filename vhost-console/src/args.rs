//! The command line of vhost-console.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked before anything is opened. The options
//! that every daemon has are `common`'s; here are those of a console. This one definition yields help and checks.
//! `--print-capabilities`, with which all others are ignored, right or wrong, is asked for before parsing
//! (`common::daemon::capabilities`), and `attach` has a [command line of its own](crate::attach).
//!
//! What it deliberately does not do: open anything, or find places for ports ([`crate::hub`]).

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use common::daemon::DaemonOptions;
use common::daemon::log::with_sources;
use common::daemon::options::{parse_queue_size, parse_size};

use crate::config::{PORTS_MAX, Size};
use crate::control::Order;
use crate::device::Shape;
use crate::port_spec::PortSpec;

/// The longest scrollback. Each port has as much and as much again.
const REPLAY_BYTES_MAX: u64 = 64 << 20;

/// The options of a daemon that serves a console.
#[derive(Debug)]
pub(crate) struct Options {
    /// Sockets, threads and log.
    pub(crate) daemon: DaemonOptions,
    pub(crate) shape: Shape,
    /// What is plugged in at first.
    pub(crate) ports: Vec<PortSpec>,
}

/// Parses a command line, the program's name first. The error prints itself and knows the exit
/// status (`clap::Error::exit`).
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let line = CommandLine::try_parse_from(arguments)?;
    let count = line.port.len();
    let is_plain = match &line.port[..] {
        [only] => only.is_console && only.name.is_none() && line.max_ports.unwrap_or(1) == 1,
        _ => false,
    };
    let ports_max = line.max_ports.unwrap_or(u16::try_from(count).unwrap_or(u16::MAX));
    if count > usize::from(ports_max) || ports_max > PORTS_MAX {
        let message = format!(
            "{count} ports (--port), and places for {} (--max-ports)",
            ports_max.min(PORTS_MAX)
        );
        return Err(CommandLine::command().error(ErrorKind::ArgumentConflict, message));
    }
    let shape = Shape {
        has_several_ports: !is_plain,
        ports_max,
        replay_bytes: line.replay,
        size: line.size,
        order: line.resize_order,
        queue_size_max: line.queue_size,
    };
    Ok(Options { daemon: line.daemon, shape, ports: line.port })
}

/// Serve a console to a virtual machine, as a process of its own
///
/// vhost-console is the back end of a virtio console device: it listens on a vhost-user socket, to
/// which a VMM (QEMU, crosvm, User-Mode Linux) connects, and leads the device's ports to sockets,
/// logs, terminals and recordings. The guest uses its ordinary virtio driver. When the VMM goes away,
/// the daemon waits for the next one.
///
/// `vhost-console attach PATH` is the other end: a terminal at a console (see its --help).
#[derive(Debug, Parser)]
#[command(name = "vhost-console", version, after_long_help = EXAMPLES, max_term_width = 100)]
struct CommandLine {
    /// A port: `console` or not, name=NAME, id=N, and endpoint=KIND[:WHAT], once or several times
    ///
    /// A console has any number of viewers, for whom the guest never waits; a port that is none is a
    /// raw stream, of which nothing is lost. Words are parted by commas; a comma in a path is
    /// doubled. Endpoints: unix:PATH[,mode=0660][,group=NAME] is a socket; file:PATH
    /// [,max-size=SIZE][,keep=N][,timestamps] a log; cast:FILE a recording (asciicast v2);
    /// pty[:LINK] a pseudo terminal; stdio and fd:N what the daemon was started with; null leads
    /// nowhere. A single console without a name is a plain device of two queues; all else is one
    /// of several ports.
    #[arg(
        long,
        value_name = "SPEC",
        required = true,
        value_parser = parse_port,
        help_heading = "Console options"
    )]
    port: Vec<PortSpec>,

    /// Places for ports, 1 to 31 [default: as many as there are --port]
    ///
    /// Ports can be added and removed while the guest runs (--control, command port-add). How many
    /// there may be has to be known before. QEMU's generic device needs num_vqs= twice as many, and
    /// two more.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(PORTS_MAX)),
        help_heading = "Console options"
    )]
    max_ports: Option<u16>,

    /// How much of the past a viewer is shown who comes late: bytes, or with k or M, up to 64M
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64k",
        value_parser = parse_replay,
        help_heading = "Console options"
    )]
    replay: u64,

    /// Size of consoles until somebody says otherwise
    #[arg(
        long,
        value_name = "COLUMNSxROWS",
        default_value = "80x24",
        help_heading = "Console options"
    )]
    size: Size,

    /// Order of the two numbers in a message of a new size: rows-first or columns-first
    ///
    /// The specification has columns first, and current kernels read them so; older ones, such as
    /// Debian's 5.10, read rows first. Only a device of several ports sends such messages.
    #[arg(
        long,
        value_name = "ORDER",
        default_value = "columns-first",
        help_heading = "Console options"
    )]
    resize_order: Order,

    /// Largest queue size that is accepted: a power of two from 2 to 32768
    #[arg(
        long,
        value_name = "N",
        default_value_t = 256,
        value_parser = parse_queue_size,
        help_heading = "Console options"
    )]
    queue_size: u16,

    #[command(flatten)]
    daemon: DaemonOptions,
}

fn parse_port(text: &str) -> Result<PortSpec, String> {
    text.parse::<PortSpec>().map_err(|error| with_sources(&error).to_string())
}

fn parse_replay(text: &str) -> Result<u64, String> {
    let size = parse_size(text).filter(|size| *size <= REPLAY_BYTES_MAX);
    size.ok_or_else(|| "expected bytes, or a number with k or M, up to 64M".to_owned())
}

/// No line has more than 80 columns, the width of many terminals: clap would wrap it, and a command
/// that is wrapped within an option does not work when it is pasted.
const EXAMPLES: &str = "\
Examples:
  A console that people attach to, with a log, for User-Mode Linux:
    vhost-console --socket-path /run/vm1/hvc.sock \\
      --control /run/vm1/control.sock \\
      --port console,endpoint=unix:/run/vm1/console.sock,endpoint=file:/tmp/vm1
    linux.uml ... virtio_uml.device=/run/vm1/hvc.sock:3 console=hvc0
    vhost-console attach /run/vm1/console.sock

  A console and an agent's channel, and room for two more ports:
    vhost-console --socket-path /run/vm1/hvc.sock --max-ports 4 \\
      --control /run/vm1/control.sock \\
      --port name=con0,console,endpoint=unix:/run/vm1/console.sock \\
      --port name=org.qemu.guest_agent.0,endpoint=unix:/run/vm1/agent.sock
    qemu-system-x86_64 -m 2G \\
      -object memory-backend-memfd,id=mem,size=2G,share=on \\
      -machine q35,memory-backend=mem \\
      -chardev socket,id=hvc,path=/run/vm1/hvc.sock \\
      -device vhost-user-test-device-pci,chardev=hvc,virtio-id=3,\\
    num_vqs=10,config_size=12
    echo '{\"command\":\"port-add\",\"port\":\"name=x,endpoint=unix:/run/vm1/x\"}' | \\
      socat - UNIX-CONNECT:/run/vm1/control.sock

  A log that is turned over, with times, and a recording:
    vhost-console --socket-path /run/vm1/hvc.sock \\
      --port console,endpoint=file:/tmp/vm1,max-size=10M,keep=5,timestamps,\\
    endpoint=cast:/tmp/vm1.cast

  This terminal is the console:
    vhost-console --socket-path /tmp/hvc.sock --port console,endpoint=stdio

Exit status:
  0  ended by SIGTERM or SIGINT, or because the only connection (--fd) ended,
     or printed what was asked for
  1  something could not be opened (an endpoint, a socket), or the I/O engine
     failed
  2  the command line is wrong";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Result<Options, clap::Error> {
        let line = format!("vhost-console --socket-path s {words}");
        parse(line.split_whitespace().map(OsString::from))
    }

    fn refused(words: &str) -> String {
        let error = parse_words(words).expect_err(words);
        assert_eq!(error.exit_code(), 2, "{words}");
        error.to_string()
    }

    #[test]
    fn definition_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn examples_can_be_pasted_from_a_terminal_of_80_columns() {
        for line in EXAMPLES.lines() {
            assert!(line.len() <= 80, "clap would wrap {line:?}");
        }
    }

    #[test]
    fn examples_are_right() {
        // A word that is too long for a line goes on at the beginning of the next.
        let joined = EXAMPLES.replace(",\\\n    ", ",").replace("\\\n", " ");
        let ours =
            joined.lines().map(str::trim).filter(|line| line.starts_with("vhost-console --"));
        let parsed = ours.map(|line| parse(line.split_whitespace().map(OsString::from)));
        assert_eq!(parsed.map(Result::unwrap).count(), 4);
    }

    #[test]
    fn defaults_are_those_that_the_help_gives() {
        let options = parse_words("--port console,endpoint=null").unwrap();
        let Shape { ports_max, replay_bytes, size, order, queue_size_max, .. } = options.shape;
        assert_eq!((ports_max, replay_bytes, queue_size_max), (1, 64 << 10, 256));
        assert_eq!((size, order), (Size { columns: 80, rows: 24 }, Order::ColumnsFirst));
    }

    #[test]
    fn single_nameless_console_is_a_plain_device() {
        let is_plain = |words: &str| !parse_words(words).unwrap().shape.has_several_ports;
        assert!(is_plain("--port console,endpoint=null"));
        assert!(is_plain("--port console,endpoint=null --max-ports 1"));
        assert!(!is_plain("--port console,endpoint=null --max-ports 2"));
        assert!(!is_plain("--port console,name=a,endpoint=null"));
        assert!(!is_plain("--port endpoint=null"));
        assert!(!is_plain("--port console,endpoint=null --port console,endpoint=null"));
    }

    #[test]
    fn ports_have_places() {
        let shape = |words: &str| parse_words(words).unwrap().shape;
        assert_eq!(shape("--port endpoint=null --port endpoint=null").ports_max, 2);
        assert_eq!(shape("--port endpoint=null --max-ports 31").ports_max, 31);
        let said = refused("--port endpoint=null --port endpoint=null --max-ports 1");
        assert!(said.contains("--max-ports"), "{said}");
        let many = "--port endpoint=null ".repeat(32);
        assert!(refused(&many).contains("places for 31"));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (words, said) in [
            ("", "--port"),
            ("--port console", "no endpoint"),
            ("--port endpoint=null --max-ports 0", "--max-ports"),
            ("--port endpoint=null --max-ports 32", "--max-ports"),
            ("--port endpoint=null --replay 65M", "--replay"),
            ("--port endpoint=null --size 80", "--size"),
            ("--port endpoint=null --resize-order both", "--resize-order"),
            ("--port endpoint=null --queue-size 3", "--queue-size"),
        ] {
            let error = refused(words);
            assert!(error.contains(said), "{words}: {error}");
        }
    }
}
