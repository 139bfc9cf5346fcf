//! Bidirectional softmax attention with rotary positions, from packed queries, keys and values.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;

use super::{Kernel, entries, exp, sum, tensor, vectorised};

/// `[batch * length, 3 * width]`, packed (q, k, v) x heads x head width, to `[batch * length, width]`.
#[derive(Debug, Clone)]
pub struct RotaryAttention {
    /// Positions per sequence.
    pub length: usize,
    /// Attention heads.
    pub heads: usize,
    /// Cosine and sine of each position's angles, `[length, head width / 2]`.
    pub rotation: Arc<[[f32; 2]]>,
}

impl RotaryAttention {
    /// Angles `position / 10000^(2 k / head width)`.
    pub fn rotation(length: usize, head_width: usize) -> Arc<[[f32; 2]]> {
        let half = head_width / 2;
        (0..length)
            .flat_map(|position| {
                (0..half).map(move |k| {
                    let frequency = 1.0 / 10_000_f32.powf((2 * k) as f32 / head_width as f32);
                    let (sine, cosine) = (position as f32 * frequency).sin_cos();
                    [cosine, sine]
                })
            })
            .collect()
    }

    /// Calls `visit(offset in the packed row, offset in [batch, heads, length, head width], rotation)`
    /// for every batch row, position and head.
    fn heads_of(&self, rows: usize, head_width: usize, mut visit: impl FnMut(usize, usize, &[[f32; 2]])) {
        let (length, heads, half) = (self.length, self.heads, head_width / 2);
        for row in 0..rows {
            let (sequence, position) = (row / length, row % length);
            for head in 0..heads {
                let packed = row * 3 * heads * head_width + head * head_width;
                let split = ((sequence * heads + head) * length + position) * head_width;
                visit(packed, split, &self.rotation[position * half..][..half]);
            }
        }
    }
}

/// What the gradient of [`RotaryAttention`] needs: rotated queries (scaled) and keys, values and
/// attention weights, each `[batch, heads, length, ..]`.
#[derive(Debug, Clone)]
pub struct SavedAttention {
    queries: FlexTensor,
    keys: FlexTensor,
    values: FlexTensor,
    weights: FlexTensor,
}

/// `a b^T` over the last two axes.
fn times_transposed(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    Flex::float_matmul(a, Flex::float_swap_dims(b, 2, 3))
}

/// `a^T b` over the last two axes.
fn transposed_times(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    Flex::float_matmul(Flex::float_swap_dims(a, 2, 3), b)
}

impl Kernel<1> for RotaryAttention {
    type Saved = SavedAttention;

    fn forward(&self, [packed]: [FlexTensor; 1]) -> (FlexTensor, SavedAttention) {
        let [rows, width] = [packed.layout().shape()[0], packed.layout().shape()[1] / 3];
        let (batch, head_width) = (rows / self.length, width / self.heads);
        let half = head_width / 2;
        let scale = 1.0 / (head_width as f32).sqrt();
        let source = entries(&packed);
        let mut queries = vec![0.0; rows * width];
        let mut keys = vec![0.0; rows * width];
        let mut values = vec![0.0; rows * width];
        vectorised(|| {
            self.heads_of(rows, head_width, |packed, split, rotation| {
                for (part, target, scale) in [(0, &mut queries, scale), (1, &mut keys, 1.0)] {
                    let (first, second) = source[packed + part * width..][..head_width].split_at(half);
                    let (a, b) = target[split..][..head_width].split_at_mut(half);
                    for (i, [cosine, sine]) in rotation.iter().enumerate() {
                        a[i] = scale * (first[i] * cosine - second[i] * sine);
                        b[i] = scale * (second[i] * cosine + first[i] * sine);
                    }
                }
                values[split..][..head_width].copy_from_slice(&source[packed + 2 * width..][..head_width]);
            });
        });
        let shape = [batch, self.heads, self.length, head_width];
        let [queries, keys, values] = [queries, keys, values].map(|part| tensor(part, shape));

        let mut weights = times_transposed(queries.clone(), keys.clone());
        let scores = weights.storage_mut::<f32>();
        vectorised(|| {
            for row in scores.chunks_exact_mut(self.length) {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                for score in row.iter_mut() {
                    *score = exp(*score - largest);
                }
                let total = 1.0 / sum(row.len(), |i| row[i]);
                for weight in row.iter_mut() {
                    *weight *= total;
                }
            }
        });

        let mixed = Flex::float_matmul(weights.clone(), values.clone());
        let source = entries(&mixed);
        let mut output = vec![0.0; rows * width];
        self.heads_of(rows, head_width, |packed, split, _| {
            let row = packed / (3 * width);
            let column = packed % (3 * width);
            output[row * width + column..][..head_width].copy_from_slice(&source[split..][..head_width]);
        });
        (
            tensor(output, [rows, width]),
            SavedAttention {
                queries,
                keys,
                values,
                weights,
            },
        )
    }

    fn backward(&self, saved: SavedAttention, gradient: FlexTensor) -> [FlexTensor; 1] {
        let gradient = gradient.to_contiguous();
        let SavedAttention {
            queries,
            keys,
            values,
            weights,
        } = saved;
        let [rows, width] = [gradient.layout().shape()[0], gradient.layout().shape()[1]];
        let (batch, head_width) = (rows / self.length, width / self.heads);
        let half = head_width / 2;
        let scale = 1.0 / (head_width as f32).sqrt();

        let source = entries(&gradient);
        let mut upstream = vec![0.0; rows * width];
        self.heads_of(rows, head_width, |packed, split, _| {
            let row = packed / (3 * width);
            let column = packed % (3 * width);
            upstream[split..][..head_width].copy_from_slice(&source[row * width + column..][..head_width]);
        });
        let upstream = tensor(upstream, [batch, self.heads, self.length, head_width]);

        let by_values = transposed_times(weights.clone(), upstream.clone());
        let mut by_scores = times_transposed(upstream, values);
        let targets = by_scores.storage_mut::<f32>();
        vectorised(|| {
            let rows = targets
                .chunks_exact_mut(self.length)
                .zip(entries(&weights).chunks_exact(self.length));
            for (by, weights) in rows {
                let mean = sum(by.len(), |i| by[i] * weights[i]);
                for (by, weight) in by.iter_mut().zip(weights) {
                    *by = weight * (*by - mean);
                }
            }
        });
        let by_keys = transposed_times(by_scores.clone(), queries);
        let by_queries = Flex::float_matmul(by_scores, keys);

        let (by_queries, by_keys, by_values) = (entries(&by_queries), entries(&by_keys), entries(&by_values));
        let mut output = vec![0.0; rows * 3 * width];
        vectorised(|| {
            self.heads_of(rows, head_width, |packed, split, rotation| {
                for (part, source, scale) in [(0, by_queries, scale), (1, by_keys, 1.0)] {
                    let (a, b) = source[split..][..head_width].split_at(half);
                    let (first, second) = output[packed + part * width..][..head_width].split_at_mut(half);
                    for (i, [cosine, sine]) in rotation.iter().enumerate() {
                        first[i] = scale * (a[i] * cosine + b[i] * sine);
                        second[i] = scale * (b[i] * cosine - a[i] * sine);
                    }
                }
                output[packed + 2 * width..][..head_width].copy_from_slice(&by_values[split..][..head_width]);
            });
        });
        [tensor(output, [rows, 3 * width])]
    }
}
