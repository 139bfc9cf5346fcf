//! Sets of tokens that gaps may be filled with.

use tonic::Status;

use super::request::{encode_within, tokens};
use super::status::FieldError;
use super::template::{Piece, Template};
use crate::config::LimitsConfig;
use crate::diffusion::Token;
use crate::engine::plan::Allowed;
use crate::models::ServedModel;
use crate::proto::v1;

/// Longest name of a set.
const MAX_NAME: usize = 128;
/// Names that are told to whoever names another.
const MAX_TOLD: usize = 8;

/// The sets of a request, each ascending and without doubles.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenSets(Vec<(String, Vec<Token>)>);

impl TokenSets {
    /// Reads the sets of a request.
    pub(super) fn read(
        sets: Vec<v1::TokenSet>,
        model: &ServedModel,
        limits: &LimitsConfig,
    ) -> Result<Self, Status> {
        if sets.len() > limits.max_template_parts {
            let problem = format!(
                "has {} sets, at most {} are allowed",
                sets.len(),
                limits.max_template_parts
            );
            return Err(FieldError::new("token_sets", problem).into());
        }
        let mut read = Self::default();
        let mut bytes = 0;
        for (index, set) in sets.into_iter().enumerate() {
            let field = |name: &str| format!("token_sets[{index}].{name}");
            if set.name.is_empty() || set.name.chars().count() > MAX_NAME {
                let problem = format!("must be 1 to {MAX_NAME} characters");
                return Err(FieldError::new(field("name"), problem).into());
            }
            if read.find(&set.name).is_some() {
                return Err(FieldError::new(field("name"), "is another set's, too").into());
            }
            let mut ids = tokens(&field("ids"), set.ids, model)?;
            for (at, text) in set.texts.iter().enumerate() {
                let field = field(&format!("texts[{at}]"));
                bytes += text.len();
                if bytes > limits.max_text_bytes {
                    let problem = format!(
                        "takes the texts beyond the {} bytes that are allowed",
                        limits.max_text_bytes
                    );
                    return Err(FieldError::new(field, problem).into());
                }
                match encode_within(&field, text, model, limits)?.as_slice() {
                    [token] => ids.push(*token),
                    several => {
                        let problem = format!("is {} tokens, must be one", several.len());
                        return Err(FieldError::new(field, problem).into());
                    }
                }
            }
            if ids.is_empty() {
                return Err(FieldError::new(format!("token_sets[{index}]"), "holds no token").into());
            }
            ids.sort_unstable();
            ids.dedup();
            let excluded = &model.manifest().excluded_tokens;
            if ids.iter().all(|id| excluded.contains(id)) {
                let problem = "holds none but tokens that this model never draws (see GetModel)";
                return Err(FieldError::new(format!("token_sets[{index}]"), problem).into());
            }
            read.0.push((set.name, ids));
        }
        Ok(read)
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|(known, _)| known == name)
    }

    /// Checks the name that a gap gives in `field`.
    pub(super) fn check(&self, field: &str, name: Option<&str>) -> Result<(), FieldError> {
        let Some(name) = name.filter(|name| self.find(name).is_none()) else {
            return Ok(());
        };
        let known: Vec<&str> = self
            .0
            .iter()
            .take(MAX_TOLD)
            .map(|(known, _)| known.as_str())
            .collect();
        let told: String = name.chars().take(MAX_NAME).collect();
        let problem = format!("names no set of token_sets: {told:?} is none of {known:?}");
        Err(FieldError::new(field, problem))
    }

    /// The tokens that are allowed at every position of `template`; every set must be named by a gap.
    pub(super) fn resolve(&self, template: &Template) -> Result<Option<Allowed>, FieldError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut of = vec![None; template.length()];
        let mut is_named = vec![false; self.0.len()];
        for (piece, range) in template.pieces() {
            let Piece::Gap(_, Some(name)) = piece else {
                continue;
            };
            let Some(set) = self.find(name) else { continue };
            is_named[set] = true;
            of[range.clone()].fill(Some(set));
        }
        if let Some(index) = is_named.iter().position(|named| !named) {
            return Err(FieldError::new(
                format!("token_sets[{index}]"),
                "is named by no gap",
            ));
        }
        Ok(Some(Allowed {
            sets: self.0.iter().map(|(_, ids)| ids.clone()).collect(),
            of,
        }))
    }

    /// The sets as they are told.
    pub(super) fn told(&self) -> Vec<v1::TokenSet> {
        let told = |(name, ids): &(String, Vec<Token>)| v1::TokenSet {
            name: name.clone(),
            ids: ids.clone(),
            texts: Vec::new(),
        };
        self.0.iter().map(told).collect()
    }
}
