//! Sums over a row of log-scores, a block at a time.
//!
//! A row of a large vocabulary is read once for its maximum and once for its sum, out of the cache; the sums
//! of blocks stay, so that an inverse CDF needs to look into one block only. Loops are vectorised for the
//! processor at hand by `pulp`. None of them rounds differently on another processor: sums run in a fixed
//! number of lanes, and which products are fused with additions is written down.
#![expect(
    clippy::inline_always,
    reason = "must be compiled with the caller's instruction set"
)]

/// Entries of one block.
pub(super) const BLOCK: usize = 256;
/// Sums that run side by side.
const LANES: usize = 16;
/// Below this, `2^y` in f32 loses digits and then its range: taken as zero, 1e-37 of the row's maximum.
const LOWEST: f32 = -125.0;

/// The block of a row, and what it costs to see it whole.
#[derive(Clone, Debug)]
pub(super) struct Buffer([f32; BLOCK]);

impl Default for Buffer {
    fn default() -> Self {
        Self([f32::NEG_INFINITY; BLOCK])
    }
}

/// A row of log-scores whose entry at the current token counts as minus infinity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    entries: &'a [f32],
    current: usize,
}

impl<'a> Row<'a> {
    pub(super) fn new(entries: &'a [f32], current: usize) -> Self {
        Self { entries, current }
    }

    fn blocks(&self) -> usize {
        self.entries.len().div_ceil(BLOCK)
    }

    /// Block `index`, filled up with minus infinity to whole lanes.
    #[inline(always)]
    fn block<'b>(&self, index: usize, buffer: &'b mut Buffer) -> &'b [f32]
    where
        'a: 'b,
    {
        let first = index * BLOCK;
        let part = &self.entries[first..self.entries.len().min(first + BLOCK)];
        let holds_current = (first..first + part.len()).contains(&self.current);
        if part.len().is_multiple_of(LANES) && !holds_current {
            return part;
        }
        let whole = &mut buffer.0[..part.len().next_multiple_of(LANES)];
        let (head, tail) = whole.split_at_mut(part.len());
        head.copy_from_slice(part);
        tail.fill(f32::NEG_INFINITY);
        if holds_current {
            head[self.current - first] = f32::NEG_INFINITY;
        }
        whole
    }

    /// The largest log-score; NaN entries are passed over.
    pub(super) fn maximum(&self) -> f32 {
        vectorised(
            #[inline(always)]
            || {
                let (mut buffer, mut lanes) = (Buffer::default(), [f32::NEG_INFINITY; LANES]);
                for index in 0..self.blocks() {
                    for entries in self.block(index, &mut buffer).chunks_exact(LANES) {
                        for (lane, &entry) in lanes.iter_mut().zip(entries) {
                            *lane = if entry > *lane { entry } else { *lane };
                        }
                    }
                }
                lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
            },
        )
    }

    /// The log-score of the second of the entries in descending order; NaN entries are passed over.
    pub(super) fn second(&self) -> f32 {
        vectorised(
            #[inline(always)]
            || {
                let mut buffer = Buffer::default();
                let (mut first, mut second) = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
                for index in 0..self.blocks() {
                    for entries in self.block(index, &mut buffer).chunks_exact(LANES) {
                        for ((first, second), &entry) in first.iter_mut().zip(&mut second).zip(entries) {
                            let lower = if entry > *first { *first } else { entry };
                            *second = if lower > *second { lower } else { *second };
                            *first = if entry > *first { entry } else { *first };
                        }
                    }
                }
                let mut largest = [f32::NEG_INFINITY; 2];
                for entry in first.into_iter().chain(second) {
                    if entry > largest[0] {
                        largest = [entry, largest[0]];
                    } else if entry > largest[1] {
                        largest[1] = entry;
                    }
                }
                largest[1]
            },
        )
    }

    /// For every block, the sum of `weight` over its entries: NaN where an entry is.
    pub(super) fn sums(&self, weight: &Weight, sums: &mut Vec<f64>) {
        self.reduce(
            #[inline(always)]
            |entry| weight.of(entry),
            sums,
        );
    }

    /// For every block, the sum of `term` over its entries.
    #[inline(always)]
    fn reduce(&self, term: impl Fn(f32) -> f32, sums: &mut Vec<f64>) {
        sums.clear();
        vectorised(
            #[inline(always)]
            || {
                let mut buffer = Buffer::default();
                for index in 0..self.blocks() {
                    let mut lanes = [0.0_f32; LANES];
                    for entries in self.block(index, &mut buffer).chunks_exact(LANES) {
                        for (lane, &entry) in lanes.iter_mut().zip(entries) {
                            *lane += term(entry);
                        }
                    }
                    sums.push(lanes.iter().map(|&lane| f64::from(lane)).sum());
                }
            },
        );
    }

    /// The sum of `(l - top) e^(l - top)` over all entries: what entropies are made of.
    pub(super) fn mean_exponent(&self, top: f32, sums: &mut Vec<f64>) -> f64 {
        let slope = std::f32::consts::LOG2_E;
        self.reduce(
            #[inline(always)]
            |entry| {
                let y = (entry - top) * slope;
                let product = exp2(y) * y;
                // Not zero times minus infinity.
                if y < LOWEST { 0.0 } else { product }
            },
            sums,
        );
        sums.iter().sum::<f64>() * std::f64::consts::LN_2
    }

    /// The first entry at which the running sum of `weight` over block `index` exceeds `target`, or the last
    /// one with any weight.
    pub(super) fn find(&self, index: usize, weight: &Weight, target: f64) -> Option<usize> {
        let (mut buffer, mut weights) = (Buffer::default(), [0.0; BLOCK]);
        vectorised(
            #[inline(always)]
            || {
                for (weight_of, &entry) in weights.iter_mut().zip(self.block(index, &mut buffer)) {
                    *weight_of = weight.of(entry);
                }
            },
        );
        let (mut below, mut last) = (0.0, None);
        for (at, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            below += f64::from(weight);
            last = Some(index * BLOCK + at);
            if target < below {
                break;
            }
        }
        last
    }

    /// Computes the weight of every entry.
    pub(super) fn weights(&self, weight: &Weight, weights: &mut Vec<f64>) {
        weights.resize(self.entries.len(), 0.0);
        vectorised(
            #[inline(always)]
            || {
                // A loop: what iterators do for themselves is compiled for any processor, unless it is inlined.
                for (weight_of, &entry) in weights.iter_mut().zip(self.entries) {
                    *weight_of = f64::from(weight.of(entry));
                }
            },
        );
        weights[self.current] = 0.0;
    }

    /// The lowest index of the largest entry.
    pub(super) fn likeliest(&self) -> Option<usize> {
        let top = self.maximum();
        (0..self.entries.len()).find(|&y| y != self.current && self.entries[y] == top)
    }
}

/// The weight of an entry `l`: `max(e^((l - top) / temperature) - lost, 0)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weight {
    /// The row's maximum.
    top: f32,
    /// `log2(e)` over the temperature.
    slope: f32,
    lost: f32,
}

impl Weight {
    pub(super) fn new(top: f32) -> Self {
        Self {
            top,
            slope: std::f32::consts::LOG2_E,
            lost: 0.0,
        }
    }

    pub(super) fn tempered(self, temperature: f64) -> Self {
        // Lower temperatures than f32 can tell from 0 take the likeliest token all the same.
        let slope = (std::f64::consts::LOG2_E / temperature).min(1e30) as f32;
        Self { slope, ..self }
    }

    pub(super) fn less(self, lost: f64) -> Self {
        let lost = lost as f32;
        Self { lost, ..self }
    }

    /// What entries lose, relative to the row's maximum, if anything.
    pub(super) fn lost(&self) -> Option<f64> {
        self.loses().then_some(f64::from(self.lost))
    }

    /// Whether entries lose anything.
    pub(super) fn loses(&self) -> bool {
        self.lost != 0.0
    }

    #[inline(always)]
    fn of(&self, entry: f32) -> f32 {
        let weight = exp2((entry - self.top) * self.slope) - self.lost;
        // Not `max`, which would hide NaN.
        if weight < 0.0 { 0.0 } else { weight }
    }
}

/// Runs `work` with the widest instructions this processor has.
pub(super) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `2^y` for `y <= 0`, good to 1e-7 and branch-free, so that loops over it vectorise; 0 below [`LOWEST`].
///
/// Cephes' `exp2f`: `y = n + f` with `|f| <= 1/2`, a degree-6 polynomial in `f`, and `n` added to the exponent's
/// bits. Fused products round alike on all processors.
#[inline(always)]
fn exp2(y: f32) -> f32 {
    /// Adding 1.5 * 2^23 rounds to an integer that sits in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;

    let shifted = y + ROUND;
    let f = y - (shifted - ROUND);
    let mut p = 1.535_336_2e-4_f32;
    for coefficient in [
        1.339_887_4e-3,
        9.618_437e-3,
        5.550_332_5e-2,
        2.402_264_8e-1,
        6.931_472e-1,
        1.0,
    ] {
        p = p.mul_add(f, coefficient);
    }
    let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if y < LOWEST { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_good_to_a_ten_millionth() {
        let mut y = 0.0_f32;
        while y > LOWEST {
            let error = (f64::from(exp2(y)) / f64::from(y).exp2() - 1.0).abs();
            assert!(error < 1.2e-7, "{y}: {error}");
            y -= 0.000_917;
        }
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    /// Vectorised for whatever processor runs this, against the same sums one entry at a time.
    #[test]
    fn sums_have_the_same_bits_on_every_processor() {
        let row: Vec<f32> = (0..1000).map(|i| -((i * 7919 % 1000) as f32) / 61.0).collect();
        let mut sums = Vec::new();
        Row::new(&row, 300).sums(&Weight::new(0.0), &mut sums);
        for (index, sum) in sums.iter().enumerate() {
            let mut lanes = [0.0_f32; LANES];
            for (i, &entry) in row.iter().enumerate().skip(index * BLOCK).take(BLOCK) {
                lanes[i % LANES] += if i == 300 { 0.0 } else { Weight::new(0.0).of(entry) };
            }
            assert_eq!(*sum, lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>());
        }
    }

    #[test]
    fn the_current_entry_is_not_read() {
        let row = [-1.0, f32::NAN, -3.0];
        let mut sums = Vec::new();
        let row = Row::new(&row, 1);
        assert_eq!((row.maximum(), row.likeliest()), (-1.0, Some(0)));
        row.sums(&Weight::new(0.0), &mut sums);
        assert!((sums[0] - ((-1.0_f64).exp() + (-3.0_f64).exp())).abs() < 1e-7);
        assert_eq!(row.find(0, &Weight::new(0.0), sums[0] * 0.99), Some(2));
    }
}
