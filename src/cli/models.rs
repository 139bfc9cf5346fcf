//! `denoised models`.

use clap::Args;

use super::connect::Target;
use super::{Failed, json};
use crate::proto::v1::ListModelsRequest;
use crate::proto::v1::model_service_client::ModelServiceClient;

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
        let mut client = ModelServiceClient::new(connection.channel.clone());
        let models = client
            .list_models(ListModelsRequest {})
            .await?
            .into_inner()
            .models;
        drop(client);
        if !self.json {
            println!(
                "{:<28} {:<10} {:>10} {:>10}",
                "MODEL", "GRAPH", "VOCABULARY", "MAX LENGTH"
            );
        }
        for model in &models {
            let value = json::model(model);
            if self.json {
                println!("{value}");
                continue;
            }
            let name = format!(
                "{}@{}{}",
                model.name,
                model.version,
                if model.is_default { " (default)" } else { "" }
            );
            let text = |key: &str| {
                value[key]
                    .as_str()
                    .map_or_else(|| value[key].to_string(), str::to_owned)
            };
            println!(
                "{name:<28} {:<10} {:>10} {:>10}",
                text("graph"),
                text("vocab_size"),
                text("max_length")
            );
        }
        connection.close().await
    }
}
