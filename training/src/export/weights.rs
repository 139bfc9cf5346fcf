//! The weights of a bundle that was exported here: the way back, to train on from what is served.
//!
//! A graph names its weights as the reference does, with matrices of products transposed. What it makes of them is
//! folded in places: a network that does not see the noise has one row in place of each modulation's matrix, which comes
//! back as the bias of a matrix of zeros, behind a noise condition of zeros. That is the same function, and what it can
//! learn is the same.

use std::collections::BTreeMap;
use std::path::Path;

use denoised::bundle::{Bundle, BundleError, Manifest, ModelBytes, TOKENIZER};
use half::f16;
use prost::Message;
use thiserror::Error;

use super::constant;
use super::schema::{DataType, GraphProto, ModelProto, TensorProto};
use crate::model::state_dict::{HostTensor, StateDict};
use crate::model::{EMBEDDING, NOISE_FEATURES, NetworkConfig, OUTPUT_WEIGHT};

/// A network as it was exported.
#[derive(Debug, Clone)]
pub struct Exported {
    /// Its shape.
    pub network: NetworkConfig,
    /// Its weights; of matrices that were stored as float16, what float16 kept.
    pub weights: StateDict,
    /// sha256 of its `tokenizer.json`, where it has one.
    pub tokenizer_sha256: Option<String>,
}

/// Why a bundle's weights cannot be had.
#[derive(Debug, Error)]
pub enum ExportedError {
    /// It is damaged.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Its network is no ONNX file.
    #[error("model.onnx: {0}")]
    Onnx(#[from] prost::DecodeError),
    /// Another program, or another version of this one, made its graph.
    #[error("its graph was not written by `training export`: {0}")]
    Foreign(String),
    /// Its matrices are no longer there.
    #[error(
        "it holds whole numbers in place of its weights: export it with another --storage, or begin with its run"
    )]
    Int8,
}

/// The network and weights of the bundle in `directory`. Where it does not see the noise, `cond_dim` is the width of
/// the noise condition that it is given back.
///
/// # Errors
/// [`ExportedError`], also where the bundle is of a network from elsewhere.
pub fn read(directory: &Path, cond_dim: usize) -> Result<Exported, ExportedError> {
    let bundle = Bundle::open(directory)?;
    let bytes = bundle.model()?;
    let graph = ModelProto::decode(bytes.model.as_ref())?
        .graph
        .unwrap_or_default();
    let mut found = tensors(&graph, &bytes)?;
    let network = shape(bundle.manifest(), &graph, &found, cond_dim)?;
    if !network.time_conditioned {
        unfold(&mut found, &network);
    }
    let parameters = network.parameters();
    found.retain(|name, _| parameters.iter().any(|(known, _)| known == name));
    let weights = StateDict(found);
    let misfits = weights.misfits(&parameters);
    if !misfits.0.is_empty() {
        return Err(ExportedError::Foreign(misfits.to_string()));
    }
    Ok(Exported {
        network,
        weights,
        tokenizer_sha256: bundle.manifest().sha256.get(TOKENIZER).cloned(),
    })
}

/// The stored tensors of numbers by the names that the reference has for them, as it keeps them.
fn tensors(graph: &GraphProto, bytes: &ModelBytes) -> Result<BTreeMap<String, HostTensor>, ExportedError> {
    let mut found = BTreeMap::new();
    for tensor in &graph.initializer {
        let name = tensor.name();
        let read = |entry: usize, of: fn(&[u8]) -> f32| -> Result<Vec<f32>, ExportedError> {
            let data = data(tensor, bytes)
                .ok_or_else(|| ExportedError::Foreign(format!("tensor {name} has no data")))?;
            Ok(data.chunks_exact(entry).map(of).collect())
        };
        let single = |bytes: &[u8]| bytes.try_into().map_or(f32::NAN, f32::from_le_bytes);
        let half = |bytes: &[u8]| {
            bytes
                .try_into()
                .map_or(f32::NAN, |half| f16::from_le_bytes(half).to_f32())
        };
        let (name, data) = match tensor.data_type() {
            DataType::Float => (name, read(4, single)?),
            DataType::Float16 => (name.trim_end_matches(".f16"), read(2, half)?),
            DataType::Int8 => return Err(ExportedError::Int8),
            DataType::Undefined | DataType::Uint8 | DataType::Int64 => continue,
        };
        let shape: Vec<usize> = tensor.dims.iter().map(|&length| length as usize).collect();
        if shape.iter().product::<usize>() != data.len() {
            return Err(ExportedError::Foreign(format!(
                "tensor {name} has {} entries",
                data.len()
            )));
        }
        let tensor = HostTensor { shape, data };
        let is_product = name.ends_with(".weight");
        let tensor = if is_product { tensor.transposed() } else { tensor };
        found.insert(name.to_owned(), tensor);
    }
    Ok(found)
}

/// The bytes of a tensor, in the graph or in the file beside it.
fn data<'a>(tensor: &'a TensorProto, bytes: &'a ModelBytes) -> Option<&'a [u8]> {
    if tensor.external_data.is_empty() {
        return tensor.raw_data.as_deref();
    }
    let property = |key: &str| {
        let mut properties = tensor.external_data.iter();
        properties
            .find(|property| property.key() == key)?
            .value
            .as_deref()
    };
    let (_, file) = bytes
        .external
        .iter()
        .find(|(name, _)| Some(name.as_str()) == property("location"))?;
    let (offset, length): (usize, usize) = (
        property("offset")?.parse().ok()?,
        property("length")?.parse().ok()?,
    );
    file.get(offset..offset.checked_add(length)?)
}

/// The shape of a network with these tensors.
fn shape(
    manifest: &Manifest,
    graph: &GraphProto,
    found: &BTreeMap<String, HostTensor>,
    cond_dim: usize,
) -> Result<NetworkConfig, ExportedError> {
    let foreign = |what: &str| ExportedError::Foreign(format!("it has no {what}"));
    let embedding = found.get(EMBEDDING).ok_or_else(|| foreign(EMBEDDING))?;
    let heads = graph
        .node
        .iter()
        .find(|node| node.op_type() == "MultiHeadAttention")
        .and_then(|node| {
            node.attribute
                .iter()
                .find(|attribute| attribute.name() == "num_heads")
        })
        .and_then(|attribute| attribute.i)
        .ok_or_else(|| foreign("attention"))?;
    let condition = found.get("sigma_map.mlp.0.bias");
    Ok(NetworkConfig {
        states: manifest.vocab_size,
        length: manifest.max_length,
        hidden_size: embedding.shape.last().copied().unwrap_or_default(),
        cond_dim: condition.map_or(cond_dim, |bias| bias.data.len()),
        blocks: (0..graph.initializer.len())
            .take_while(|block| found.contains_key(&format!("blocks.{block}.norm1.weight")))
            .count(),
        heads: heads as usize,
        dropout: 0.0,
        scale_by_sigma: manifest.sigma_offset,
        parameterization: manifest.parameterization,
        time_conditioned: manifest.time_conditioned,
        tie_embeddings: !found.contains_key(OUTPUT_WEIGHT),
    })
}

/// Gives every modulation its bias and a matrix of zeros in place of its row, and the condition zeros.
fn unfold(found: &mut BTreeMap<String, HostTensor>, network: &NetworkConfig) {
    let zeros = |shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        data: vec![0.0; shape.iter().product()],
    };
    let cond_dim = network.cond_dim;
    for (layer, inputs) in [("sigma_map.mlp.0", NOISE_FEATURES), ("sigma_map.mlp.2", cond_dim)] {
        found.insert(format!("{layer}.weight"), zeros(&[cond_dim, inputs]));
        found.insert(format!("{layer}.bias"), zeros(&[cond_dim]));
    }
    for layer in constant::modulations(network) {
        if let Some(row) = found.remove(&layer) {
            let outputs = row.data.len();
            found.insert(format!("{layer}.weight"), zeros(&[outputs, cond_dim]));
            found.insert(
                format!("{layer}.bias"),
                HostTensor {
                    shape: vec![outputs],
                    data: row.data,
                },
            );
        }
    }
}
