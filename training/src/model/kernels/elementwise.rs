//! Tanh-GELU after a bias, and the gated residual of a block.

use burn::backend::flex::FlexTensor;

use super::{Kernel, entries, exp, tensor, vectorised};

/// `gelu(x + bias)` with the tanh approximation, `x: [rows, width]`, `bias: [width]`.
///
/// `0.5 (1 + tanh(u)) = 1 / (1 + e^(-2u))`, so one exponential does.
#[derive(Debug, Clone, Copy)]
pub struct Gelu;

/// `2 sqrt(2 / pi)`.
const SLOPE: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

impl Kernel<2> for Gelu {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, bias]: [FlexTensor; 2]) -> (FlexTensor, Self::Saved) {
        let (values, shift) = (entries(&x), entries(&bias));
        let width = shift.len();
        let mut output = vec![0.0; values.len()];
        vectorised(|| {
            for (row, output) in values.chunks_exact(width).zip(output.chunks_exact_mut(width)) {
                for ((output, &x), &bias) in output.iter_mut().zip(row).zip(shift) {
                    let x = x + bias;
                    *output = x / (1.0 + exp(-SLOPE * (x + CUBIC * x * x * x)));
                }
            }
        });
        (tensor(output, [values.len() / width, width]), [x, bias])
    }

    fn backward(&self, [x, bias]: Self::Saved, gradient: FlexTensor) -> [FlexTensor; 2] {
        let gradient = gradient.to_contiguous();
        let (values, shift, upstream) = (entries(&x), entries(&bias), entries(&gradient));
        let width = shift.len();
        let mut by_x = vec![0.0; values.len()];
        let mut by_bias = vec![0.0; width];
        vectorised(|| {
            let rows = values.chunks_exact(width).zip(upstream.chunks_exact(width));
            for ((row, upstream), by_x) in rows.zip(by_x.chunks_exact_mut(width)) {
                let columns = by_x
                    .iter_mut()
                    .zip(by_bias.iter_mut())
                    .zip(row.iter().zip(shift).zip(upstream));
                for ((by_x, by_bias), ((&x, &bias), &upstream)) in columns {
                    let x = x + bias;
                    let gate = 1.0 / (1.0 + exp(-SLOPE * (x + CUBIC * x * x * x)));
                    let slope = SLOPE * (1.0 + 3.0 * CUBIC * x * x);
                    let by = upstream * (gate + x * gate * (1.0 - gate) * slope);
                    *by_x = by;
                    *by_bias += by;
                }
            }
        });
        [
            tensor(by_x, [values.len() / width, width]),
            tensor(by_bias, [width]),
        ]
    }
}

/// `x + gate * y`: `x`, `y`: `[batch * length, width]`, `gate: [batch, width]`.
#[derive(Debug, Clone, Copy)]
pub struct GatedResidual;

impl Kernel<3> for GatedResidual {
    type Saved = [FlexTensor; 2];

    fn forward(&self, [x, y, gate]: [FlexTensor; 3]) -> (FlexTensor, Self::Saved) {
        let (values, branch, gates) = (entries(&x), entries(&y), entries(&gate));
        let [batch, width] = [gate.layout().shape()[0], gate.layout().shape()[1]];
        let block = values.len() / batch;
        let mut output = vec![0.0; values.len()];
        vectorised(|| {
            let rows = values.chunks_exact(width).zip(branch.chunks_exact(width));
            for (index, ((x, y), output)) in rows.zip(output.chunks_exact_mut(width)).enumerate() {
                let sequence = index * width / block;
                let gate = &gates[sequence * width..][..width];
                for ((output, &x), (&y, &gate)) in output.iter_mut().zip(x).zip(y.iter().zip(gate)) {
                    *output = x + gate * y;
                }
            }
        });
        (tensor(output, [values.len() / width, width]), [y, gate])
    }

    fn backward(&self, [y, gate]: Self::Saved, gradient: FlexTensor) -> [FlexTensor; 3] {
        let gradient = gradient.to_contiguous();
        let (branch, gates, upstream) = (entries(&y), entries(&gate), entries(&gradient));
        let [batch, width] = [gate.layout().shape()[0], gate.layout().shape()[1]];
        let block = branch.len() / batch;
        let mut by_y = vec![0.0; branch.len()];
        let mut by_gate = vec![0.0; gates.len()];
        vectorised(|| {
            let rows = branch.chunks_exact(width).zip(upstream.chunks_exact(width));
            for (index, ((y, upstream), by_y)) in rows.zip(by_y.chunks_exact_mut(width)).enumerate() {
                let sequence = index * width / block;
                let gate = &gates[sequence * width..][..width];
                let by_gate = &mut by_gate[sequence * width..][..width];
                let columns = by_y.iter_mut().zip(by_gate).zip(y.iter().zip(gate).zip(upstream));
                for ((by_y, by_gate), ((&y, &gate), &upstream)) in columns {
                    *by_y = upstream * gate;
                    *by_gate += upstream * y;
                }
            }
        });
        let by_y = tensor(by_y, [branch.len() / width, width]);
        [gradient, by_y, tensor(by_gate, [batch, width])]
    }
}
