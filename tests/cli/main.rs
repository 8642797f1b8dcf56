//! The program as its users meet it: by its arguments, its outputs, and what it leaves on disk.

mod bad_input;
mod clients;
mod convert;
mod export;
mod generation;
mod hf_hub_defects;
mod hostile;
mod hub;
mod inspect;
mod memory;
mod methods;
mod parallel;
mod parts;
mod publishing;
mod python;
mod ranks;
mod resume;
mod round_trip;
mod shardline;
mod siege;
mod streaming;
mod training;
mod untie;
mod verify;
mod world;
mod xet;
