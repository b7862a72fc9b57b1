//! Parse, run, exit status: 0 done or passed, 1 a check found something, 2 error, 130 interrupted.
#![forbid(unsafe_code)]

use clap::Parser;
use qtool::cli::{Cli, fail};

fn main() {
    let cli = Cli::parse();
    qtool::interrupt::listen();
    let status = cli.run().unwrap_or_else(|error| fail(&error));
    std::process::exit(status);
}
