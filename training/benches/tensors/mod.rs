//! Safetensors files, which other programs read.
#![allow(dead_code, reason = "not every benchmark writes every type")]

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use training::model::state_dict::StateDict;

#[derive(Default)]
pub(crate) struct Tensors(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub(crate) fn f32(&mut self, name: &str, shape: Vec<usize>, data: &[f32]) {
        let bytes = data.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.0.push((name.to_owned(), Dtype::F32, shape, bytes));
    }

    pub(crate) fn i64(&mut self, name: &str, shape: Vec<usize>, data: &[i64]) {
        let bytes = data.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.0.push((name.to_owned(), Dtype::I64, shape, bytes));
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let views = self.0.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name.clone(), TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let views: HashMap<_, _> = views.collect::<Result<_>>()?;
        Ok(serialize_to_file(views, None, path)?)
    }
}

impl From<StateDict> for Tensors {
    fn from(weights: StateDict) -> Self {
        let mut tensors = Self::default();
        for (name, tensor) in weights.0 {
            tensors.f32(&name, tensor.shape, &tensor.data);
        }
        tensors
    }
}
