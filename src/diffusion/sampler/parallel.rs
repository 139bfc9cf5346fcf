//! Which masked positions to fill at once, when all have been looked at: heuristics for few evaluations.
//!
//! Filling several positions from one evaluation takes them for independent; the surer the network is of them,
//! the less that costs. Both rules here fill the surest ones, so what comes out is not the law of the reverse
//! process but likelier and less varied text. For absorbing graphs.

/// Indices into `doubts` of the `count` least doubtful; ties go to the lower index.
///
/// With minus log probabilities of drawn tokens and even counts this is MaskGIT's rule (arXiv 2202.04200).
pub fn surest(doubts: &[f64], count: usize) -> Vec<usize> {
    let mut order = ascending(doubts);
    order.truncate(count);
    order
}

/// Indices into `entropies` of as many of the surest positions as keep `sum - maximum` of their entropies within
/// `bound` nats, and of `least` at least (entropy-bounded sampler, arXiv 2505.24857, algorithm 1).
///
/// The sum less the maximum bounds what is lost by taking the positions for independent.
pub fn within_entropy(entropies: &[f64], bound: f64, least: usize) -> Vec<usize> {
    let mut order = ascending(entropies);
    let mut sum = 0.0;
    let fit = order
        .iter()
        .take_while(|&&index| {
            // In ascending order the newest is the maximum.
            let without_maximum = sum;
            sum += entropies[index];
            without_maximum <= bound
        })
        .count();
    order.truncate(fit.max(least));
    order
}

/// How many of `masked` positions are to be filled now, that all be by the last of `evaluations` even ones.
pub fn even_share(masked: usize, evaluations: u32) -> usize {
    masked.div_ceil(evaluations.max(1) as usize)
}

fn ascending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]).then(a.cmp(&b)));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_surest_come_first() {
        assert_eq!(surest(&[0.3, 0.1, 0.3, 0.0], 3), [3, 1, 0]);
        assert!(surest(&[0.3], 0).is_empty());
    }

    #[test]
    fn entropy_is_spent_but_not_the_largest() {
        let entropies = [1.0, 0.2, 0.3, 5.0];
        // 0.2 | 0.2 + 0.3 less 0.3 | 1.5 less 1.0 | 6.5 less 5.0
        assert_eq!(within_entropy(&entropies, 0.1, 1), [1]);
        assert_eq!(within_entropy(&entropies, 0.2, 1), [1, 2]);
        assert_eq!(within_entropy(&entropies, 0.5, 1), [1, 2, 0]);
        assert_eq!(within_entropy(&entropies, 1.5, 1), [1, 2, 0, 3]);
        assert_eq!(within_entropy(&entropies, 0.1, 3), [1, 2, 0]);
    }

    proptest! {
        #[test]
        fn even_shares_end_in_time(masked in 0usize..500, evaluations in 1u32..600) {
            let mut left = masked;
            for remaining in (1..=evaluations).rev() {
                left -= even_share(left, remaining);
            }
            prop_assert_eq!(left, 0);
        }

        #[test]
        fn someone_is_always_within(entropies in prop::collection::vec(0.0f64..9.0, 1..40), bound in 0.0f64..20.0) {
            let chosen = within_entropy(&entropies, bound, 1);
            let of = |i: &usize| entropies[*i];
            let (sum, most) = (chosen.iter().map(of).sum::<f64>(), chosen.iter().map(of).fold(0.0, f64::max));
            prop_assert!(!chosen.is_empty() && sum - most <= bound + 1e-9);
        }
    }
}
