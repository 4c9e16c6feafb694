//! Real guests on real daemons, end to end: what a user of the project relies on.

mod attach;
mod console;
mod control;
mod dialogue;
mod growth;
mod limits;
mod network;
mod package;
mod qemu;
mod statistics;
mod succession;
mod sudden_death;
mod systemd;
mod terminal;
mod uml;
mod vmm;
