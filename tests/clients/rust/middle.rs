//! Rewrites the middle of a paragraph while both of its ends stay: what is there is noised and denoised again.
//!
//! `cargo run --example middle -- http://127.0.0.1:50051 'In the morning' ' he went up to the house of the king' ', and came back.'`

use denoised::client::{Client, Event, Request, draft, text};

/// About the share of the middle that is lost.
const NOISE: f64 = 0.6;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [url, before, middle, after] = std::env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "middle URL BEFORE MIDDLE AFTER")?;
    let parts = [text(before), draft(middle), text(after)];
    let request = Request::filling(parts).start_time(NOISE).samples(3).seed(1);
    let mut events = Client::new([url])?.run(request);
    while let Some(event) = events.next().await {
        if let Event::Result(result) = event? {
            println!("{}", result.text());
        }
    }
    Ok(())
}
