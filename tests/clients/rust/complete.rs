//! Completes text as an editor does: every line of standard input is what stands before the cursor; at most 150
//! milliseconds later there is what could follow it, with fewer steps where time is short.
//!
//! `echo 'In the beginning' | cargo run --example complete -- http://127.0.0.1:50051`

use std::io::{BufRead, stdin};
use std::time::{Duration, Instant};

use denoised::client::{Client, Event, Request, gap, text};
use denoised::proto::v1::OnDeadline;

const PATIENCE: Duration = Duration::from_millis(150);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("which server? http://...")?;
    let client = Client::new([url])?;
    for line in stdin().lock().lines() {
        let line = line?;
        let started = Instant::now();
        let request =
            Request::filling([text(line.as_str()), gap(4)]).deadline(PATIENCE, OnDeadline::FinishEarly);
        let mut events = client.run(request);
        while let Some(event) = events.next().await {
            if let Event::Result(result) = event? {
                let completed = result.text().strip_prefix(&line).unwrap_or_default().to_owned();
                println!(
                    "{completed:?} after {} evaluations, {:?}",
                    result.nfe,
                    started.elapsed()
                );
            }
        }
    }
    Ok(())
}
