//! From weights to what the server runs: an ONNX graph, and the bundle around it.
//!
//! `ddit` writes the network with `graph`, which writes the messages of `schema`. The graph leaves
//! the sigma offset and the zero at the current token to its reader, which adds them in f64. What a
//! storage of fewer bits costs is measured by [`difference`] before anybody sees the bundle. [`weights`] is the way back.

pub mod average;
mod constant;
mod ddit;
pub mod difference;
mod graph;
mod schema;
pub mod weights;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use clap::ValueEnum;
use denoised::bundle::{
    self, Bundle, BundleError, BundleFile, BundleWriter, Defaults, Frame, Manifest, TextTokenizer,
};
use denoised::diffusion::{Graph, GraphKind, Schedule, Token};
use denoised::network::NetworkError as RuntimeError;
use denoised::network::onnx;
use difference::{Difference, Probe};
use prost::Message;
use schema::{ModelProto, OperatorSetIdProto};
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokenizers::Tokenizer;

use crate::data::tokenizer::END_OF_DOCUMENT;
use crate::model::state_dict::{StateDict, StateDictError};
use crate::model::{NetworkConfig, NetworkError};

/// Version of the operators in use: the first with `Gelu`.
const OPERATORS: i64 = 20;
/// Version of the operators that ONNX Runtime adds.
const CONTRIBUTED_OPERATORS: i64 = 1;
/// Version of the file format that came with them.
const FILE_FORMAT: i64 = 9;
/// No protobuf message may be larger.
const MAX_BYTES: usize = i32::MAX as usize;

/// A buffer of published checkpoints, which the graph holds as tables of its own.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// Weights of more bytes than this lie in a file beside the network: well before protobuf ends, since a
/// model in one piece is held in memory more than once while it is written and read.
pub const EXTERNAL_ABOVE: u64 = 1 << 30;

/// How weights are kept in the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Storage {
    /// As they are.
    #[default]
    F32,
    /// Matrices as float16, in half the space: three decimal digits, up to 65504. Sums are taken in float32.
    F16,
    /// The matrices of the blocks as 8-bit integers, with a step per output, and multiplied as such; the
    /// embedding as float16; the head, the noise condition and all else as they are. For CPUs.
    Int8,
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        })
    }
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
    #[error("the graph takes {0} bytes, an ONNX file may have {MAX_BYTES} without external data")]
    Size(usize),
    /// Weights cannot be written beside the graph.
    #[error("{file}: {0}", file = bundle::EXTERNAL_DATA)]
    ExternalData(io::Error),
    /// The network cannot be run, to measure what its storage costs.
    #[error(transparent)]
    Run(#[from] RuntimeError),
    /// The bundle cannot be written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// What [`Measure`] says.
    #[error("how good the bundle is cannot be measured: {0}")]
    Measure(String),
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
    encoded(config, weights, storage, None)
}

/// The same, with large tensors in `external`.
fn encoded(
    config: &NetworkConfig,
    weights: &StateDict,
    storage: Storage,
    external: Option<&mut BundleFile>,
) -> Result<Vec<u8>, ExportError> {
    config.validate()?;
    check(config, weights)?;
    let operators = [("", OPERATORS), (graph::CONTRIBUTED, CONTRIBUTED_OPERATORS)];
    let operators = operators.map(|(domain, version)| OperatorSetIdProto {
        domain: Some(domain.to_owned()),
        version: Some(version),
    });
    let model = ModelProto {
        ir_version: Some(FILE_FORMAT),
        opset_import: operators.to_vec(),
        producer_name: Some(env!("CARGO_PKG_NAME").to_owned()),
        producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        graph: Some(ddit::graph(config, weights, storage, external)?),
    };
    match model.encoded_len() {
        0..=MAX_BYTES => Ok(model.encode_to_vec()),
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
    /// The token that ends documents; without, the tokenizer's [`END_OF_DOCUMENT`], where it has one.
    pub end_of_document: Option<Token>,
    /// What trained it, on what, and how well: for people.
    pub provenance: serde_json::Value,
}

/// Says how good a bundle is, as it will be served, for `provenance.validation` of its manifest.
#[derive(Clone, Copy)]
pub struct Measure<'a>(pub &'a dyn Fn(&Bundle) -> Result<serde_json::Value, String>);

impl fmt::Debug for Measure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Measure")
    }
}

/// How to write a bundle.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// How weights are kept.
    pub storage: Storage,
    /// Weights of more bytes than this lie in [`bundle::EXTERNAL_DATA`], beside the graph.
    pub external_above: u64,
    /// How to sample where a request does not say.
    pub defaults: Option<Defaults>,
    /// Clean sequences to measure the cost of the storage on; without, random tokens.
    pub text: &'a [Vec<Token>],
    /// Measures the bundle before anybody sees it.
    pub measure: Option<Measure<'a>>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            storage: Storage::default(),
            external_above: EXTERNAL_ABOVE,
            defaults: None,
            text: &[],
            measure: None,
        }
    }
}

/// Writes the bundle of `model` into `directory`, which must not exist yet, with the default [`Options`].
pub fn bundle(directory: &Path, model: TrainedModel<'_>, storage: Storage) -> Result<Manifest, ExportError> {
    let options = Options {
        storage,
        ..Options::default()
    };
    bundle_with(directory, model, &options)
}

/// Writes the bundle of `model` into `directory`, which must not exist yet.
///
/// `provenance.export` of its manifest holds the storage and, unless that is float32, the
/// [`Difference`] from the float32 graph, both run by ONNX Runtime.
pub fn bundle_with(
    directory: &Path,
    model: TrainedModel<'_>,
    options: &Options<'_>,
) -> Result<Manifest, ExportError> {
    if options.storage != Storage::F32 || options.measure.is_some() {
        // A missing runtime is told before anything is written.
        onnx::runtime()?;
    }
    bundle::refuse_existing(directory)?;
    let mut manifest = manifest(&model)?;
    manifest.defaults = options.defaults;
    manifest
        .check_defaults()
        .map_err(|reason| ExportError::Bundle(BundleError::Manifest(reason)))?;
    let parent = directory.parent().unwrap_or(Path::new(""));
    let mut writer = BundleWriter::new(parent)?;
    write_network(&mut writer, &model, options)?;
    if let Some(json) = model.tokenizer {
        writer.add(bundle::TOKENIZER, json)?;
    }
    let candidate = writer.describe(&mut manifest)?;

    let mut export = json!({"storage": options.storage});
    if options.storage != Storage::F32 {
        let measured = difference_from_float32(parent, &candidate, &model, options)?;
        export["difference_from_f32"] = json!(measured);
    }
    manifest.provenance = with_export(model.provenance, export);
    if let Some(Measure(measure)) = options.measure {
        manifest.provenance["validation"] = measure(&candidate).map_err(ExportError::Measure)?;
    }
    writer.describe(&mut manifest)?;
    writer.commit(directory)?;
    Ok(manifest)
}

/// All that a manifest says but the hashes.
fn manifest(model: &TrainedModel<'_>) -> Result<Manifest, ExportError> {
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
        excluded_tokens: Vec::new(),
        frame: Frame::default(),
        end_of_document: None,
        max_length: config.length,
        time_conditioned: config.time_conditioned,
        two_stage: false,
        defaults: None,
        sha256: BTreeMap::new(),
        provenance: model.provenance.clone(),
    };
    if let Some(json) = model.tokenizer {
        let tokenizer = |error| ExportError::Bundle(BundleError::Tokenizer(error));
        TextTokenizer::from_json(json, &manifest).map_err(tokenizer)?;
        manifest.end_of_document = model.end_of_document.or_else(|| end_of_document(json));
    }
    Ok(manifest)
}

/// The graph, and its weights in a file beside it if they are many.
fn write_network(
    writer: &mut BundleWriter,
    model: &TrainedModel<'_>,
    options: &Options<'_>,
) -> Result<(), ExportError> {
    let (config, weights, storage) = (model.config, model.weights, options.storage);
    let network = if stored_bytes(config, storage) > options.external_above {
        let mut data = writer.create(bundle::EXTERNAL_DATA)?;
        let network = encoded(config, weights, storage, Some(&mut data))?;
        writer.close(data)?;
        network
    } else {
        encoded(config, weights, storage, None)?
    };
    writer.add(bundle::MODEL, &network)?;
    Ok(())
}

/// About how many bytes the weights take, a little more rather than less.
fn stored_bytes(config: &NetworkConfig, storage: Storage) -> u64 {
    let parameters = config.parameters();
    let bytes = parameters.iter().map(|(name, shape)| {
        let entries = shape.iter().product::<usize>() as u64;
        match storage {
            Storage::F16 if shape.len() >= 2 => 2 * entries,
            Storage::Int8 if ddit::is_product(name) => entries,
            Storage::F32 | Storage::F16 | Storage::Int8 => 4 * entries,
        }
    });
    let rotation = 4 * config.length * config.hidden_size / config.heads;
    bytes.sum::<u64>() + rotation as u64
}

/// Runs `candidate` beside the same network in float32, which is written beside it for as long.
fn difference_from_float32(
    parent: &Path,
    candidate: &Bundle,
    model: &TrainedModel<'_>,
    options: &Options<'_>,
) -> Result<Difference, ExportError> {
    let probe = Probe::new(candidate.manifest(), options.text);
    let mut reference = BundleWriter::new(parent)?;
    let options = Options {
        storage: Storage::F32,
        ..*options
    };
    write_network(&mut reference, model, &options)?;
    let reference = reference_network(&reference, candidate.manifest())?;
    let candidate = onnx::OnnxNetwork::load(candidate, &onnx::OnnxOptions::default())?;
    Ok(Difference::measure(reference, candidate, &probe)?)
}

fn reference_network(writer: &BundleWriter, manifest: &Manifest) -> Result<onnx::OnnxNetwork, ExportError> {
    let bundle = writer.describe(&mut manifest.clone())?;
    let network = onnx::OnnxNetwork::load(&bundle, &onnx::OnnxOptions::default())?;
    Ok(network)
}

/// `provenance` with a key `export`.
fn with_export(provenance: Value, export: Value) -> Value {
    let mut keys = if let Value::Object(keys) = provenance {
        keys
    } else {
        Map::from_iter([("source".to_owned(), provenance)])
    };
    keys.insert("export".to_owned(), export);
    Value::Object(keys)
}

/// The token between documents, if the tokenizer has one.
fn end_of_document(tokenizer: &[u8]) -> Option<Token> {
    Tokenizer::from_bytes(tokenizer)
        .ok()?
        .token_to_id(END_OF_DOCUMENT)
}
