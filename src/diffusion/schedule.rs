//! Noise schedules: how much noise a canvas carries at time t in `[0, 1]`.
//!
//! Total noise is sigma-bar(t), its derivative the rate sigma(t) (section 3.3 and appendix C.1 of arXiv 2310.16834).

use serde::{Deserialize, Serialize};

/// A noise schedule, written as in a bundle's manifest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Schedule {
    /// `sigma(t) = -ln(1 - (1 - eps) t)`: a fraction `(1 - eps) t` of the tokens has moved at time t.
    LogLinear {
        /// Share that stays unmoved at t = 1; keeps the total noise finite. In `(0, 1)`.
        eps: f64,
    },
    /// `sigma(t) = sigma_min^(1 - t) sigma_max^t`.
    Geometric {
        /// Total noise at t = 0. Above 0.
        sigma_min: f64,
        /// Total noise at t = 1. Above `sigma_min`.
        sigma_max: f64,
    },
}

impl Schedule {
    /// Total noise sigma-bar(t).
    pub fn total_noise(&self, t: f64) -> f64 {
        match *self {
            Self::LogLinear { eps } => -(-(1.0 - eps) * t).ln_1p(),
            Self::Geometric { sigma_min, sigma_max } => sigma_min.powf(1.0 - t) * sigma_max.powf(t),
        }
    }

    /// Noise rate sigma(t), the derivative of the total noise.
    pub fn rate(&self, t: f64) -> f64 {
        match *self {
            Self::LogLinear { eps } => (1.0 - eps) / (1.0 - (1.0 - eps) * t),
            Self::Geometric { sigma_min, sigma_max } => self.total_noise(t) * (sigma_max / sigma_min).ln(),
        }
    }

    /// The time at which the total noise is `sigma`: the inverse of [`Self::total_noise`].
    pub fn time(&self, sigma: f64) -> f64 {
        match *self {
            Self::LogLinear { eps } => -(-sigma).exp_m1() / (1.0 - eps),
            Self::Geometric { sigma_min, sigma_max } => {
                (sigma / sigma_min).ln() / (sigma_max / sigma_min).ln()
            }
        }
    }

    /// Says what is wrong with the parameters, if anything is.
    pub fn check(&self) -> Result<(), &'static str> {
        match *self {
            Self::LogLinear { eps } if !(eps > 0.0 && eps < 1.0) => {
                Err("schedule.eps must be between 0 and 1")
            }
            Self::Geometric { sigma_min, sigma_max }
                if !(sigma_min > 0.0 && sigma_max > sigma_min && sigma_max.is_finite()) =>
            {
                Err("schedule needs 0 < sigma_min < sigma_max")
            }
            Self::LogLinear { .. } | Self::Geometric { .. } => Ok(()),
        }
    }
}

/// Offset that published absorbing models add to their log-scores: `-ln(e^sigma - 1) - ln(V - 1)`.
///
/// Exported graphs leave it out, because `ln(expm1(sigma))` in f32 is off by 1e-3 near sigma 1e-5.
/// `sigma > 0`; `states` counts the mask.
pub fn sigma_offset(sigma: f64, states: usize) -> f64 {
    -sigma.exp_m1().ln() - ((states - 1) as f64).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn schedules() -> impl Strategy<Value = Schedule> {
        prop_oneof![
            (1e-5f64..0.1).prop_map(|eps| Schedule::LogLinear { eps }),
            (1e-5f64..0.01, 1.0f64..30.0)
                .prop_map(|(sigma_min, sigma_max)| Schedule::Geometric { sigma_min, sigma_max }),
        ]
    }

    proptest! {
        #[test]
        fn time_inverts_total_noise(schedule in schedules(), t in 0.0f64..=1.0) {
            prop_assert!((schedule.time(schedule.total_noise(t)) - t).abs() < 1e-9);
        }

        #[test]
        fn rate_is_the_derivative_of_total_noise(schedule in schedules(), t in 0.01f64..0.98) {
            let h = 1e-6;
            let slope = (schedule.total_noise(t + h) - schedule.total_noise(t - h)) / (2.0 * h);
            prop_assert!((slope / schedule.rate(t) - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        assert!(Schedule::LogLinear { eps: 0.0 }.check().is_err());
        assert!(Schedule::LogLinear { eps: f64::NAN }.check().is_err());
        assert!(
            Schedule::Geometric {
                sigma_min: 1.0,
                sigma_max: 0.5
            }
            .check()
            .is_err()
        );
        assert!(Schedule::LogLinear { eps: 1e-3 }.check().is_ok());
    }
}
