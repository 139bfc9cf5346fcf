//! The same operations out of Burn's own, for devices that the kernels do not run on.
//!
//! Gradients are Burn's, values and gradients are held to the kernels' by the tests below.

use burn::Tensor;
use burn::tensor::activation::{gelu_approximate, log_softmax, softmax};
use burn::tensor::{Bool, Device, Int, TensorData};

use super::{CrossEntropyTerm, RotaryAttention, RowTerm};
use crate::model::precision::Precision;

/// Stands for minus infinity where infinities would turn gradients into NaN.
const LOWEST: f32 = -1e30;

pub(super) fn gelu(x: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    gelu_approximate(x + bias.unsqueeze::<2>())
}

/// `[batch, width]` for every one of `rows` rows, sequence after sequence.
fn repeated(x: Tensor<2>, rows: usize) -> Tensor<2> {
    let [batch, width] = x.dims();
    x.unsqueeze_dim::<3>(1)
        .expand([batch, rows / batch, width])
        .reshape([rows, width])
}

pub(super) fn gated_residual(x: Tensor<2>, y: Tensor<2>, gate: Tensor<2>) -> Tensor<2> {
    let [rows, _] = x.dims();
    x + y * repeated(gate, rows)
}

pub(super) fn modulated_norm(
    x: Tensor<2>,
    weight: Tensor<1>,
    shift: Tensor<2>,
    scale: Tensor<2>,
) -> Tensor<2> {
    let [rows, _] = x.dims();
    let centred = x.clone() - x.mean_dim(1);
    let variance = centred.clone().square().mean_dim(1);
    let normalised = centred / (variance + super::norm::EPSILON).sqrt() * weight.unsqueeze::<2>();
    normalised * (repeated(scale, rows) + 1.0) + repeated(shift, rows)
}

pub(super) fn rotary_attention(
    attention: &RotaryAttention,
    precision: Precision,
    packed: &Tensor<2>,
) -> Tensor<2> {
    let [rows, width] = packed.dims();
    let (length, heads, width) = (attention.length, attention.heads, width / 3);
    let (batch, head_width) = (rows / length, width / heads);
    let device = packed.device();
    let table = |pick: fn(&[f32; 2]) -> f32| {
        let half: Vec<f32> = attention.rotation.iter().map(pick).collect();
        let half = Tensor::<4>::from_data(
            TensorData::new(half, [1, 1, length, head_width / 2]),
            &device.clone().inner(),
        );
        let whole = Tensor::cat(vec![half.clone(), half], 3);
        if device.is_autodiff() {
            Tensor::from_inner(whole)
        } else {
            whole
        }
    };
    let (cosine, sine) = (table(|[cosine, _]| *cosine), table(|[_, sine]| *sine));
    let part = |index: usize| -> Tensor<4> {
        packed
            .clone()
            .narrow(1, index * width, width)
            .reshape([batch, length, heads, head_width])
            .swap_dims(1, 2)
    };
    let rotated = |x: Tensor<4>| {
        let [first, second] = [0, 1].map(|i| x.clone().narrow(3, i * head_width / 2, head_width / 2));
        let turned = Tensor::cat(vec![second.neg(), first], 3);
        x * cosine.clone() + turned * sine.clone()
    };
    let scale = 1.0 / (head_width as f64).sqrt();
    let scores = precision.matmul(rotated(part(0)), rotated(part(1)).swap_dims(2, 3)) * scale;
    precision
        .matmul(softmax(scores, 3), part(2))
        .swap_dims(1, 2)
        .reshape([rows, width])
}

/// A column of one number per row.
fn column<T>(terms: &[T], device: &Device, of: impl Fn(&T) -> f32) -> Tensor<1> {
    let values: Vec<f32> = terms.iter().map(of).collect();
    Tensor::from_data(TensorData::new(values, [terms.len()]), device)
}

fn indices<T>(terms: &[T], device: &Device, of: impl Fn(&T) -> usize) -> Tensor<2, Int> {
    let values: Vec<i64> = terms.iter().map(|term| of(term) as i64).collect();
    Tensor::from_data(TensorData::new(values, [terms.len(), 1]), device)
}

/// `[rows, states]`: true at each row's index.
fn marked(indices: Tensor<2, Int>, states: usize, device: &Device) -> Tensor<2, Bool> {
    let [rows, _] = indices.dims();
    let all = Tensor::<1, Int>::arange(0..states as i64, device);
    all.unsqueeze::<2>()
        .expand([rows, states])
        .equal(indices.expand([rows, states]))
}

pub(super) fn score_entropy(terms: &[RowTerm], log_scores: Tensor<2>) -> Tensor<1> {
    let [_, states] = log_scores.dims();
    let device = log_scores.device();
    let current = marked(indices(terms, &device, |term| term.current), states, &device);
    let scores = log_scores.clone().mask_fill(current.clone(), LOWEST).exp();
    let others = log_scores.clone().mask_fill(current, 0.0);
    let target = log_scores.gather(1, indices(terms, &device, |term| term.target));
    let sum = |x: Tensor<2>| x.sum_dim(1).squeeze_dim::<1>(1);
    let of = |pick: fn(&RowTerm) -> f32| column(terms, &device, pick);
    sum(scores) * of(|term| term.exponential)
        - sum(others) * of(|term| term.linear)
        - target.squeeze_dim::<1>(1) * of(|term| term.target_weight)
        + of(|term| term.constant)
}

pub(super) fn cross_entropy(terms: &[CrossEntropyTerm], logits: Tensor<2>) -> Tensor<1> {
    let [_, states] = logits.dims();
    let device = logits.device();
    let mask = marked(indices(terms, &device, |term| term.mask), states, &device);
    let log_probabilities = log_softmax(logits.mask_fill(mask, LOWEST), 1);
    let target = log_probabilities.gather(1, indices(terms, &device, |term| term.target));
    target.squeeze_dim::<1>(1) * column(terms, &device, |term| -term.weight)
}

#[cfg(test)]
mod tests {
    use super::super::{self as kernels, CrossEntropy, GatedResidual, Gelu, ModulatedNorm, ScoreEntropy};
    use super::*;
    use crate::model::training_device;
    use crate::random::unit;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    const BATCH: usize = 2;
    const LENGTH: usize = 5;
    const WIDTH: usize = 12;
    const ROWS: usize = BATCH * LENGTH;

    /// Random inputs, recorded for gradients.
    fn random<const D: usize>(random: &mut ChaCha8Rng, shape: [usize; D]) -> Tensor<D> {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| (4.0 * unit(random) - 2.0) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), &training_device()).require_grad()
    }

    fn close(one: &[f32], other: &[f32]) {
        assert_eq!(one.len(), other.len());
        for (one, other) in one.iter().zip(other) {
            assert!(
                (one - other).abs() < 2e-5 * (1.0 + one.abs()),
                "{one} is not {other}"
            );
        }
    }

    fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
        tensor.to_data().iter::<f32>().collect()
    }

    /// Values of two results and gradients of a weighted sum by all inputs.
    macro_rules! agree {
        ($kernel:expr, $composed:expr, $($input:ident),+) => {{
            let (kernel, composed) = ($kernel, $composed);
            close(&values(&kernel), &values(&composed));
            let weights = random(&mut ChaCha8Rng::seed_from_u64(9), kernel.dims());
            let one = (kernel * weights.clone()).sum().backward();
            let other = (composed * weights).sum().backward();
            $(close(
                &values(&$input.grad(&one).unwrap()),
                &values(&$input.grad(&other).unwrap()),
            );)+
        }};
    }

    #[test]
    fn blocks_are_what_the_kernels_compute() {
        let mut r = ChaCha8Rng::seed_from_u64(1);
        let (x, y) = (random(&mut r, [ROWS, WIDTH]), random(&mut r, [ROWS, WIDTH]));
        let vector = random(&mut r, [WIDTH]);
        let (shift, scale) = (random(&mut r, [BATCH, WIDTH]), random(&mut r, [BATCH, WIDTH]));
        let packed = random(&mut r, [ROWS, 3 * WIDTH]);

        let kernel: Tensor<2> = kernels::apply(Gelu, [x.clone().into(), vector.clone().into()]);
        agree!(kernel, gelu(x.clone(), vector.clone()), x, vector);

        let inputs = [x.clone(), y.clone(), scale.clone()].map(Into::into);
        let kernel: Tensor<2> = kernels::apply(GatedResidual, inputs);
        agree!(
            kernel,
            gated_residual(x.clone(), y.clone(), scale.clone()),
            x,
            y,
            scale
        );

        let inputs = [
            x.clone().into(),
            vector.clone().into(),
            shift.clone().into(),
            scale.clone().into(),
        ];
        let kernel: Tensor<2> = kernels::apply(ModulatedNorm, inputs);
        let composed = modulated_norm(x.clone(), vector.clone(), shift.clone(), scale.clone());
        agree!(kernel, composed, x, vector, shift, scale);

        let attention = RotaryAttention {
            length: LENGTH,
            heads: 3,
            rotation: RotaryAttention::rotation(LENGTH, WIDTH / 3),
        };
        let kernel: Tensor<2> = kernels::apply(attention.clone(), [packed.clone().into()]);
        agree!(
            kernel,
            rotary_attention(&attention, Precision::F32, &packed),
            packed
        );
    }

    #[test]
    fn losses_are_what_the_kernels_compute() {
        let mut r = ChaCha8Rng::seed_from_u64(2);
        let rows = random(&mut r, [3, WIDTH]);
        let term = |current, target, linear| RowTerm {
            current,
            target,
            exponential: 0.5,
            linear,
            target_weight: if current == target { 0.0 } else { 1.5 },
            constant: -0.25,
        };
        let terms = [term(11, 4, 0.0), term(3, 5, 0.2), term(7, 7, 0.2)];
        let kernel: Tensor<1> = kernels::apply(
            ScoreEntropy {
                terms: terms.as_slice().into(),
            },
            [rows.clone().into()],
        );
        agree!(kernel, score_entropy(&terms, rows.clone()), rows);

        let terms = [(11, 4, 2.0), (11, 0, 0.5), (11, 10, 1.0)]
            .map(|(mask, target, weight)| CrossEntropyTerm { mask, target, weight });
        let kernel: Tensor<1> = kernels::apply(
            CrossEntropy {
                terms: terms.as_slice().into(),
            },
            [rows.clone().into()],
        );
        agree!(kernel, cross_entropy(&terms, rows.clone()), rows);
    }
}
