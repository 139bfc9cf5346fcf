//! Weights to begin with, wherever they lie.

use std::path::Path;

use anyhow::{Context, Result};
use training::export;
use training::fit::Beginning;
use training::fit::checkpoint::{self, Which};
use training::import::{self, Choice};

/// The averaged weights in `place`: a run's directory (its latest checkpoint) or file, one checkpoint's folder, a
/// bundle, or a published checkpoint. `cond_dim` is the run's.
pub(super) fn beginning(place: &Path, cond_dim: usize) -> Result<Beginning> {
    let name = place.display().to_string();
    if place.join(denoised::bundle::MANIFEST).is_file() {
        let exported = export::weights::read(place, cond_dim)
            .with_context(|| format!("cannot begin with the bundle {name}"))?;
        return Ok(Beginning {
            name,
            network: exported.network,
            weights: exported.weights,
            tokenizer_sha256: exported.tokenizer_sha256,
        });
    }
    let folder = if place.is_file() {
        Some(Which::Last.folder(&training::config::RunConfig::read(place)?.run.directory)?)
    } else if checkpoint::is_checkpoint(place) {
        Some(place.to_owned())
    } else if checkpoint::steps(place).is_empty() {
        None
    } else {
        Some(Which::Last.folder(place)?)
    };
    if let Some(folder) = folder {
        let (network, state) = checkpoint::load_average(&folder)?;
        return Ok(Beginning {
            name,
            network: *network.config(),
            weights: network.state_dict(),
            tokenizer_sha256: Some(state.tokenizer_sha256),
        });
    }
    let imported = import::read(place, Choice::Averaged)?;
    Ok(Beginning {
        name,
        network: imported.network,
        weights: imported.weights,
        tokenizer_sha256: None,
    })
}
