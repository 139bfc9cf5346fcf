//! `denoised.v1.ServerService`: what the server itself is, and its limits.

use tonic::{Request, Response, Status};

use super::Service;
use super::caller::Principal;
use crate::config::Config;
use crate::proto::v1;
use crate::proto::v1::server_service_server::ServerService;

/// The limits of `config` as they are told.
pub(super) fn limits(config: &Config) -> v1::Limits {
    let Config {
        limits,
        engine,
        server,
        ..
    } = config;
    let most = |limit: usize| u32::try_from(limit).unwrap_or(u32::MAX);
    let max_queue_seconds = engine.max_queue_seconds as f64;
    v1::Limits {
        max_length: 0,
        max_steps: limits.max_steps,
        max_samples: limits.max_samples,
        max_template_parts: most(limits.max_template_parts),
        max_request_tokens: most(limits.max_request_tokens),
        max_text_bytes: limits.max_text_bytes as u64,
        max_message_bytes: server.max_message_bytes as u64,
        max_running_requests: most(limits.max_running_requests),
        max_queue_seconds,
        max_caller_seconds: max_queue_seconds * engine.max_caller_share,
        unread_seconds: server.unread_seconds,
    }
}

/// What is told of a server of `config`.
pub(super) fn server(config: &Config) -> v1::GetServerResponse {
    let engine = &config.engine;
    v1::GetServerResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        devices: engine.devices.iter().map(ToString::to_string).collect(),
        workers: u32::try_from(engine.workers * engine.devices.len()).unwrap_or(u32::MAX),
        limits: Some(limits(config)),
    }
}

impl Service {
    /// The limits as they are for `principal`.
    pub(super) fn limits_of(&self, principal: &Principal) -> v1::Limits {
        let limits = self.told.limits.unwrap_or_default();
        let own = principal.caller().max_share();
        v1::Limits {
            max_caller_seconds: own.map_or(limits.max_caller_seconds, |share| {
                limits.max_queue_seconds * share
            }),
            ..limits
        }
    }
}

#[tonic::async_trait]
impl ServerService for Service {
    async fn get_server(
        &self,
        request: Request<v1::GetServerRequest>,
    ) -> Result<Response<v1::GetServerResponse>, Status> {
        let principal = Principal::of(&request);
        Ok(Response::new(v1::GetServerResponse {
            limits: Some(self.limits_of(&principal)),
            ..(*self.told).clone()
        }))
    }
}
