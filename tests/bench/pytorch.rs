//! The reference algorithm in PyTorch, in a process that waits to be asked.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

pub(crate) struct Loop {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Loop {
    pub(crate) fn start(python: &Path, checkpoint: &Path, threads: usize) -> Result<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/reference.py");
        let mut child = Command::new(python)
            .arg(script)
            .arg(checkpoint)
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| python.display().to_string())?;
        let questions = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self {
            child,
            questions,
            answers,
        })
    }

    /// Seconds of one generation of one canvas.
    pub(crate) fn generate(&mut self, length: usize, steps: u32) -> Result<f64> {
        writeln!(self.questions, "{length} {steps}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "PyTorch stopped");
        Ok(line.trim().parse()?)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
