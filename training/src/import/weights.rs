//! Tensors out of safetensors and PyTorch files, as float32 on the host.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pytorch_reader::{DType, PytorchReader};
use safetensors::{Dtype, SafeTensors};

use super::{Choice, ImportError, Layout};
use crate::model::state_dict::{HostTensor, StateDict};

/// What wrappers of PyTorch, and MDLM's of transformers, put before names.
const WRAPPERS: [&str; 3] = ["module.", "_orig_mod.", "backbone."];
/// The rotary frequencies, a buffer that follows from the head width.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// A file of weights.
pub(super) enum Source {
    /// That beside a `config.json`.
    Safetensors(PathBuf),
    /// The same, or of a run of the authors' training code.
    Pytorch(PytorchFile, Layout),
}

impl Source {
    pub(super) fn open(directory: &Path, layout: Layout) -> Result<Self, ImportError> {
        if let Layout::Run = layout {
            return Ok(Self::Pytorch(
                PytorchFile::open(&newest_checkpoint(directory)?)?,
                layout,
            ));
        }
        let path = directory.join("model.safetensors");
        if path.is_file() {
            return Ok(Self::Safetensors(path));
        }
        let path = directory.join("pytorch_model.bin");
        if path.is_file() {
            return Ok(Self::Pytorch(PytorchFile::open(&path)?, layout));
        }
        Err(ImportError::Layout {
            path: directory.to_owned(),
        })
    }

    /// The weights; of a run the last ones.
    pub(super) fn read(&self) -> Result<StateDict, ImportError> {
        match self {
            Self::Safetensors(path) => safetensors(path),
            Self::Pytorch(file, Layout::Published) => file.under(""),
            Self::Pytorch(file, Layout::Run) => file.under("model."),
        }
    }

    /// The weights of `choice`, where `last` is what was [read](Self::read), and their file.
    pub(super) fn chosen(
        self,
        choice: Choice,
        last: StateDict,
        parameters: &[(String, Vec<usize>)],
    ) -> Result<(PathBuf, StateDict), ImportError> {
        match (self, choice) {
            (Self::Safetensors(path), _) => Ok((path, last)),
            (Self::Pytorch(file, Layout::Published), _)
            | (Self::Pytorch(file, Layout::Run), Choice::Last) => Ok((file.path, last)),
            (Self::Pytorch(file, Layout::Run), Choice::Averaged) => {
                // A list in the order in which the network registers its parameters.
                let mut shadows = file.under("ema.shadow_params.")?;
                let mut named = StateDict::default();
                for (index, (name, _)) in parameters.iter().enumerate() {
                    if let Some(tensor) = shadows.0.remove(&index.to_string()) {
                        named.0.insert(name.clone(), tensor);
                    }
                }
                let left = shadows.0.into_iter();
                let unnamed = left.map(|(index, tensor)| (format!("ema.shadow_params[{index}]"), tensor));
                named.0.extend(unnamed);
                Ok((file.path, named))
            }
        }
    }
}

/// `checkpoints-meta/checkpoint.pth`, or else the numbered snapshot with the highest number.
fn newest_checkpoint(directory: &Path) -> Result<PathBuf, ImportError> {
    let meta = directory.join("checkpoints-meta/checkpoint.pth");
    if meta.is_file() {
        return Ok(meta);
    }
    let number = |path: &Path| -> Option<u64> {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix("checkpoint_")?
            .strip_suffix(".pth")?
            .parse()
            .ok()
    };
    std::fs::read_dir(directory.join("checkpoints"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter_map(|path| Some((number(&path)?, path)))
        .max()
        .map(|(_, path)| path)
        .ok_or_else(|| ImportError::Layout {
            path: directory.to_owned(),
        })
}

fn safetensors(path: &Path) -> Result<StateDict, ImportError> {
    let io = |source| ImportError::Io {
        path: path.to_owned(),
        source,
    };
    let raw = std::fs::read(path).map_err(io)?;
    let problem = |problem: String| ImportError::Weights {
        path: path.to_owned(),
        problem,
    };
    let tensors = SafeTensors::deserialize(&raw).map_err(|e| problem(e.to_string()))?;
    let mut weights = StateDict::default();
    for (name, view) in tensors.iter() {
        let element = element(&SAFETENSORS, &view.dtype())
            .ok_or_else(|| problem(format!("tensor {name} is {:?}, {EXPECTED}", view.dtype())))?;
        add(&mut weights, name, view.shape(), element, view.data());
    }
    Ok(weights)
}

/// A file of `torch.save`, whose tensors are read when asked for.
pub(super) struct PytorchFile {
    path: PathBuf,
    reader: PytorchReader,
}

impl PytorchFile {
    fn open(path: &Path) -> Result<Self, ImportError> {
        let reader = PytorchReader::new(path).map_err(|error| ImportError::Weights {
            path: path.to_owned(),
            problem: error.to_string(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            reader,
        })
    }

    /// The tensors whose path begins with `prefix`, without it.
    fn under(&self, prefix: &str) -> Result<StateDict, ImportError> {
        let problem = |problem: String| ImportError::Weights {
            path: self.path.clone(),
            problem,
        };
        let mut weights = StateDict::default();
        for (path, tensor) in self.reader.tensors() {
            let Some(name) = path.strip_prefix(prefix) else {
                continue;
            };
            let element = element(&PYTORCH, &tensor.dtype())
                .ok_or_else(|| problem(format!("tensor {path} is {:?}, {EXPECTED}", tensor.dtype())))?;
            let data = tensor.read().map_err(|e| problem(e.to_string()))?;
            add(&mut weights, name, tensor.shape(), element, &data);
        }
        if weights.0.is_empty() {
            return Err(problem(format!(
                "holds no tensors under {:?}",
                prefix.trim_end_matches('.')
            )));
        }
        Ok(weights)
    }
}

#[derive(Clone, Copy)]
enum Element {
    F64,
    F32,
    F16,
    BF16,
}

const EXPECTED: &str = "expected F64, F32, F16 or BF16";

const SAFETENSORS: [(Dtype, Element); 4] = [
    (Dtype::F64, Element::F64),
    (Dtype::F32, Element::F32),
    (Dtype::F16, Element::F16),
    (Dtype::BF16, Element::BF16),
];

const PYTORCH: [(DType, Element); 4] = [
    (DType::F64, Element::F64),
    (DType::F32, Element::F32),
    (DType::F16, Element::F16),
    (DType::BF16, Element::BF16),
];

/// The element type that a file's type stands for; weights are floating-point numbers.
fn element<T: PartialEq>(table: &[(T, Element)], wanted: &T) -> Option<Element> {
    let entry = table.iter().find(|(known, _)| known == wanted);
    entry.map(|(_, element)| *element)
}

/// Adds a tensor, without the names of wrappers; buffers are left out.
fn add(weights: &mut StateDict, name: &str, shape: &[usize], element: Element, bytes: &[u8]) {
    let mut name = name;
    while let Some(inner) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
        name = inner;
    }
    if name == ROTARY_BUFFER {
        return;
    }
    let data = match element {
        Element::F64 => numbers(bytes, |bytes| f64::from_le_bytes(bytes) as f32),
        Element::F32 => numbers(bytes, f32::from_le_bytes),
        Element::F16 => numbers(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Element::BF16 => numbers(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
    };
    weights.0.insert(
        name.to_owned(),
        HostTensor {
            shape: shape.to_vec(),
            data,
        },
    );
}

fn numbers<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (whole, _) = bytes.as_chunks::<N>();
    whole.iter().map(|bytes| read(*bytes)).collect()
}
