//! How tokens read, as far as the server has been asked.

use std::collections::{BTreeSet, HashMap};

use super::connect::Answering;
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::{DetokenizeRequest, Frame, ModelReference, frame::Content};

/// Tokens that one call asks for.
const AT_ONCE: usize = 1024;

/// The texts of a model's tokens.
#[derive(Clone, Debug)]
pub(super) struct Pieces {
    client: DiffusionServiceClient<Answering>,
    model: Option<ModelReference>,
    known: HashMap<u32, String>,
}

impl Pieces {
    pub(super) fn new(server: Answering) -> Self {
        Self {
            client: DiffusionServiceClient::new(server),
            model: None,
            known: HashMap::new(),
        }
    }

    /// Tokens are those of `model` from now on.
    pub(super) fn are_of(&mut self, model: Option<ModelReference>) {
        self.model = model;
        self.known.clear();
    }

    /// The text of `token`; its number where the model has no text for it.
    pub(super) fn of(&self, token: u32) -> String {
        let known = self.known.get(&token);
        known.cloned().unwrap_or_else(|| format!(" {token}"))
    }

    /// Asks for those tokens of `frame` that are not known yet.
    pub(super) async fn learn(&mut self, frame: &Frame) {
        let tokens = match &frame.content {
            Some(Content::Keyframe(key)) => &key.tokens,
            Some(Content::Delta(delta)) => &delta.tokens,
            None => return,
        };
        let unknown: BTreeSet<u32> = tokens
            .iter()
            .copied()
            .filter(|token| !self.known.contains_key(token))
            .collect();
        let unknown: Vec<u32> = unknown.into_iter().collect();
        for asked in unknown.chunks(AT_ONCE) {
            // The first once more: at the beginning of a text many tokenizers leave out a token's space.
            let tokens = asked.iter().take(1).chain(asked).copied().collect();
            let request = DetokenizeRequest {
                model: self.model.clone(),
                tokens,
                pieces: true,
            };
            // Without a tokenizer there is nothing to know.
            let Ok(answer) = self.client.detokenize(request).await else {
                return;
            };
            let pieces = answer.into_inner().pieces.into_iter().skip(1);
            self.known.extend(asked.iter().copied().zip(pieces));
        }
    }
}
