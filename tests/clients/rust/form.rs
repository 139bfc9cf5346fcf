//! Fills a form and prints it as JSON: some fields are one of a few words, others a few words of the model's own.
//!
//! `cargo run --example form -- http://127.0.0.1:50051`

use denoised::client::{Client, Event, Request, gap, gap_of, text};
use serde_json::{Map, Value};

/// What a field may hold.
enum Field {
    /// One of these, each of them one token with the space before it.
    OneOf(&'static [&'static str]),
    /// So many tokens, whatever they are.
    Words(u32),
}

const FORM: [(&str, Field); 4] = [
    ("name", Field::OneOf(&[" David", " Moses", " Mary", " Joseph"])),
    (
        "office",
        Field::OneOf(&[" king", " priest", " prophet", " servant"]),
    ),
    ("came from", Field::Words(3)),
    ("is alive", Field::OneOf(&[" yes", " no"])),
];

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("which server? http://...")?;
    let mut parts = Vec::new();
    for (name, field) in &FORM {
        parts.push(text(format!("{name}:")));
        parts.push(match field {
            Field::OneOf(_) => gap_of(1, *name),
            Field::Words(tokens) => gap(*tokens),
        });
        parts.push(text("\n"));
    }
    let mut request = Request::filling(parts).seed(1);
    for (name, field) in &FORM {
        if let Field::OneOf(words) = field {
            request = request.token_set(*name, words.iter().copied());
        }
    }
    let mut events = Client::new([url])?.run(request);
    while let Some(event) = events.next().await {
        if let Event::Result(result) = event? {
            println!("{:#}", read(result.text()));
        }
    }
    Ok(())
}

/// The fields of a form that was filled: its own text came back byte for byte.
fn read(filled: &str) -> Value {
    let mut fields = Map::new();
    let mut rest = filled;
    for (at, (name, field)) in FORM.iter().enumerate() {
        rest = rest.strip_prefix(&format!("{name}:")).unwrap_or(rest);
        let next = FORM
            .get(at + 1)
            .map_or("\n".to_owned(), |(next, _)| format!("\n{next}:"));
        let end = rest.find(&next).unwrap_or(rest.len());
        let value = rest[..end].trim();
        let value = match field {
            Field::OneOf([" yes", " no"]) => Value::Bool(value == "yes"),
            Field::OneOf(_) | Field::Words(_) => Value::from(value),
        };
        fields.insert((*name).to_owned(), value);
        rest = rest[end..].trim_start_matches('\n');
    }
    fields.into()
}
