//! The program as its users meet it: by its arguments, its outputs, and what it leaves on disk.

mod bad_input;
mod convert;
mod export;
mod hostile;
mod hub;
mod inspect;
#[cfg(target_os = "linux")]
mod memory;
mod methods;
mod parts;
mod python;
mod ranks;
mod resume;
mod round_trip;
mod training;
mod untie;
mod verify;
mod world;
