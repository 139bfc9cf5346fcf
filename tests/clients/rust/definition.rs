//! Finds the word that a sentence describes: draws some, then ranks them by how likely each is there.
//!
//! `cargo run --example definition -- http://127.0.0.1:50051 'He kept the sheep, for he was a' '.'`

use std::collections::BTreeSet;

use denoised::client::{Client, Event, Request, gap, text};

/// Words that are drawn; many are the same.
const DRAWS: u32 = 24;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [url, before, after] = std::env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "definition URL BEFORE AFTER")?;
    let client = Client::new([url])?;
    let parts = [text(before.as_str()), gap(1), text(after.as_str())];
    let mut events = client.run(Request::filling(parts).samples(DRAWS).seed(1));
    let mut words = BTreeSet::new();
    while let Some(event) = events.next().await {
        if let Event::Result(result) = event? {
            let drawn = result.text();
            let word = drawn
                .strip_prefix(&before)
                .and_then(|rest| rest.strip_suffix(&after));
            words.extend(
                word.map(str::trim)
                    .filter(|word| !word.is_empty())
                    .map(str::to_owned),
            );
        }
    }
    // The space before the word is the word's own, as tokenizers write it.
    for candidate in client.choose(format!("{before} "), after, words).await? {
        println!("{:5.1} %  {}", 100.0 * candidate.probability, candidate.text);
    }
    Ok(())
}
