//! The devices as a whole, from the guest's registers to the daemon: a driver that does what Linux does, with KVM's
//! stand-in between.

mod driver;
mod lying;
mod real;
mod registers;
mod scripted;
