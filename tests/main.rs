//! Tests of the whole tool, in one binary. Nothing here reaches private items.

mod bad_files;
mod hostile;
#[path = "fuzz/oracle.rs"]
mod oracle;
