//! Tensors as they travel: canvases that come in, and what became of them.

use super::parameters;
use crate::config::LimitsConfig;
use crate::diffusion::Token;
use crate::models::ServedModel;
use crate::proto::inference as open;
use crate::proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use crate::proto::inference::model_infer_response::InferOutputTensor;
use crate::proto::inference::model_metadata_response::TensorMetadata;
use crate::proto::v1::CanvasResult;
use crate::server::status::FieldError;
use crate::server::template::{Piece, Template};

/// The tensor that comes in, and first of those that go out.
const TOKENS: &str = "tokens";
/// What stands for a position to fill, beside the mask.
const TO_FILL: i128 = -1;

/// What `ModelInfer` takes.
pub(super) fn input_metadata() -> TensorMetadata {
    TensorMetadata {
        name: TOKENS.to_owned(),
        datatype: "INT64".to_owned(),
        shape: vec![-1, -1],
    }
}

/// Canvases of one request, and how it sent them.
#[derive(Debug)]
pub(super) struct Canvases {
    /// One for every canvas.
    pub(super) templates: Vec<Template>,
    /// Dimensions as they came: with one dimension there is one canvas.
    pub(super) shape: Vec<i64>,
    /// Whether entries travel as bytes.
    pub(super) raw: bool,
}

impl Canvases {
    /// Reads the canvases that `inputs` and `raw` hold, for `model`.
    pub(super) fn read(
        inputs: &[InferInputTensor],
        raw: &[Vec<u8>],
        model: &ServedModel,
        limits: &LimitsConfig,
    ) -> Result<Self, FieldError> {
        let [input] = inputs else {
            let problem = format!("has {} tensors, must have one, {TOKENS:?}", inputs.len());
            return Err(FieldError::new("inputs", problem));
        };
        if input.name != TOKENS {
            let problem = format!("is {:?}, must be {TOKENS:?}", input.name);
            return Err(FieldError::new("inputs[0].name", problem));
        }
        if let Some(name) = input.parameters.keys().next() {
            return Err(parameters::unknown("inputs[0].parameters", name, &[]));
        }
        let (canvases, length) = dimensions(&input.shape, model, limits)?;
        let tokens = match (raw, &input.contents) {
            ([], Some(contents)) => {
                Entries::In(contents).read(&input.datatype, "inputs[0].contents", canvases * length)?
            }
            ([], None) => return Err(FieldError::new("inputs[0].contents", "is absent")),
            ([bytes], None) => {
                Entries::Raw(bytes).read(&input.datatype, "raw_input_contents[0]", canvases * length)?
            }
            ([_], Some(_)) => {
                let problem = "must be absent beside raw_input_contents";
                return Err(FieldError::new("inputs[0].contents", problem));
            }
            (_, _) => {
                let problem = format!("has {} entries, must have one a tensor", raw.len());
                return Err(FieldError::new("raw_input_contents", problem));
            }
        };
        let templates = tokens
            .chunks(length)
            .enumerate()
            .map(|(canvas, tokens)| template(canvas, tokens, model))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            templates,
            shape: input.shape.clone(),
            raw: !raw.is_empty(),
        })
    }
}

/// How many canvases a tensor of this shape holds, of which length.
fn dimensions(
    shape: &[i64],
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<(usize, usize), FieldError> {
    let refusal = |problem: String| Err(FieldError::new("inputs[0].shape", problem));
    let (canvases, length) = match shape {
        [length] => (1, *length),
        [canvases, length] => (*canvases, *length),
        _ => {
            let problem = "must be of canvases and positions, or of positions";
            return refusal(format!("has {} dimensions, {problem}", shape.len()));
        }
    };
    let within = |value: i64, most: usize| usize::try_from(value).ok().filter(|v| (1..=most).contains(v));
    let max_canvases = limits.max_samples as usize;
    let Some(count) = within(canvases, max_canvases) else {
        return refusal(format!(
            "is of {canvases} canvases, must be of 1 to {max_canvases}"
        ));
    };
    let max = model.manifest().max_length;
    let Some(positions) = within(length, max) else {
        let problem = format!("is of {length} positions, must be of 1 to {max} (the model's max_length)");
        return refusal(problem);
    };
    let max = limits.max_request_tokens;
    if count.saturating_mul(positions) > max {
        let problem =
            format!("is of {count} canvases of {positions} positions, more than the {max} positions");
        return refusal(format!("{problem} that one request may have"));
    }
    Ok((count, positions))
}

/// Where the entries of a tensor are.
enum Entries<'a> {
    In(&'a open::InferTensorContents),
    Raw(&'a [u8]),
}

impl Entries<'_> {
    /// The entries of a tensor of `datatype`, which must be as many as `wanted` and are called `field`.
    fn read(&self, datatype: &str, field: &str, wanted: usize) -> Result<Vec<i128>, FieldError> {
        let entries = match (self, datatype) {
            (Self::Raw(bytes), "INT64") => little_endian(bytes, wanted, i64::from_le_bytes),
            (Self::Raw(bytes), "UINT64") => little_endian(bytes, wanted, u64::from_le_bytes),
            (Self::Raw(bytes), "INT32") => little_endian(bytes, wanted, i32::from_le_bytes),
            (Self::Raw(bytes), "UINT32") => little_endian(bytes, wanted, u32::from_le_bytes),
            (Self::In(contents), "INT64") => widened(&contents.int64_contents, wanted),
            (Self::In(contents), "UINT64") => widened(&contents.uint64_contents, wanted),
            (Self::In(contents), "INT32") => widened(&contents.int_contents, wanted),
            (Self::In(contents), "UINT32") => widened(&contents.uint_contents, wanted),
            (Self::Raw(_) | Self::In(_), _) => {
                let problem = format!("is {datatype:?}, must be INT64, INT32, UINT32 or UINT64");
                return Err(FieldError::new("inputs[0].datatype", problem));
            }
        };
        entries.map_err(|found| {
            let problem = format!("has {found} of type {datatype}, but the shape is of {wanted} entries");
            FieldError::new(field, problem)
        })
    }
}

/// The `wanted` entries, or what there is.
fn widened<T: Copy + Into<i128>>(entries: &[T], wanted: usize) -> Result<Vec<i128>, String> {
    if entries.len() != wanted {
        return Err(format!("{} entries", entries.len()));
    }
    Ok(entries.iter().map(|entry| (*entry).into()).collect())
}

/// The same, of bytes.
fn little_endian<T: Into<i128>, const N: usize>(
    bytes: &[u8],
    wanted: usize,
    read: fn([u8; N]) -> T,
) -> Result<Vec<i128>, String> {
    match bytes.as_chunks() {
        (entries, []) if entries.len() == wanted => {
            Ok(entries.iter().map(|entry| read(*entry).into()).collect())
        }
        (_, _) => Err(format!("{} bytes", bytes.len())),
    }
}

/// The canvas of these `tokens`.
fn template(canvas: usize, tokens: &[i128], model: &ServedModel) -> Result<Template, FieldError> {
    let (states, mask) = (model.manifest().vocab_size, model.manifest().mask_token);
    let to_fill = |token: i128| token == TO_FILL || mask.is_some_and(|mask| token == i128::from(mask));
    let field = || format!("inputs[0][{canvas}]");
    let mut pieces = Vec::new();
    let mut at = 0;
    for run in tokens.chunk_by(|a, b| to_fill(*a) == to_fill(*b)) {
        if run.first().is_some_and(|token| to_fill(*token)) {
            pieces.push(Piece::Gap(run.len(), None));
        } else {
            let clamped = run.iter().enumerate().map(|(i, token)| {
                let known = Token::try_from(*token).ok().filter(|t| (*t as usize) < states);
                known.ok_or_else(|| {
                    let problem =
                        format!("is {token}, must be below {states}, or {TO_FILL} for a position to fill");
                    FieldError::new(format!("{}[{}]", field(), at + i), problem)
                })
            });
            pieces.push(Piece::Tokens(clamped.collect::<Result<_, _>>()?));
        }
        at += run.len();
    }
    let template = Template::new(pieces);
    if template.gaps() == 0 {
        let masks = mask.map_or(String::new(), |mask| format!(" or {mask}, the mask"));
        let problem = format!("has no position to fill, {TO_FILL}{masks}");
        return Err(FieldError::new(field(), problem));
    }
    Ok(template)
}

/// A tensor that goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Tokens,
    LogProbabilities,
    Nfe,
}

impl Output {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Tokens, Self::LogProbabilities, Self::Nfe];

    /// Those that are `asked` for: all where none is.
    pub(super) fn asked(asked: &[InferRequestedOutputTensor]) -> Result<Vec<Self>, FieldError> {
        if asked.is_empty() {
            return Ok(Self::ALL.to_vec());
        }
        let mut outputs = Vec::new();
        for (index, asked) in asked.iter().enumerate() {
            let field = format!("outputs[{index}]");
            if let Some(name) = asked.parameters.keys().next() {
                return Err(parameters::unknown(&format!("{field}.parameters"), name, &[]));
            }
            let Some(output) = Self::ALL.into_iter().find(|output| output.name() == asked.name) else {
                let names = Self::ALL.map(Self::name).join(", ");
                let problem = format!("is {:?}, must be one of {names}", asked.name);
                return Err(FieldError::new(format!("{field}.name"), problem));
            };
            if outputs.contains(&output) {
                let problem = format!("is {:?} once more", asked.name);
                return Err(FieldError::new(format!("{field}.name"), problem));
            }
            outputs.push(output);
        }
        Ok(outputs)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tokens => TOKENS,
            Self::LogProbabilities => "log_probabilities",
            Self::Nfe => "nfe",
        }
    }

    fn datatype(self) -> &'static str {
        match self {
            Self::Tokens | Self::Nfe => "INT64",
            Self::LogProbabilities => "FP32",
        }
    }

    /// What is told of it.
    pub(super) fn metadata(self) -> TensorMetadata {
        TensorMetadata {
            name: self.name().to_owned(),
            datatype: self.datatype().to_owned(),
            shape: match self {
                Self::Tokens | Self::LogProbabilities => vec![-1, -1],
                Self::Nfe => vec![-1],
            },
        }
    }

    /// The tensor of `results`, which are those of `canvases`; its entries as bytes beside it, where they travel so.
    pub(super) fn tensor(
        self,
        canvases: &Canvases,
        results: &[CanvasResult],
    ) -> (InferOutputTensor, Option<Vec<u8>>) {
        let mut contents = open::InferTensorContents::default();
        match self {
            Self::Tokens => {
                let tokens = results.iter().flat_map(|result| &result.tokens);
                contents.int64_contents = tokens.map(|token| i64::from(*token)).collect();
            }
            Self::LogProbabilities => {
                let all = results.iter().flat_map(|result| &result.log_probabilities);
                contents.fp32_contents = all.copied().collect();
            }
            Self::Nfe => {
                contents.int64_contents = results.iter().map(|result| i64::from(result.nfe)).collect();
            }
        }
        let raw = canvases.raw.then(|| {
            let whole = contents
                .int64_contents
                .iter()
                .flat_map(|entry| entry.to_le_bytes());
            let parts = contents
                .fp32_contents
                .iter()
                .flat_map(|entry| entry.to_le_bytes());
            whole.chain(parts).collect()
        });
        let tensor = InferOutputTensor {
            name: self.name().to_owned(),
            datatype: self.datatype().to_owned(),
            shape: match self {
                Self::Tokens | Self::LogProbabilities => canvases.shape.clone(),
                Self::Nfe => vec![results.len() as i64],
            },
            parameters: [].into(),
            contents: raw.is_none().then_some(contents),
        };
        (tensor, raw)
    }
}
