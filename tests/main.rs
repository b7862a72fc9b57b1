//! Tests of the whole tool, in one binary. Nothing here reaches private items.

mod bad_files;
mod calibrate;
mod cli;
mod decode;
mod device;
mod encoders;
mod endpoint;
mod ernie;
mod exports;
mod fastdeploy;
mod faults;
mod flow;
mod forecast;
mod forward;
mod gpu;
mod head;
mod hostile;
mod house;
mod imports;
mod laws;
mod model;
#[path = "fuzz/oracle.rs"]
mod oracle;
mod paddle;
mod scoring;
mod scripted;
mod sentencepiece;
mod statistics;
mod target;
mod tasks;
mod tokenizer;
mod transform;
mod validate;
