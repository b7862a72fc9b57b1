//! Tests of the whole tool, in one binary. Nothing here reaches private items.

mod bad_files;
mod calibrate;
mod cli;
mod decode;
mod ernie;
mod fastdeploy;
mod faults;
mod flow;
mod forward;
mod hostile;
mod house;
mod laws;
mod model;
#[path = "fuzz/oracle.rs"]
mod oracle;
mod paddle;
mod target;
mod tokenizer;
