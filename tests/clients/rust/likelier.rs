//! Says which of two texts is the likelier one, and by how much.
//!
//! `cargo run --example likelier -- http://127.0.0.1:50051 'He went up to the house.' 'He house to up went the.'`

use denoised::client::Client;
use denoised::proto::v1::{Exact, likelihood::Likelihood};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [url, first, second] = std::env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "likelier URL TEXT TEXT")?;
    let exact = Likelihood::Exact(Exact::default());
    let scores = Client::new([url])?.score([&*first, &*second], exact).await?;
    let [a, b] = scores.as_slice() else {
        return Err("the server scored something else".into());
    };
    let (likelier, nats) = if a.nats <= b.nats {
        (first, b.nats - a.nats)
    } else {
        (second, a.nats - b.nats)
    };
    println!("{likelier:?} is likelier, by {nats:.1} nats");
    Ok(())
}
