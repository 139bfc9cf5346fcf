//! The reference algorithm in PyTorch, in a process that waits to be asked.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};

pub(crate) struct Loop {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Loop {
    pub(crate) fn start(python: &Path, checkpoint: &Path, threads: usize) -> Result<Self> {
        Self::start_as(python, checkpoint, threads, "cpu", "float32")
    }

    /// On a device of PyTorch's; `mode` is one that `reference.py` knows.
    pub(crate) fn start_as(
        python: &Path,
        checkpoint: &Path,
        threads: usize,
        device: &str,
        mode: &str,
    ) -> Result<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/reference.py");
        let mut child = Command::new(python)
            .arg(script)
            .arg(checkpoint)
            .arg(threads.to_string())
            .args([device, mode])
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
        self.generate_many(length, steps, 1)
    }

    /// Seconds of one generation of several canvases at once.
    pub(crate) fn generate_many(&mut self, length: usize, steps: u32, canvases: usize) -> Result<f64> {
        Ok(self.ask(length, steps, canvases, "analytic")?.0)
    }

    /// Seconds and evaluations of one generation by MDLM's sampler, which skips evaluations of what has not changed.
    pub(crate) fn generate_cached(&mut self, length: usize, steps: u32) -> Result<(f64, u32)> {
        self.ask(length, steps, 1, "ddpm_cache")
    }

    fn ask(&mut self, length: usize, steps: u32, canvases: usize, sampler: &str) -> Result<(f64, u32)> {
        writeln!(self.questions, "{length} {steps} {canvases} {sampler}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let (seconds, evaluations) = line.trim().split_once(' ').context("PyTorch stopped")?;
        Ok((seconds.parse()?, evaluations.parse()?))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
