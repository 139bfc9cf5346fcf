//! What a trained model has to beat on the same held-out text: a byte 4-gram and `xz -9`.

use std::collections::HashMap;
use std::io::Write;
use std::process::{Command, Stdio};

/// Bytes of context that the 4-gram sees.
const CONTEXT: usize = 3;

/// Counts of one context.
struct Counts {
    next: [u32; 256],
    total: u32,
    /// Different bytes seen.
    types: u32,
}

/// Bits per byte of `text` under a 4-gram over bytes that was counted on `train`.
///
/// Orders 0 to 3 are interpolated by Witten and Bell's rule: a context of `n` bytes with `t` different
/// successors gives the shorter context the weight `t / (n + t)`.
pub fn four_gram_bits_per_byte(train: &[u8], text: &[u8]) -> f64 {
    // Contexts of every order, keyed by their bytes; a leading 1 tells lengths apart.
    let mut counts: HashMap<u32, Counts> = HashMap::new();
    for at in 0..train.len() {
        for order in 0..=CONTEXT.min(at) {
            let seen = counts.entry(key(&train[at - order..at])).or_insert(Counts {
                next: [0; 256],
                total: 0,
                types: 0,
            });
            let next = &mut seen.next[usize::from(train[at])];
            seen.types += u32::from(*next == 0);
            *next += 1;
            seen.total += 1;
        }
    }
    let bits: f64 = (0..text.len())
        .map(|at| {
            let shorter_first = (0..=CONTEXT.min(at)).map(|order| &text[at - order..at]);
            let probability =
                shorter_first.fold(1.0 / 256.0, |shorter, context| match counts.get(&key(context)) {
                    Some(seen) => {
                        let (count, types) =
                            (f64::from(seen.next[usize::from(text[at])]), f64::from(seen.types));
                        (count + types * shorter) / (f64::from(seen.total) + types)
                    }
                    None => shorter,
                });
            -probability.log2()
        })
        .sum();
    bits / text.len().max(1) as f64
}

fn key(context: &[u8]) -> u32 {
    context.iter().fold(1, |key, byte| (key << 8) | u32::from(*byte))
}

/// Bits per byte of `text` after `xz -9`, or `None` when there is no xz on this machine.
pub fn xz_bits_per_byte(text: &[u8]) -> Option<f64> {
    let mut xz = Command::new("xz")
        .args(["-9", "--stdout"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut input = xz.stdin.take()?;
    let compressed = std::thread::scope(|scope| {
        let writer = scope.spawn(move || input.write_all(text));
        let output = xz.wait_with_output().ok()?;
        writer.join().ok()?.ok()?;
        output.status.success().then_some(output.stdout.len())
    })?;
    Some(compressed as f64 * 8.0 / text.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    #[test]
    fn noise_costs_eight_bits_and_repetition_next_to_none() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut noise = vec![0u8; 60_000];
        random.fill_bytes(&mut noise);
        let bits = four_gram_bits_per_byte(&noise[..50_000], &noise[50_000..]);
        assert!((7.9..9.5).contains(&bits), "{bits}");
        let text = "the same again ".repeat(1000);
        let bits = four_gram_bits_per_byte(text.as_bytes(), text.as_bytes());
        assert!(bits < 0.3, "{bits}");
    }

    /// Every context's probabilities sum to one, whatever was seen.
    #[test]
    fn probabilities_are_normalised() {
        let train = b"abracadabra";
        for context in ["", "a", "ab", "zzz", "rac"] {
            let total: f64 = (0..=255u8)
                .map(|byte| {
                    let long = [context.as_bytes(), &[byte]].concat();
                    let bits = four_gram_bits_per_byte(train, &long) * long.len() as f64;
                    let before = four_gram_bits_per_byte(train, context.as_bytes()) * context.len() as f64;
                    (before - bits).exp2()
                })
                .sum();
            assert!((total - 1.0).abs() < 1e-9, "{context:?}: {total}");
        }
    }
}
