//! Layer norm with a weight, then the modulation of a noise condition.

use burn::backend::flex::FlexTensor;

use super::{Kernel, entries, sum, tensor, vectorised};

/// `norm(x) * weight * (1 + scale) + shift`: `x: [batch * length, width]`, `weight: [width]`,
/// `shift`, `scale`: `[batch, width]`.
#[derive(Debug, Clone, Copy)]
pub struct ModulatedNorm;

/// Added to the variance, as in the reference network.
pub(super) const EPSILON: f32 = 1e-5;

/// What the gradient of [`ModulatedNorm`] needs.
#[derive(Debug, Clone)]
pub struct SavedNorm {
    x: FlexTensor,
    weight: FlexTensor,
    scale: FlexTensor,
    /// Mean and inverse deviation of each row.
    moments: Vec<[f32; 2]>,
}

impl Kernel<4> for ModulatedNorm {
    type Saved = SavedNorm;

    fn forward(&self, [x, weight, shift, scale]: [FlexTensor; 4]) -> (FlexTensor, SavedNorm) {
        let (values, weights) = (entries(&x), entries(&weight));
        let (shifts, scales) = (entries(&shift), entries(&scale));
        let width = weights.len();
        let length = values.len() / shifts.len();
        let mut output = vec![0.0; values.len()];
        let mut moments = vec![[0.0; 2]; values.len() / width];
        vectorised(|| {
            let rows = values
                .chunks_exact(width)
                .zip(output.chunks_exact_mut(width))
                .zip(&mut moments);
            for (index, ((row, output), moments)) in rows.enumerate() {
                let shift = &shifts[index / length * width..][..width];
                let scale = &scales[index / length * width..][..width];
                let mean = sum(width, |i| row[i]) / width as f32;
                let variance = sum(width, |i| (row[i] - mean) * (row[i] - mean)) / width as f32;
                let inverse = 1.0 / (variance + EPSILON).sqrt();
                *moments = [mean, inverse];
                for i in 0..width {
                    output[i] = (row[i] - mean) * inverse * weights[i] * (1.0 + scale[i]) + shift[i];
                }
            }
        });
        let output = tensor(output, [values.len() / width, width]);
        (
            output,
            SavedNorm {
                x,
                weight,
                scale,
                moments,
            },
        )
    }

    fn backward(&self, saved: SavedNorm, gradient: FlexTensor) -> [FlexTensor; 4] {
        let gradient = gradient.to_contiguous();
        let (values, weights, upstream) = (entries(&saved.x), entries(&saved.weight), entries(&gradient));
        let scales = entries(&saved.scale);
        let width = weights.len();
        let length = values.len() / scales.len();
        let mut by_x = vec![0.0; values.len()];
        let mut by_weight = vec![0.0; width];
        let mut by_shift = vec![0.0; scales.len()];
        let mut by_scale = vec![0.0; scales.len()];
        // Per sequence: sum over its rows of gradient * normalised value, from which follow the
        // gradients by weight and by scale.
        let mut products = vec![0.0; width];
        let mut factors = vec![0.0; width];
        let block = length * width;
        vectorised(|| {
            for (sequence, by_x) in by_x.chunks_exact_mut(block).enumerate() {
                let columns = sequence * width..(sequence + 1) * width;
                let (scale, by_shift) = (&scales[columns.clone()], &mut by_shift[columns.clone()]);
                products.fill(0.0);
                for i in 0..width {
                    factors[i] = weights[i] * (1.0 + scale[i]);
                }
                let rows = values[sequence * block..][..block].chunks_exact(width);
                let upstream = upstream[sequence * block..][..block].chunks_exact(width);
                let moments = &saved.moments[sequence * length..][..length];
                for (((row, upstream), by_x), &[mean, inverse]) in
                    rows.zip(upstream).zip(by_x.chunks_exact_mut(width)).zip(moments)
                {
                    let (factors, products) = (&factors[..width], &mut products[..width]);
                    for i in 0..width {
                        products[i] += upstream[i] * (row[i] - mean) * inverse;
                        by_shift[i] += upstream[i];
                    }
                    let first = sum(width, |i| upstream[i] * factors[i]) / width as f32;
                    let second =
                        sum(width, |i| upstream[i] * factors[i] * (row[i] - mean)) * inverse / width as f32;
                    for i in 0..width {
                        let normalised = (row[i] - mean) * inverse;
                        by_x[i] = inverse * (upstream[i] * factors[i] - first - normalised * second);
                    }
                }
                let by_scale = &mut by_scale[columns];
                for i in 0..width {
                    by_weight[i] += products[i] * (1.0 + scale[i]);
                    by_scale[i] = products[i] * weights[i];
                }
            }
        });
        let batch = scales.len() / width;
        [
            tensor(by_x, [values.len() / width, width]),
            tensor(by_weight, [width]),
            tensor(by_shift, [batch, width]),
            tensor(by_scale, [batch, width]),
        ]
    }
}
