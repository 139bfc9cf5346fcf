//! From weights to what the server runs: an ONNX graph, and the bundle around it.
//!
//! `ddit` writes the network with `graph`, which writes the format of `onnx.proto`. The graph leaves
//! the sigma offset and the zero at the current token to its reader, which adds them in f64.

mod ddit;
mod graph;

use std::collections::BTreeMap;
use std::path::Path;

use denoised::bundle::{self, BundleError, Manifest, TextTokenizer};
use denoised::diffusion::{Graph, GraphKind, Schedule, Token};
use prost::Message;
use thiserror::Error;
use tokenizers::Tokenizer;

use crate::network::{NetworkConfig, NetworkError};
use crate::state_dict::{StateDict, StateDictError};
use crate::tokenizer::END_OF_DOCUMENT;

/// The schema of ONNX files, compiled.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub(crate) mod onnx {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

/// Version of the operators in use: the first with `Gelu`.
const OPERATORS: i64 = 20;
/// Version of the file format that came with them.
const FILE_FORMAT: i64 = 9;
/// No protobuf message may be larger.
const MOST_BYTES: usize = i32::MAX as usize;

/// A buffer of published checkpoints, which the graph holds as tables of its own.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// How weights are kept in the file; sums are taken in float32 either way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Storage {
    /// As they are.
    #[default]
    F32,
    /// Matrices as float16, in half the space: three decimal digits, up to 65504.
    F16,
}

/// Why a network cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// A shape that cannot be built.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Weights that do not fit the shape.
    #[error(transparent)]
    Weights(#[from] StateDictError),
    /// A weight that the file cannot hold.
    #[error("tensor {name} has an entry {entry}, which the storage type cannot hold")]
    Entry {
        /// Name of the tensor.
        name: String,
        /// The entry.
        entry: f32,
    },
    /// More than one file can hold.
    #[error("the graph takes {0} bytes, an ONNX file may have {MOST_BYTES}; keep matrices as float16")]
    Size(usize),
    /// The bundle cannot be written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// The network as an ONNX file: inputs `tokens` int64 `[batch, length]`, `sigma` float32 `[batch]` (where
/// the network sees it), `positions` int64 `[rows]` (flat `b * length + i`), output `log_score` float32 `[rows, states]`.
///
/// Weights go by reference names and layouts; each must be there, and none be left over.
pub fn onnx_model(
    config: &NetworkConfig,
    weights: &StateDict,
    storage: Storage,
) -> Result<Vec<u8>, ExportError> {
    config.validate()?;
    check(config, weights)?;
    let operators = onnx::OperatorSetIdProto {
        domain: Some(String::new()),
        version: Some(OPERATORS),
    };
    let model = onnx::ModelProto {
        ir_version: Some(FILE_FORMAT),
        opset_import: vec![operators],
        producer_name: Some(env!("CARGO_PKG_NAME").to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(ddit::graph(config, weights, storage)?),
        ..onnx::ModelProto::default()
    };
    match model.encoded_len() {
        0..=MOST_BYTES => Ok(model.encode_to_vec()),
        bytes => Err(ExportError::Size(bytes)),
    }
}

fn check(config: &NetworkConfig, weights: &StateDict) -> Result<(), StateDictError> {
    let parameters = config.parameters();
    for (name, expected) in &parameters {
        let Some(tensor) = weights.get(name) else {
            return Err(StateDictError::Missing {
                name: name.clone(),
                expected: expected.clone(),
            });
        };
        if &tensor.shape != expected || tensor.data.len() != expected.iter().product::<usize>() {
            return Err(StateDictError::Misshapen {
                name: name.clone(),
                found: tensor.shape.clone(),
                entries: tensor.data.len(),
                expected: expected.clone(),
            });
        }
    }
    let known = |name: &str| name == ROTARY_BUFFER || parameters.iter().any(|(known, _)| known == name);
    match weights.0.keys().find(|name| !known(name)) {
        Some(name) => Err(StateDictError::Extra { name: name.clone() }),
        None => Ok(()),
    }
}

/// A trained network and what the server must know of it.
#[derive(Debug, Clone)]
pub struct TrainedModel<'a> {
    /// Name to serve it under.
    pub name: &'a str,
    /// Shape of the network.
    pub config: &'a NetworkConfig,
    /// Its weights.
    pub weights: &'a StateDict,
    /// The noise process it was trained on.
    pub graph: GraphKind,
    /// The noise schedule it was trained with.
    pub schedule: Schedule,
    /// `tokenizer.json`; without, it is served by token ids alone.
    pub tokenizer: Option<&'a [u8]>,
    /// What trained it, on what, and how well: for people.
    pub provenance: serde_json::Value,
}

/// Writes the bundle of `model` into `directory`, which must not exist yet.
pub fn bundle(directory: &Path, model: TrainedModel<'_>, storage: Storage) -> Result<Manifest, ExportError> {
    let config = model.config;
    config.validate()?;
    let mut manifest = Manifest {
        format: bundle::FORMAT,
        name: model.name.to_owned(),
        graph: model.graph,
        schedule: model.schedule,
        parameterization: config.parameterization,
        sigma_offset: config.scale_by_sigma,
        vocab_size: config.states,
        mask_token: Graph::new(model.graph, config.states).mask(),
        end_of_document: None,
        max_length: config.length,
        time_conditioned: config.time_conditioned,
        two_stage: false,
        sha256: BTreeMap::new(),
        provenance: model.provenance,
    };
    if let Some(json) = model.tokenizer {
        let tokenizer = |error| ExportError::Bundle(BundleError::Tokenizer(error));
        TextTokenizer::from_json(json, &manifest).map_err(tokenizer)?;
        manifest.end_of_document = end_of_document(json);
    }
    let network = onnx_model(config, model.weights, storage)?;
    let mut files = vec![(bundle::MODEL, network.as_slice())];
    files.extend(model.tokenizer.map(|json| (bundle::TOKENIZER, json)));
    bundle::write(directory, &mut manifest, &files)?;
    Ok(manifest)
}

/// The token between documents, if the tokenizer has one.
fn end_of_document(tokenizer: &[u8]) -> Option<Token> {
    Tokenizer::from_bytes(tokenizer)
        .ok()?
        .token_to_id(END_OF_DOCUMENT)
}
