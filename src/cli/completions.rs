//! `qtool completions SHELL`: generated from the same definition as `--help`.

use clap::CommandFactory;
use clap_complete::Shell;

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  qtool completions bash > ~/.local/share/bash-completion/completions/qtool"
)]
pub struct Args {
    /// bash, elvish, fish, powershell or zsh
    pub shell: Shell,
}

impl Args {
    /// Prints the script.
    pub fn run(&self) -> i32 {
        clap_complete::generate(
            self.shell,
            &mut super::Cli::command(),
            "qtool",
            &mut std::io::stdout(),
        );
        0
    }
}
