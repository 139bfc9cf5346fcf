//! What is asked of a model: the options of every command that asks for text.

use clap::Args;

use super::{Failed, template, tokens};
use crate::proto::v1::generate_request::PromptAs;
use crate::proto::v1::sampling::Sampler;
use crate::proto::v1::{
    Deadline, EntropyBounded, Euler, FramePolicy, GenerateRequest, InfillRequest, OnDeadline, Remask,
    Sampling, TemplatePart, Tweedie,
};
use crate::server::sampler;

/// A request, but for its text.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub(super) struct Asked {
    /// Model to ask for, as NAME or NAME@VERSION.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Tokens of the whole text, prompt included; the model's default or maximum otherwise (generate only).
    #[arg(long, value_name = "N")]
    length: Option<u32>,
    /// Denoising steps; the model's default, or else as many as there are tokens to fill, at most 64.
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// How to take a step: tweedie, euler, first-hitting (one token an evaluation), confidence,
    /// probability-margin or entropy-bounded (the surest tokens first), remask (tokens can be masked again),
    /// theta-trapezoidal (two evaluations a step); the model's default or tweedie otherwise.
    #[arg(long, value_name = "SAMPLER", value_parser = sampler_named)]
    sampler: Option<Sampler>,
    /// For tweedie and euler: let the noise alone decide when a token leaves the mask; evaluations that change
    /// nothing are not run.
    #[arg(long, requires = "sampler")]
    normalize: bool,
    /// For entropy-bounded: entropy, in nats, of the tokens that are filled at once; the model's default or 0.5
    /// otherwise.
    #[arg(long, value_name = "X", requires = "sampler", allow_negative_numbers = true)]
    entropy_bound: Option<f64>,
    /// For remask: chance of a token to be masked again in a step; the model's default or 0.02 otherwise.
    #[arg(long, value_name = "X", requires = "sampler", allow_negative_numbers = true)]
    remask_rate: Option<f64>,
    /// Seed of all random choices: the same seed gives the same text. Drawn by default.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = seed)]
    seed: Option<u64>,
    /// Independent texts to draw; 1 by default.
    #[arg(long, value_name = "N")]
    pub(super) num_samples: Option<u32>,
    /// 0 takes the likeliest tokens, 1 follows the model; the model's default or 1 otherwise.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Choose among this many likeliest tokens; all by default.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that hold this share of the probability; the model's default or 1
    /// otherwise.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// For drafts of an infill's template: the time up to which they are noised, about the share of them that is lost;
    /// above 0, at most 1; 0.5 by default.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    start_time: Option<f64>,
    /// Seconds that the answer may take, from 0.001.
    #[arg(long, value_name = "SECONDS", value_parser = deadline_ms)]
    deadline: Option<u64>,
    /// With --deadline: take fewer steps where there is no time for all of them, instead of failing.
    #[arg(long, requires = "deadline")]
    finish_early: bool,
    /// Of your own requests those of higher priority go first; 0 by default.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    priority: i32,
}

impl Asked {
    /// A request that continues `prompt`.
    pub(super) fn continuing(&self, prompt: String, frames: FramePolicy) -> Result<GenerateRequest, Failed> {
        Ok(GenerateRequest {
            model: tokens::model(self.model.as_deref())?,
            prompt_as: Some(PromptAs::Prompt(prompt)),
            length: self.length,
            sampling: Some(self.sampling()?),
            frames: Some(frames),
            deadline: self.deadline(),
            priority: self.priority,
            ..GenerateRequest::default()
        })
    }

    /// A request that fills the gaps of the template that `text` writes.
    pub(super) fn filling(&self, text: &str, frames: FramePolicy) -> Result<InfillRequest, Failed> {
        if self.length.is_some() {
            return Err(Failed::usage(
                "--length: a template's length follows from its text and gaps",
            ));
        }
        let template = template::parse(text).map_err(|e| Failed::usage(format!("template: {e}")))?;
        Ok(InfillRequest {
            token_sets: template.token_sets,
            ..self.filling_parts(template.parts, frames)?
        })
    }

    /// A request that fills the gaps of `template`.
    pub(super) fn filling_parts(
        &self,
        template: Vec<TemplatePart>,
        frames: FramePolicy,
    ) -> Result<InfillRequest, Failed> {
        Ok(InfillRequest {
            model: tokens::model(self.model.as_deref())?,
            template,
            sampling: Some(self.sampling()?),
            frames: Some(frames),
            deadline: self.deadline(),
            priority: self.priority,
            ..InfillRequest::default()
        })
    }

    fn sampling(&self) -> Result<Sampling, Failed> {
        Ok(Sampling {
            sampler: self.sampler()?,
            steps: self.steps,
            seed: self.seed,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            num_samples: self.num_samples,
            start_time: self.start_time,
        })
    }

    /// The sampler with those of the options that are its own.
    fn sampler(&self) -> Result<Option<Sampler>, Failed> {
        let (mut sampler, normalize) = (self.sampler, self.normalize);
        let (mut bound, mut rate, mut normalizes) = (self.entropy_bound, self.remask_rate, normalize);
        match &mut sampler {
            Some(Sampler::Tweedie(Tweedie { normalize }) | Sampler::Euler(Euler { normalize })) => {
                *normalize = std::mem::take(&mut normalizes);
            }
            Some(Sampler::EntropyBounded(EntropyBounded { bound: own })) => *own = bound.take(),
            Some(Sampler::Remask(Remask { rate: own })) => *own = rate.take(),
            Some(
                Sampler::FirstHitting(_)
                | Sampler::Confidence(_)
                | Sampler::ProbabilityMargin(_)
                | Sampler::ThetaTrapezoidal(_),
            )
            | None => {}
        }
        for (option, left, of) in [
            ("--normalize", normalizes, "tweedie or euler"),
            ("--entropy-bound", bound.is_some(), "entropy-bounded"),
            ("--remask-rate", rate.is_some(), "remask"),
        ] {
            if left {
                return Err(Failed::usage(format!("{option} is for --sampler {of}")));
            }
        }
        Ok(sampler)
    }

    fn deadline(&self) -> Option<Deadline> {
        self.deadline.map(|ms| Deadline {
            ms: Some(ms),
            on_deadline: if self.finish_early {
                OnDeadline::FinishEarly.into()
            } else {
                OnDeadline::Fail.into()
            },
        })
    }
}

pub(super) fn seed(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("must be a whole number, 0 to {}", u64::MAX))
}

/// Seconds as milliseconds.
pub(super) fn deadline_ms(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=1e9).contains(&seconds) => Ok((seconds * 1e3) as u64),
        _ => Err("must be a number of seconds, 0.001 to 1000000000".to_owned()),
    }
}

/// A sampler by the name of its field in the proto, with dashes.
fn sampler_named(name: &str) -> Result<Sampler, String> {
    let names = sampler::ALL.map(|(known, sampler)| (known.replace('_', "-"), sampler));
    match names.iter().find(|(known, _)| known == name) {
        Some((_, sampler)) => Ok(*sampler),
        None => Err(format!("must be {}", names.map(|(known, _)| known).join(", "))),
    }
}
