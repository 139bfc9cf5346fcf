//! The reference network as an ONNX graph: the twin of [`crate::model::Ddit`].
//!
//! Inputs `tokens` `[batch, length]`, `sigma` `[batch]` (where the network sees it), `positions` `[rows]`; output `log_score`
//! `[rows, states]`. Nothing past the last attention mixes positions, so rows that were not asked for
//! are dropped there: the rest of the last block and the output head run for the asked rows alone.

use std::f64::consts::LN_10;

use denoised::bundle::BundleFile;
use denoised::diffusion::Parameterization;

use super::constant;
use super::graph::{Axis, Builder, Value, float, int, ints, string};
use super::schema::{AttributeProto, DataType, GraphProto};
use super::{ExportError, Storage};
use crate::model::kernels::RotaryAttention;
use crate::model::state_dict::{HostTensor, StateDict, StateDictError};
use crate::model::{EMBEDDING, NOISE_FEATURES, NetworkConfig};

/// What the mask's logit is lowered by, so that its probability is 0 in float32 and float64.
const EXCLUDED: f32 = -1e6;
/// Guards the variance of a layer norm.
const NORM_EPSILON: f32 = 1e-5;

/// The graph of a network whose weights are known to fit `config`, large ones in `external`.
pub(super) fn graph(
    config: &NetworkConfig,
    weights: &StateDict,
    storage: Storage,
    external: Option<&mut BundleFile>,
) -> Result<GraphProto, ExportError> {
    let mut writer = Writer {
        config,
        weights,
        storage,
        graph: Builder::new("ddit", storage, external),
    };
    let log_score = writer.network()?;
    let shape = [Axis::Dynamic("rows"), Axis::Fixed(config.states)];
    let graph = writer
        .graph
        .finish(&log_score, "log_score", DataType::Float, &shape);
    graph.map_err(ExportError::ExternalData)
}

struct Writer<'a> {
    config: &'a NetworkConfig,
    weights: &'a StateDict,
    storage: Storage,
    graph: Builder<'a>,
}

/// Where the rows that were asked for lie.
struct Rows {
    /// Flat index `b * length + i` of each, `[rows]`.
    positions: Value,
    /// Its sequence `b`, `[rows]`.
    sequence: Value,
}

/// What norms and gates are modulated by.
enum Condition {
    /// The noise, `[batch, cond_dim]`.
    Given(Value),
    /// The same for every canvas, `[cond_dim]`.
    Constant(Vec<f64>),
}

/// Cosines and sines by position, `[longest, head width / 2]`.
struct Rotation {
    /// The position that a sequence begins at: 0, `[1]`.
    first: Value,
    cosine: Value,
    sine: Value,
}

impl<'a> Writer<'a> {
    fn network(&mut self) -> Result<Value, ExportError> {
        let [batch, length, rows] = ["batch", "length", "rows"].map(Axis::Dynamic);
        let tokens = self.graph.input("tokens", DataType::Int64, &[batch, length]);
        let sigma = self
            .config
            .time_conditioned
            .then(|| self.graph.input("sigma", DataType::Float, &[batch]));
        let positions = self.graph.input("positions", DataType::Int64, &[rows]);

        let length = self
            .graph
            .node("Shape", &[&tokens], vec![int("start", 1), int("end", 2)]); // [1]
        let sequence = self.graph.node("Div", &[&positions, &length], vec![]);
        let rows = Rows { positions, sequence };
        let rotation = self.rotation();
        self.graph.scope("sigma_map.");
        let condition = match &sigma {
            Some(sigma) => Condition::Given(self.condition(sigma)?), // [batch, cond_dim]
            None => Condition::Constant(constant::condition(self.weights)?),
        };

        self.graph.scope("vocab_embed.");
        let (mut x, embedding) = self.embed(&tokens)?; // [batch, length, width]
        for block in 0..self.config.blocks {
            let rows = (block + 1 == self.config.blocks).then_some(&rows);
            x = self.block(block, &x, &condition, &rotation, rows)?;
        }

        self.graph.scope("output_layer.");
        let modulation = self.modulation(&condition, "output_layer.adaLN_modulation")?; // [batch, 2 width]
        let modulation = self.spread(&modulation, Some(&rows));
        let [shift, scale] = self.graph.nodes("Split", &[&modulation], halves());
        let x = self.modulated_norm(&x, "output_layer.norm_final.weight", &shift, &scale)?;
        let output = self.head(&x, embedding.as_ref())?;
        Ok(match self.config.parameterization {
            Parameterization::Score => output,
            Parameterization::Mean => self.log_probabilities(&output),
        })
    }

    /// Rows of the embedding, `[batch, length, width]`, and the whole of it where the head shares it.
    fn embed(&mut self, tokens: &Value) -> Result<(Value, Option<Value>), ExportError> {
        // In whole numbers the head has a matrix of its own.
        if self.config.tie_embeddings && self.storage != Storage::Int8 {
            let embedding = self.weight(EMBEDDING)?;
            let x = self.graph.node("Gather", &[&embedding, tokens], vec![]);
            return Ok((x, Some(embedding)));
        }
        let tensor = self.tensor(EMBEDDING)?;
        let x = match self.storage {
            Storage::F32 => {
                let embedding = self.graph.weight(EMBEDDING, &tensor.shape, &tensor.data)?;
                self.graph.node("Gather", &[&embedding, tokens], vec![])
            }
            // Converted after the look-up: the table stays small in memory, too.
            Storage::F16 | Storage::Int8 => {
                let embedding = self.graph.half_weight(EMBEDDING, &tensor.shape, &tensor.data)?;
                let x = self.graph.node("Gather", &[&embedding, tokens], vec![]);
                self.graph.float_of(&x)
            }
        };
        Ok((x, None))
    }

    /// The linear layer at the end: `[rows, width]` to `[rows, states]`.
    fn head(&mut self, x: &Value, embedding: Option<&Value>) -> Result<Value, ExportError> {
        let y = match embedding {
            Some(embedding) => {
                let weight = self
                    .graph
                    .node("Transpose", &[embedding], vec![ints("perm", &[1, 0])]);
                self.graph.node("MatMul", &[x, &weight], vec![])
            }
            None if self.config.tie_embeddings => self.quantized_product(x, EMBEDDING)?,
            None => self.product(x, "output_layer.linear")?,
        };
        self.biased(&y, "output_layer.linear")
    }

    /// Logits to log-probabilities of the clean token, which is never the mask.
    fn log_probabilities(&mut self, logits: &Value) -> Value {
        let states = self.config.states;
        let mut excluded = vec![0.0; states];
        if let Some(mask) = excluded.last_mut() {
            *mask = EXCLUDED;
        }
        let excluded = self.graph.floats("output_layer.excluded", &[states], &excluded);
        let logits = self.graph.node("Add", &[logits, &excluded], vec![]);
        self.graph.node("LogSoftmax", &[&logits], vec![int("axis", -1)])
    }

    /// Noise features through their MLP, after SiLU: `[batch, cond_dim]`.
    fn condition(&mut self, sigma: &Value) -> Result<Value, ExportError> {
        let half = NOISE_FEATURES / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|k| (-4.0 * LN_10 * k as f64 / half as f64).exp() as f32)
            .collect();
        let frequencies = self.graph.floats("sigma_map.frequencies", &[half], &frequencies);
        let last = self.graph.ints(&[1]);
        let sigma = self.graph.node("Unsqueeze", &[sigma, &last], vec![]);
        let angles = self.graph.node("Mul", &[&sigma, &frequencies], vec![]); // [batch, half]
        let cosines = self.graph.node("Cos", &[&angles], vec![]);
        let sines = self.graph.node("Sin", &[&angles], vec![]);
        let features = self
            .graph
            .node("Concat", &[&cosines, &sines], vec![int("axis", 1)]);
        let hidden = self.affine(&features, "sigma_map.mlp.0")?;
        let hidden = self.silu(&hidden);
        let condition = self.affine(&hidden, "sigma_map.mlp.2")?;
        Ok(self.silu(&condition))
    }

    /// What the condition makes of a layer's norms and gates: `[batch, n]`. Of a constant condition one row, in
    /// place of the matrix that it comes from.
    fn modulation(&mut self, condition: &Condition, layer: &str) -> Result<Value, ExportError> {
        match condition {
            Condition::Given(condition) => self.affine(condition, layer),
            Condition::Constant(condition) => {
                let row = constant::affine(self.weights, condition, layer)?;
                let row: Vec<f32> = row.into_iter().map(|x| x as f32).collect();
                Ok(self.graph.floats(layer, &[1, row.len()], &row))
            }
        }
    }

    fn rotation(&mut self) -> Rotation {
        let head_width = self.config.hidden_size / self.config.heads;
        let table = RotaryAttention::rotation(self.config.length, head_width);
        let shape = [self.config.length, head_width / 2];
        let [cosine, sine] = [(0, "rotary_emb.cosine"), (1, "rotary_emb.sine")].map(|(part, name)| {
            let part: Vec<f32> = table.iter().map(|entry| entry[part]).collect();
            self.graph.floats(name, &shape, &part)
        });
        let first = self.graph.ints(&[0]);
        Rotation { first, cosine, sine }
    }

    /// One block over `x` `[batch, length, width]`; with `rows`, only these come out: `[rows, width]`.
    fn block(
        &mut self,
        index: usize,
        x: &Value,
        condition: &Condition,
        rotation: &Rotation,
        rows: Option<&Rows>,
    ) -> Result<Value, ExportError> {
        let width = self.config.hidden_size as i64;
        let name = |part: &str| format!("blocks.{index}.{part}");
        self.graph.scope(name(""));

        let modulation = self.modulation(condition, &name("adaLN_modulation"))?; // [batch, 6 width]
        let parts = self.graph.ints(&[2 * width, 4 * width]);
        let [before, after] = self
            .graph
            .nodes("Split", &[&modulation, &parts], vec![int("axis", -1)]);
        let [before, after] = [self.spread(&before, None), self.spread(&after, rows)];
        let [shift_attention, scale_attention] = self.graph.nodes("Split", &[&before], halves());
        let [gate_attention, shift_mlp, scale_mlp, gate_mlp] =
            self.graph
                .nodes("Split", &[&after], vec![int("axis", -1), int("num_outputs", 4)]);

        let y = self.modulated_norm(x, &name("norm1.weight"), &shift_attention, &scale_attention)?;
        let qkv = self.product(&y, &name("attn_qkv"))?; // [batch, length, 3 width]
        let y = self.attention(&qkv, rotation);
        let [x, y] = [x, &y].map(|x| rows.map_or_else(|| x.clone(), |rows| self.take(x, rows)));
        let y = self.product(&y, &name("attn_out"))?;
        let x = self.gated_residual(&x, &y, &gate_attention);

        let y = self.modulated_norm(&x, &name("norm2.weight"), &shift_mlp, &scale_mlp)?;
        let y = self.product(&y, &name("mlp.0"))?;
        let y = self.biased(&y, &name("mlp.0"))?; // [.., 4 width]
        let y = self
            .graph
            .node("Gelu", &[&y], vec![string("approximate", "tanh")]);
        let y = self.product(&y, &name("mlp.2"))?;
        let y = self.biased(&y, &name("mlp.2"))?;
        Ok(self.gated_residual(&x, &y, &gate_mlp))
    }

    /// Attention among all positions of a sequence: `[batch, length, 3 width]` to `[.., width]`.
    ///
    /// As one operator, ONNX Runtime takes the scores of some positions at a time; no
    /// `[batch, heads, length, length]` stays in memory.
    fn attention(&mut self, qkv: &Value, rotation: &Rotation) -> Value {
        let split = vec![int("axis", -1), int("num_outputs", 3)];
        let [queries, keys, values] = self.graph.nodes("Split", &[qkv], split);
        let [queries, keys] = [queries, keys].map(|x| self.rotate(&x, rotation));
        let heads = vec![int("num_heads", self.config.heads as i64)];
        self.graph
            .contributed("MultiHeadAttention", &[&queries, &keys, &values], heads)
    }

    /// Turns the pairs (k, k + half) of each head of `x` `[batch, length, width]` by their position.
    fn rotate(&mut self, x: &Value, rotation: &Rotation) -> Value {
        let Rotation { first, cosine, sine } = rotation;
        let heads = vec![int("num_heads", self.config.heads as i64)];
        self.graph
            .contributed("RotaryEmbedding", &[x, first, cosine, sine], heads)
    }

    /// The asked rows of `x` `[batch, length, width]`: `[rows, width]`.
    fn take(&mut self, x: &Value, rows: &Rows) -> Value {
        let shape = self.graph.ints(&[-1, self.config.hidden_size as i64]);
        let x = self.graph.node("Reshape", &[x, &shape], vec![]);
        self.graph.node("Gather", &[&x, &rows.positions], vec![])
    }

    /// Something of each sequence, `[batch, n]`, for each of its positions: `[batch, 1, n]`, or of the
    /// asked rows: `[rows, n]`. Without time, sequences share one row, which stretches over all.
    fn spread(&mut self, x: &Value, rows: Option<&Rows>) -> Value {
        if let Some(rows) = rows {
            if !self.config.time_conditioned {
                return x.clone();
            }
            return self.graph.node("Gather", &[x, &rows.sequence], vec![]);
        }
        let middle = self.graph.ints(&[1]);
        self.graph.node("Unsqueeze", &[x, &middle], vec![])
    }

    /// `norm(x) (1 + scale) + shift`.
    fn modulated_norm(
        &mut self,
        x: &Value,
        weight: &str,
        shift: &Value,
        scale: &Value,
    ) -> Result<Value, ExportError> {
        let weight = self.weight(weight)?;
        let settings = vec![int("axis", -1), float("epsilon", NORM_EPSILON)];
        let x = self.graph.node("LayerNormalization", &[x, &weight], settings);
        let one = self.graph.float(1.0);
        let scale = self.graph.node("Add", &[scale, &one], vec![]);
        let x = self.graph.node("Mul", &[&x, &scale], vec![]);
        Ok(self.graph.node("Add", &[&x, shift], vec![]))
    }

    /// `x + gate y`.
    fn gated_residual(&mut self, x: &Value, y: &Value, gate: &Value) -> Value {
        let y = self.graph.node("Mul", &[y, gate], vec![]);
        self.graph.node("Add", &[x, &y], vec![])
    }

    fn silu(&mut self, x: &Value) -> Value {
        let gate = self.graph.node("Sigmoid", &[x], vec![]);
        self.graph.node("Mul", &[x, &gate], vec![])
    }

    /// `x W + b`, with the layer's weight and bias.
    fn affine(&mut self, x: &Value, layer: &str) -> Result<Value, ExportError> {
        let y = self.linear(x, layer)?;
        self.biased(&y, layer)
    }

    /// `x + b`, with the layer's bias.
    fn biased(&mut self, x: &Value, layer: &str) -> Result<Value, ExportError> {
        let bias = self.weight(&format!("{layer}.bias"))?;
        Ok(self.graph.node("Add", &[x, &bias], vec![]))
    }

    /// `x W` with a weight of a block or of the head, where nearly all time goes: in whole numbers if the storage is.
    fn product(&mut self, x: &Value, layer: &str) -> Result<Value, ExportError> {
        let name = format!("{layer}.weight");
        if self.storage != Storage::Int8 {
            return self.linear(x, layer);
        }
        debug_assert!(is_product(&name), "{name}");
        self.quantized_product(x, &name)
    }

    /// `x W` in whole numbers, with a weight that the reference keeps as `[out, in]`.
    fn quantized_product(&mut self, x: &Value, name: &str) -> Result<Value, ExportError> {
        let weight = self.tensor(name)?.transposed();
        self.graph.quantized_product(x, name, &weight.shape, &weight.data)
    }

    /// `x W`, with the layer's weight, which the reference keeps as `[out, in]`.
    fn linear(&mut self, x: &Value, layer: &str) -> Result<Value, ExportError> {
        let name = format!("{layer}.weight");
        let weight = self.tensor(&name)?.transposed();
        let weight = self.graph.weight(&name, &weight.shape, &weight.data)?;
        Ok(self.graph.node("MatMul", &[x, &weight], vec![]))
    }

    fn weight(&mut self, name: &str) -> Result<Value, ExportError> {
        let tensor = self.tensor(name)?;
        self.graph.weight(name, &tensor.shape, &tensor.data)
    }

    fn tensor(&self, name: &str) -> Result<&'a HostTensor, StateDictError> {
        let missing = || StateDictError::Missing {
            name: name.to_owned(),
            expected: Vec::new(),
        };
        self.weights.get(name).ok_or_else(missing)
    }
}

/// Whether `name` is a matrix that [`Storage::Int8`] keeps as integers: those whose products take nearly
/// all of the time. The modulation has one row per sequence and decides how much each branch counts.
pub(super) fn is_product(name: &str) -> bool {
    let products = ["attn_qkv", "attn_out", "mlp.0", "mlp.2"];
    let is_of_block = name.starts_with("blocks.")
        && products
            .iter()
            .any(|part| name.ends_with(&format!("{part}.weight")));
    is_of_block || name == "output_layer.linear.weight"
}

/// Splits the last axis in two.
fn halves() -> Vec<AttributeProto> {
    vec![int("axis", -1), int("num_outputs", 2)]
}
