//! Real guests on real daemons, end to end: what a user of the project relies on.

mod growth;
mod qemu;
mod sudden_death;
mod systemd;
mod terminal;
mod uml;
