//! Fused CPU operations with hand-written gradients, and the same operations composed elsewhere.
//!
//! Burn composes tanh-GELU, modulated layer norm, rotary attention and score entropy from many
//! elementwise passes over memory; on a CPU those passes cost more than the arithmetic. Each kernel
//! here is one pass forward and one backward over contiguous `f32` rows, vectorised by `pulp` for
//! the processor at hand. `reference_test` holds values and gradients of all of them to the authors' network.

mod attention;
mod composed;
mod cross_entropy;
mod elementwise;
mod norm;
mod score_entropy;

use std::fmt::Debug;

use burn::Tensor;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Device, TensorData};

use crate::model::precision::Precision;

pub use attention::RotaryAttention;
pub use cross_entropy::{CrossEntropy, CrossEntropyTerm};
pub use elementwise::{GatedResidual, Gelu};
pub use norm::ModulatedNorm;
pub use score_entropy::{RowTerm, ScoreEntropy};

/// [`Gelu`] on any device.
pub fn gelu(x: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    if on_cpu(&x) {
        apply(Gelu, [x.into(), bias.into()])
    } else {
        composed::gelu(x, bias)
    }
}

/// [`GatedResidual`] on any device.
pub fn gated_residual(x: Tensor<2>, y: Tensor<2>, gate: Tensor<2>) -> Tensor<2> {
    if on_cpu(&x) {
        apply(GatedResidual, [x.into(), y.into(), gate.into()])
    } else {
        composed::gated_residual(x, y, gate)
    }
}

/// [`ModulatedNorm`] on any device.
pub fn modulated_norm(x: Tensor<2>, weight: Tensor<1>, shift: Tensor<2>, scale: Tensor<2>) -> Tensor<2> {
    if on_cpu(&x) {
        apply(
            ModulatedNorm,
            [x.into(), weight.into(), shift.into(), scale.into()],
        )
    } else {
        composed::modulated_norm(x, weight, shift, scale)
    }
}

/// [`RotaryAttention`] on any device; the CPU's kernel multiplies in f32 whatever `precision` says.
pub fn rotary_attention(attention: &RotaryAttention, precision: Precision, packed: Tensor<2>) -> Tensor<2> {
    if on_cpu(&packed) {
        apply(attention.clone(), [packed.into()])
    } else {
        composed::rotary_attention(attention, precision, &packed)
    }
}

/// [`ScoreEntropy`] on any device.
pub fn score_entropy(terms: &[RowTerm], log_scores: Tensor<2>) -> Tensor<1> {
    if on_cpu(&log_scores) {
        let terms = terms.into();
        apply(ScoreEntropy { terms }, [log_scores.into()])
    } else {
        composed::score_entropy(terms, log_scores)
    }
}

/// [`CrossEntropy`] on any device.
pub fn cross_entropy(terms: &[CrossEntropyTerm], logits: Tensor<2>) -> Tensor<1> {
    if on_cpu(&logits) {
        let terms = terms.into();
        apply(CrossEntropy { terms }, [logits.into()])
    } else {
        composed::cross_entropy(terms, logits)
    }
}

/// Whether the kernels can take `tensor`: they work on host memory.
fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.device() == Device::flex()
}

/// An operation on `N` tensors with its gradient.
pub trait Kernel<const N: usize>: Clone + Debug + Send + 'static {
    /// What the gradient needs from the forward pass.
    type Saved: Clone + Debug + Send + 'static;

    /// The result and what to keep for the gradient.
    fn forward(&self, inputs: [FlexTensor; N]) -> (FlexTensor, Self::Saved);

    /// Gradients by each input, given the gradient by the result.
    fn backward(&self, saved: Self::Saved, gradient: FlexTensor) -> [FlexTensor; N];
}

/// Adapts a [`Kernel`] to Burn's backward steps.
#[derive(Debug)]
struct Step;

#[derive(Debug, Clone)]
struct StepState<K, S> {
    kernel: K,
    saved: S,
}

/// One step type per kernel: Burn wants the state's type fixed by the step's.
#[derive(Debug)]
struct KernelStep<K>(std::marker::PhantomData<fn() -> K>, Step);

impl<K: Kernel<N>, const N: usize> Backward<Flex, N> for KernelStep<K> {
    type State = StepState<K, K::Saved>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = grads.consume::<Flex>(&ops.node);
        let StepState { kernel, saved } = ops.state;
        for (parent, gradient) in ops.parents.into_iter().zip(kernel.backward(saved, gradient)) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// An input on its way into [`apply`], whatever its rank.
#[derive(Debug)]
pub enum Input {
    /// Recorded for gradients.
    Tracked(<Autodiff<Flex> as burn::backend::BackendTypes>::FloatTensorPrimitive),
    /// A plain value.
    Plain(FlexTensor),
}

impl<const D: usize> From<Tensor<D>> for Input {
    fn from(tensor: Tensor<D>) -> Self {
        if tensor.is_autodiff() {
            match tensor.try_into_primitive::<Autodiff<Flex>>() {
                Ok(primitive) => Self::Tracked(primitive),
                Err(error) => unreachable!("networks are built on the Flex device: {error:?}"),
            }
        } else {
            match tensor.try_into_primitive::<Flex>() {
                Ok(primitive) => Self::Plain(primitive),
                Err(error) => unreachable!("networks are built on the Flex device: {error:?}"),
            }
        }
    }
}

/// Runs `kernel`, recording it for gradients when the inputs are recorded.
pub fn apply<K: Kernel<N>, const N: usize, const D: usize>(kernel: K, inputs: [Input; N]) -> Tensor<D> {
    let mut tracked = Vec::with_capacity(N);
    let inputs = inputs.map(|input| match input {
        Input::Tracked(tensor) => {
            let (primitive, guard) = tensor.into_parts();
            tracked.push(guard);
            primitive
        }
        Input::Plain(primitive) => primitive,
    });
    let (output, saved) = kernel.forward(inputs.map(|input| input.to_contiguous()));
    let Ok(guards) = <[_; N]>::try_from(tracked) else {
        return Tensor::from_primitive::<Flex>(output);
    };
    let step = KernelStep::<K>(std::marker::PhantomData, Step);
    let output = match step.prepare::<NoCheckpointing>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(StepState { kernel, saved }, output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

/// A contiguous tensor over `values`.
fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// The entries of a contiguous tensor.
fn entries(tensor: &FlexTensor) -> &[f32] {
    match tensor.as_slice::<f32>() {
        Some(entries) => entries,
        None => unreachable!("kernels see contiguous f32 tensors only"),
    }
}

/// `rows` `[rows, columns]`, each times its entry of `by` `[rows]`.
fn scale_rows(mut rows: FlexTensor, by: &FlexTensor) -> FlexTensor {
    let by = by.to_contiguous();
    let columns = rows.layout().shape()[1];
    let each = rows.storage_mut::<f32>().chunks_exact_mut(columns);
    vectorised(|| {
        for (row, &factor) in each.zip(entries(&by)) {
            for entry in row {
                *entry *= factor;
            }
        }
    });
    rows
}

/// Runs `work` with the widest instructions this processor has.
fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `e^x` to about 2 ulp, branch-free so that loops over it vectorise.
///
/// Cephes' `expf`: `x = n ln 2 + r` with `|r| <= ln 2 / 2`, a degree-5 polynomial in `r`, and `n`
/// added to the exponent bits. Saturates outside [-87, 88].
// Must be compiled with the caller's instruction set.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer that sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let mantissa = p * r * r + r + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    mantissa * f32::from_bits((exponent.wrapping_add(127) << 23) as u32)
}

/// Sum of `term` over indices `0..length`, in eight lanes so that it vectorises.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "must be compiled with the caller's instruction set"
)]
fn sum(length: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let whole = length / 8 * 8;
    for start in (0..whole).step_by(8) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(start + lane);
        }
    }
    lanes.iter().sum::<f32>() + (whole..length).map(term).sum::<f32>()
}
