//! Settings that no run can use.

use denoised::diffusion::{GraphKind, Parameterization};

use super::error::Invalid;
use super::{OptimizerSection, RunConfig, RunSection};
use crate::loss::masking::Masking;

impl RunConfig {
    /// Refuses values that no run can use.
    ///
    /// # Errors
    /// [`Invalid`], which names the setting.
    pub fn validate(&self) -> Result<(), Invalid> {
        if let Err(reason) = self.schedule.check() {
            return Err(bad("schedule", format!("cannot be used: {reason}")));
        }
        let shares: f64 = self.data.mixture.iter().map(|part| part.share).sum();
        require(
            self.data.mixture.iter().all(|part| part.share > 0.0) && shares < 1.0,
            "data.mixture",
            || format!("has shares of {shares} in all, expected each above 0 and all together below 1"),
        )?;
        self.optimizer.check()?;
        self.run.check()?;
        let (network, is_uniform) = (&self.network, self.graph.kind == GraphKind::Uniform);
        require(
            !(network.scale_by_sigma && is_uniform),
            "network.scale_by_sigma",
            || "is for absorbing graphs".to_owned(),
        )?;
        let is_mean = network.parameterization == Parameterization::Mean;
        require(!(is_mean && is_uniform), "network.parameterization", || {
            "\"mean\" is for absorbing graphs".to_owned()
        })?;
        require(
            self.optimizer.masking == Masking::Independent
                || (!is_uniform && is_mean && !network.time_conditioned),
            "optimizer.masking",
            || {
                "\"fixed_count\" is for absorbing graphs and networks of network.parameterization \"mean\" that do \
                 not see the time (network.time_conditioned = false)"
                    .to_owned()
            },
        )?;
        // The vocabulary is not known yet; any other number of states will do for the other fields.
        self.network_config(2).validate()?;
        Ok(())
    }
}

impl OptimizerSection {
    fn check(&self) -> Result<(), Invalid> {
        for (field, value) in [
            ("optimizer.lr", self.lr),
            ("optimizer.epsilon", self.epsilon),
            ("optimizer.gradient_clip_norm", self.gradient_clip_norm),
            ("optimizer.muon.lr", self.muon.map_or(1.0, |muon| muon.lr)),
        ] {
            positive(field, value)?;
        }
        for (field, value) in [
            ("optimizer.betas[0]", self.betas[0]),
            ("optimizer.betas[1]", self.betas[1]),
            ("optimizer.ema_decay", self.ema_decay),
            (
                "optimizer.muon.momentum",
                self.muon.map_or(0.0, |muon| muon.momentum),
            ),
        ] {
            require((0.0..1.0).contains(&value), field, || {
                format!("is {value}, expected 0 <= {field} < 1")
            })?;
        }
        require((0.0..=self.lr).contains(&self.min_lr), "optimizer.min_lr", || {
            format!("is {}, expected a number from 0 to optimizer.lr", self.min_lr)
        })?;
        let decay = self.weight_decay;
        require(
            decay.is_finite() && decay >= 0.0,
            "optimizer.weight_decay",
            || format!("is {decay}, expected a number from 0"),
        )
    }
}

impl RunSection {
    fn check(&self) -> Result<(), Invalid> {
        for (field, value) in [
            ("run.batch_size", self.batch_size as u64),
            ("run.steps", self.steps),
            ("run.checkpoint_every", self.checkpoint_every),
            ("run.validate_every", self.validate_every),
            ("run.validation_sequences", self.validation_sequences as u64),
            ("run.threads", self.threads as u64),
            ("run.accumulate", self.accumulate as u64),
            ("run.keep", self.keep as u64),
            ("run.sample_every", self.sample_every.unwrap_or(1)),
            ("run.log_every", self.log_every),
            ("run.explosion_steps", self.explosion_steps),
        ] {
            require(value > 0, field, || "must be at least 1".to_owned())?;
        }
        let parts = self.threads.checked_mul(self.accumulate);
        require(
            parts.is_some_and(|parts| parts <= self.batch_size),
            "run.threads",
            || {
                let Self {
                    threads,
                    accumulate,
                    batch_size,
                    ..
                } = self;
                format!(
                    "{threads} times run.accumulate {accumulate} is more than the {batch_size} sequences of \
                     run.batch_size"
                )
            },
        )?;
        if let Some(minutes) = self.checkpoint_minutes {
            positive("run.checkpoint_minutes", minutes)?;
        }
        let factor = self.explosion_factor;
        require(factor.is_finite() && factor > 1.0, "run.explosion_factor", || {
            format!("is {factor}, expected a number above 1")
        })
    }
}

fn positive(field: &'static str, value: f64) -> Result<(), Invalid> {
    require(value.is_finite() && value > 0.0, field, || {
        format!("is {value}, expected a positive number")
    })
}

fn require(holds: bool, field: &'static str, problem: impl FnOnce() -> String) -> Result<(), Invalid> {
    if holds { Ok(()) } else { Err(bad(field, problem())) }
}

fn bad(field: &'static str, problem: String) -> Invalid {
    Invalid::Field { field, problem }
}
