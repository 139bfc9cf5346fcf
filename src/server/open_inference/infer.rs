//! `ModelInfer`: every canvas of a tensor is a request of its own, and shares passes with all others.

use futures_util::StreamExt;
use futures_util::future::try_join_all;
use tonic::{Request, Status};

use super::parameters;
use super::reference;
use super::tensors::{Canvases, Output};
use crate::proto::inference as open;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::v1;
use crate::proto::v1::event::Event;
use crate::server::Service;
use crate::server::deadline;
use crate::server::diffusion_service::{Arrival, Events, Filling};
use crate::server::request::drawn_seed;

impl Service {
    /// Fills the canvases of a request and answers when all are done.
    pub(super) async fn infer(
        &self,
        request: Request<open::ModelInferRequest>,
    ) -> Result<open::ModelInferResponse, Status> {
        let arrival = Arrival::of(&request);
        let asked = request.into_inner();
        let model = reference("model_", asked.model_name, &asked.model_version)?;
        let model = self.model(&arrival.principal, Some(model))?;
        let parameters = parameters::read(&asked.parameters)?;
        let outputs = Output::asked(&asked.outputs)?;
        let (inputs, raw, limits, served) = (
            asked.inputs,
            asked.raw_input_contents,
            self.limits.clone(),
            model.clone(),
        );
        let read = move || Ok(Canvases::read(&inputs, &raw, &served, &limits)?);
        let mut canvases = self.text.run(read).await?;
        let deadline = deadline::asked(parameters.timeout_ms, parameters.finish_early);
        let seed = parameters.sampling.seed.unwrap_or_else(drawn_seed);
        let mut running = Vec::with_capacity(canvases.templates.len());
        for (seed, template) in (0..)
            .map(|canvas| seed.wrapping_add(canvas))
            .zip(std::mem::take(&mut canvases.templates))
        {
            let sampling = v1::Sampling {
                seed: Some(seed),
                ..parameters.sampling
            };
            let filling = Filling {
                sampling,
                frames: v1::FramePolicy {
                    when: v1::frame_policy::When::Never.into(),
                    ..v1::FramePolicy::default()
                },
                keep_after_end: true,
                deadline,
            };
            let events = self.fill(arrival.clone(), &model, filling, |_, _, _| Ok(template));
            running.push(events.await?);
        }
        let results = try_join_all(running.into_iter().map(result)).await?;
        let is_early = |result: &v1::CanvasResult| result.finish_reason() == v1::FinishReason::Deadline;
        let finished_early = results.iter().any(is_early);
        let told = [
            ("seed", whole(seed)),
            ("finished_early", ParameterChoice::BoolParam(finished_early)),
        ];
        let tensors = outputs.iter().map(|output| output.tensor(&canvases, &results));
        let (outputs, raw): (Vec<_>, Vec<_>) = tensors.unzip();
        Ok(open::ModelInferResponse {
            model_name: model.name().to_owned(),
            model_version: model.version().to_string(),
            id: asked.id,
            parameters: told
                .into_iter()
                .map(|(name, value)| {
                    let parameter_choice = Some(value);
                    (name.to_owned(), open::InferParameter { parameter_choice })
                })
                .collect(),
            outputs,
            raw_output_contents: raw.into_iter().flatten().collect(),
        })
    }
}

/// A whole number, signed where it can be: not all clients know others.
fn whole(value: u64) -> ParameterChoice {
    i64::try_from(value).map_or(ParameterChoice::Uint64Param(value), ParameterChoice::Int64Param)
}

/// The result of a request of one canvas.
async fn result(mut events: Events) -> Result<v1::CanvasResult, Status> {
    while let Some(event) = events.next().await {
        if let Event::Result(result) = event? {
            return Ok(result);
        }
    }
    Err(Status::internal("a request ended without a result"))
}
