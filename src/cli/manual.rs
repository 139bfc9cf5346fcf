//! `denoised completions` and `denoised manual`: what shells and `man` want to know of the command line.

use std::io;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Arguments, Failed};

/// Options of `denoised completions`.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

/// Options of `denoised manual`.
#[derive(Debug, Args)]
pub(super) struct Manual {
    /// The folder; denoised.1 and a page for each command are put there.
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> Result<(), Failed> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "denoised", &mut script);
        Failed::unless_closed(io::Write::write_all(&mut io::stdout(), &script))
    }
}

impl Manual {
    pub(super) fn run(self) -> Result<(), Failed> {
        let wrong = |error: io::Error| Failed::usage(format!("{}: {error}", self.folder.display()));
        std::fs::create_dir_all(&self.folder).map_err(wrong)?;
        clap_mangen::generate_to(Arguments::command(), &self.folder).map_err(wrong)
    }
}
