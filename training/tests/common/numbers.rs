//! Numbers of `tests/fixtures`, which other implementations computed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// A folder of `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    fixtures.join(name)
}

/// One tensor; whole numbers as well, which are small.
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f32>,
}

impl Numbers {
    pub(crate) fn ids<I: TryFrom<i64, Error: std::fmt::Debug>>(&self) -> Vec<I> {
        self.data
            .iter()
            .map(|id| I::try_from(*id as i64).unwrap())
            .collect()
    }
}

/// All tensors of `file`, by name.
pub(crate) fn numbers(file: &Path) -> BTreeMap<String, Numbers> {
    let raw = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&raw).unwrap().tensors();
    let numbers = tensors.into_iter().map(|(name, view)| {
        let data = if view.dtype() == Dtype::I64 {
            let ids = view.data().as_chunks().0.iter();
            ids.map(|bytes| i64::from_le_bytes(*bytes) as f32).collect()
        } else {
            assert_eq!(view.dtype(), Dtype::F32, "{name}");
            let floats = view.data().as_chunks().0.iter();
            floats.map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        let shape = view.shape().to_vec();
        (name, Numbers { shape, data })
    });
    numbers.collect()
}
