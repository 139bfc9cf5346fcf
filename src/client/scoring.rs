//! Questions of how likely texts are.

use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Bearer, Client};
use crate::proto::v1;
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::likelihood::Likelihood;
use crate::proto::v1::text_or_tokens::Content;

/// The generated client, for calls that [`Client`] has no method for.
pub type Service = DiffusionServiceClient<InterceptedService<Channel, Bearer>>;

/// A candidate, as likely as the model finds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its text.
    pub text: String,
    /// Its log-probability given what stands around it, in nats.
    pub log_probability: f64,
    /// Its probability among the candidates.
    pub probability: f64,
}

fn text_of(text: impl Into<String>) -> v1::TextOrTokens {
    v1::TextOrTokens {
        content: Some(Content::Text(text.into())),
    }
}

impl Client {
    /// The generated client of the server that is asked first; nothing where there is none.
    pub fn service(&self) -> Option<Service> {
        self.server(0).map(DiffusionServiceClient::new)
    }

    /// How likely each of `candidates` is between these texts, the likeliest first.
    ///
    /// # Errors
    /// What the last server says that was asked; each that is away is followed by the next.
    pub async fn choose<T: Into<String>>(
        &self,
        before: impl Into<String>,
        after: impl Into<String>,
        candidates: impl IntoIterator<Item = T>,
    ) -> Result<Vec<Candidate>, Status> {
        let candidates: Vec<String> = candidates.into_iter().map(Into::into).collect();
        let request = v1::ChooseRequest {
            before: Some(text_of(before)),
            after: Some(text_of(after)),
            candidates: candidates.iter().map(text_of).collect(),
            ..v1::ChooseRequest::default()
        };
        let ask = |mut service: Service| {
            let request = request.clone();
            async move { service.choose(request).await }
        };
        let answer = self.of_any(ask).await?.into_inner();
        let scores = candidates.into_iter().zip(answer.candidates);
        let mut ranked: Vec<Candidate> = scores
            .map(|(text, score)| Candidate {
                text,
                log_probability: score.log_probability,
                probability: score.probability,
            })
            .collect();
        ranked.sort_by(|a, b| b.log_probability.total_cmp(&a.log_probability));
        Ok(ranked)
    }

    /// The score of each of `texts`: exact, where the model's graph allows it ([`v1::Exact`]), or a bound.
    ///
    /// # Errors
    /// As for [`Self::choose`].
    pub async fn score<T: Into<String>>(
        &self,
        texts: impl IntoIterator<Item = T>,
        likelihood: Likelihood,
    ) -> Result<Vec<v1::TextScore>, Status> {
        let text = |text: T| v1::TextToScore {
            parts: vec![v1::PartToScore {
                content: Some(text_of(text)),
                context: false,
            }],
        };
        let request = v1::ScoreRequest {
            texts: texts.into_iter().map(text).collect(),
            likelihood: Some(v1::Likelihood {
                likelihood: Some(likelihood),
            }),
            ..v1::ScoreRequest::default()
        };
        let ask = |mut service: Service| {
            let request = request.clone();
            async move {
                let mut answers = service.score(request).await?.into_inner();
                let mut scores = Vec::new();
                while let Some(answer) = answers.message().await? {
                    if let Some(v1::score_response::Event::Score(score)) = answer.event {
                        scores.push(score);
                    }
                }
                Ok(scores)
            }
        };
        let mut scores = self.of_any(ask).await?;
        scores.sort_by_key(|score| score.text);
        Ok(scores)
    }

    /// What the first server says that is not away.
    async fn of_any<T, F: Future<Output = Result<T, Status>>>(
        &self,
        ask: impl Fn(Service) -> F,
    ) -> Result<T, Status> {
        let mut answer = Err(Status::unavailable("the client has no server"));
        for turn in 0..self.servers.len() {
            let Some(server) = self.server(turn) else { break };
            answer = ask(DiffusionServiceClient::new(server)).await;
            if !matches!(&answer, Err(status) if status.code() == Code::Unavailable) {
                break;
            }
        }
        answer
    }
}
