//! `denoised models`, `load` and `unload`.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;

use super::connect::Target;
use super::{Failed, json};
use crate::proto::v1::model_service_client::ModelServiceClient;
use crate::proto::v1::{
    self, ListModelsRequest, LoadModelRequest, Model, ModelReference, UnloadModelRequest,
};
use crate::server::models::parse_reference;

/// Characters of a provenance that the table shows.
const SUMMARY: usize = 72;

/// How long a server of our own may take for what it loads first, and how often it is asked meanwhile.
const FIRST_LOADS: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// List what a server serves.
#[derive(Debug, Args)]
pub(super) struct ListModels {
    #[command(flatten)]
    target: Target,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

impl ListModels {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let connection = self.target.connect().await?;
        let mut client = ModelServiceClient::new(connection.server.clone());
        let started = Instant::now();
        // Our own server has only just begun to load what it serves.
        let is_over = || !connection.is_own() || started.elapsed() >= FIRST_LOADS;
        let listed = loop {
            let listed = client.list_models(ListModelsRequest {}).await;
            let response = listed.as_ref().map(tonic::Response::get_ref);
            let is_loading = |model: &Model| model.state() == v1::ModelState::Loading;
            if is_over() || !response.is_ok_and(|listed| listed.models.iter().any(is_loading)) {
                break listed;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        drop(client);
        let printed = listed.map_err(Failed::from).and_then(|response| {
            let v1::ListModelsResponse { mut models, refused } = response.into_inner();
            models.extend(refused);
            let mut out = io::stdout();
            let printed = if self.json {
                lines(&models, &mut out)
            } else {
                table(&models, &mut out)
            };
            Failed::unless_closed(printed)
        });
        printed.and(connection.close().await)
    }
}

/// Options of `load` and `unload`, of servers with `server.model_control`.
#[derive(Debug, Args)]
struct Ordered {
    #[command(flatten)]
    target: Target,
    /// The model.
    #[arg(value_name = "NAME[@VERSION]", value_parser = reference)]
    model: ModelReference,
}

/// Have a server load a model of its repository, and wait until it is ready.
#[derive(Debug, Args)]
pub(super) struct Load {
    #[command(flatten)]
    ordered: Ordered,
}

/// Have a server serve a model to nobody new.
#[derive(Debug, Args)]
pub(super) struct Unload {
    #[command(flatten)]
    ordered: Ordered,
}

fn reference(text: &str) -> Result<ModelReference, String> {
    let (name, version) = parse_reference(text).ok_or("a version is a number from 1")?;
    Ok(ModelReference {
        name: name.to_owned(),
        version: version.unwrap_or_default(),
    })
}

impl Load {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let connection = self.ordered.target.connect().await?;
        let mut client = ModelServiceClient::new(connection.server.clone());
        let model = Some(self.ordered.model);
        let loaded = client.load_model(LoadModelRequest { model }).await;
        drop(client);
        let printed = loaded.map_err(Failed::from).and_then(|response| {
            let model = response.into_inner().model.unwrap_or_default();
            Failed::unless_closed(writeln!(io::stdout(), "{}@{}", model.name, model.version))
        });
        printed.and(connection.close().await)
    }
}

impl Unload {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let connection = self.ordered.target.connect().await?;
        let mut client = ModelServiceClient::new(connection.server.clone());
        let model = Some(self.ordered.model);
        let unloaded = client.unload_model(UnloadModelRequest { model }).await;
        drop(client);
        let printed = unloaded.map_err(Failed::from).and_then(|response| {
            let mut models = response.into_inner().unloaded.into_iter();
            let mut out = io::stdout();
            Failed::unless_closed(models.try_for_each(|m| writeln!(out, "{}@{}", m.name, m.version)))
        });
        printed.and(connection.close().await)
    }
}

fn lines(models: &[Model], out: &mut impl Write) -> io::Result<()> {
    for model in models {
        writeln!(out, "{}", serde_json::to_string(&json::Model::from(model))?)?;
    }
    Ok(())
}

fn table(models: &[Model], out: &mut impl Write) -> io::Result<()> {
    let name = |model: &Model| {
        let mark = if model.is_default { " (default)" } else { "" };
        format!("{}@{}{mark}", model.name, model.version)
    };
    let width = models.iter().map(|model| name(model).len()).max();
    let width = width.unwrap_or_default().max("MODEL".len());
    writeln!(
        out,
        "{:<width$}  {:<8}  {:<9}  {:>10}  {:>10}  PROVENANCE",
        "MODEL", "STATE", "GRAPH", "VOCABULARY", "MAX LENGTH"
    )?;
    for model in models {
        writeln!(
            out,
            "{:<width$}  {:<8}  {:<9}  {:>10}  {:>10}  {}",
            name(model),
            json::state(model),
            if model.graph() == v1::Graph::Unspecified {
                "-".to_owned()
            } else {
                json::graph(model)
            },
            told(model.vocab_size),
            told(model.limits.unwrap_or_default().max_length),
            if model.state_reason.is_empty() {
                summary(&json::provenance(model))
            } else {
                model.state_reason.clone()
            }
        )?;
    }
    Ok(())
}

/// A number, which is not known of a model that is refused.
fn told(number: u32) -> String {
    if number == 0 {
        return "-".to_owned();
    }
    number.to_string()
}

/// Tells a model's origin in a few words: corpus, steps and bound where they are told, as
/// this project's `training` does, or else the beginning of whatever is told.
fn summary(provenance: &Value) -> String {
    let known = [
        provenance["corpus"].as_str().map(str::to_owned),
        provenance["steps"].as_u64().map(|steps| format!("{steps} steps")),
        provenance["validation"]["bound_bits_per_byte"]
            .as_f64()
            .map(|bits| format!("{bits:.2} bits per byte held out")),
    ];
    let mut summary = known.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if summary.is_empty() {
        summary = match provenance.as_str() {
            Some(text) => text.to_owned(),
            None if provenance.is_null() => "-".to_owned(),
            None => provenance.to_string(),
        };
    }
    let summary = summary.split_whitespace().collect::<Vec<_>>().join(" ");
    if summary.chars().count() <= SUMMARY {
        return summary;
    }
    let start: String = summary.chars().take(SUMMARY - 1).collect();
    format!("{start}\u{2026}")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn provenance_is_summed_up_whatever_it_is() {
        for (provenance, says) in [
            (
                json!({"corpus": "a book", "steps": 12, "validation": {"bound_bits_per_byte": 2.125}, "x": 1}),
                "a book, 12 steps, 2.12 bits per byte held out",
            ),
            (json!(null), "-"),
            (json!("found\non the street"), "found on the street"),
            (json!({"by": "me"}), r#"{"by":"me"}"#),
        ] {
            assert_eq!(summary(&provenance), says);
        }
        assert_eq!(summary(&json!("x".repeat(500))).chars().count(), SUMMARY);
    }

    #[test]
    fn the_table_has_a_line_for_every_model() {
        let model = |name: &str, is_default| Model {
            name: name.to_owned(),
            version: 1,
            is_default,
            ..Model::default()
        };
        let refused = Model {
            state: v1::ModelState::Refused.into(),
            state_reason: "no vocabulary".to_owned(),
            ..model("third", false)
        };
        let mut out = Vec::new();
        table(&[model("first", true), model("second", false), refused], &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        let last: Vec<&str> = out.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(last, ["third@1", "refused", "-", "-", "-", "no", "vocabulary"]);
        let names: Vec<&str> = out.lines().filter_map(|line| line.split("  ").next()).collect();
        assert_eq!(names.len(), 4, "{out}");
        assert_eq!(names[1], "first@1 (default)");
    }
}
