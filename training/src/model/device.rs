//! Where networks live: the CPU, or NVIDIA GPUs behind the feature `cuda`.
//!
//! Data-parallel training needs no more than a list of devices: a step's batch is split over them, each
//! computes the gradients of its part on its copy of the weights, all make one sum of these
//! ([`sums`](crate::optim::sums)), and the first one takes the step and gives the others the weights.
//!
//! Devices of several machines are not among them. Burn 0.22.1 has remote ones (`burn::remote`). Tried with two of its
//! servers: backward passes run there, and gradients that are moved from one to the other and added are those of one process
//! to the bit; but it reduces among the devices of one server alone ("cross-peer `all_reduce` is not supported yet"), its
//! CPU backend not even there, and our own operations (`kernels`) would have to be registered with each server.

use burn::tensor::Device;
use thiserror::Error;

pub use denoised::network::onnx::Device as DeviceName;

/// Why devices cannot be used.
#[derive(Debug, Clone, Copy, Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The program has no GPU code.
    #[error("device {0}: this program was built without GPUs (cargo build -p training --features cuda)")]
    NoCuda(DeviceName),
    /// There is no such GPU.
    #[error("device {name}: there are {count} GPUs here")]
    Missing {
        /// What was asked for.
        name: DeviceName,
        /// How many there are.
        count: usize,
    },
    /// Parts of unequal speed would wait for each other.
    #[error("the CPU and GPUs do not share a batch: name one cpu, or GPUs alone")]
    Mixed,
    /// A device twice gains nothing.
    #[error("device {0} is named twice")]
    Twice(DeviceName),
}

/// The devices that share a batch: at least one, none recording gradients. The first is home to the
/// weights.
#[derive(Debug, Clone)]
pub struct Devices {
    home: Device,
    /// One for each part of a batch that is computed at the same time.
    lanes: Vec<Device>,
    /// Whether each has a memory of its own.
    is_apart: bool,
}

impl Devices {
    /// The CPU, with `threads` parts at a time.
    pub fn cpu(threads: usize) -> Self {
        Self {
            home: Device::flex(),
            lanes: vec![Device::flex(); threads.max(1)],
            is_apart: false,
        }
    }

    /// The devices of these names, or the CPU if there are none, with `threads` parts at a time.
    pub fn open(names: &[DeviceName], threads: usize) -> Result<Self, DeviceError> {
        if names.iter().all(|name| *name == DeviceName::Cpu) {
            return match names {
                [_, twice, ..] => Err(DeviceError::Twice(*twice)),
                _ => Ok(Self::cpu(threads)),
            };
        }
        for (index, name) in names.iter().enumerate() {
            if names[..index].contains(name) {
                return Err(DeviceError::Twice(*name));
            }
        }
        let lanes: Vec<Device> = names.iter().map(|name| gpu(*name)).collect::<Result<_, _>>()?;
        Ok(Self {
            home: lanes.first().cloned().unwrap_or_else(Device::flex),
            lanes,
            is_apart: true,
        })
    }

    /// Where weights, moments and averages are, recording gradients.
    pub fn training(&self) -> Device {
        self.home.clone().autodiff()
    }

    /// The same without gradients.
    pub fn inference(&self) -> Device {
        self.home.clone()
    }

    /// Those that have memories of their own, where there are several.
    pub fn apart(&self) -> Option<Vec<Device>> {
        (self.is_apart && self.lanes.len() > 1).then(|| self.lanes.clone())
    }

    /// Recording gradients, one for each part of a batch that is computed at the same time.
    pub fn lanes(&self) -> impl ExactSizeIterator<Item = Device> + '_ {
        self.lanes.iter().map(|device| device.clone().autodiff())
    }
}

#[cfg(feature = "cuda")]
fn gpu(name: DeviceName) -> Result<Device, DeviceError> {
    use burn::tensor::DeviceType;

    let DeviceName::Cuda(index) = name else {
        return Err(DeviceError::Mixed);
    };
    let mut all = Device::enumerate(DeviceType::Cuda).into_vec();
    let count = all.len();
    if index as usize >= count {
        return Err(DeviceError::Missing { name, count });
    }
    Ok(all.swap_remove(index as usize))
}

#[cfg(not(feature = "cuda"))]
fn gpu(name: DeviceName) -> Result<Device, DeviceError> {
    Err(match name {
        DeviceName::Cpu => DeviceError::Mixed,
        DeviceName::Cuda(_) => DeviceError::NoCuda(name),
    })
}

/// The CPU device that networks live on, recording gradients.
pub fn training_device() -> Device {
    Device::flex().autodiff()
}

/// The CPU device that networks live on, without gradients.
pub fn inference_device() -> Device {
    Device::flex()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_the_default_and_stands_alone() {
        let opened = |names: &[&str]| {
            let names: Vec<DeviceName> = names.iter().map(|name| name.parse().unwrap()).collect();
            Devices::open(&names, 3).map(|devices| devices.lanes().len())
        };
        assert_eq!(opened(&[]), Ok(3));
        assert_eq!(opened(&["cpu"]), Ok(3));
        assert_eq!(opened(&["cpu", "cpu"]), Err(DeviceError::Twice(DeviceName::Cpu)));
        assert_eq!(
            opened(&["cuda:1", "cuda:1"]),
            Err(DeviceError::Twice(DeviceName::Cuda(1)))
        );
        assert_eq!(opened(&["cpu", "cuda:0"]), Err(DeviceError::Mixed));
        #[cfg(not(feature = "cuda"))]
        assert_eq!(opened(&["cuda:0"]), Err(DeviceError::NoCuda(DeviceName::Cuda(0))));
    }
}
