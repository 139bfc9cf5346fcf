//! From rows of log-scores to new tokens, for a whole batch.

use std::ops::Range;
use std::thread;

use super::canvas::{Candidate, Canvas};
use crate::diffusion::sampler::row::{BadScores, Scratch};
use crate::network::ScoreRows;

/// What the rows of one canvas gave.
pub(super) type Moves = Vec<Candidate>;

/// Log-scores that are worth a thread: about a millisecond of reading, and starting a thread takes a
/// twentieth of that.
const ENTRIES_PER_THREAD: usize = 1 << 20;

/// Draws what becomes of the `wanted` positions of every canvas, whose `scores` follow one another.
///
/// Which thread draws a row makes no difference to what is drawn.
pub(super) fn draw(
    canvases: &[&Canvas],
    wanted: &[Vec<usize>],
    scores: &ScoreRows<'_>,
    threads: usize,
) -> Vec<Result<Moves, BadScores>> {
    let rows: usize = wanted.iter().map(Vec::len).sum();
    let useful = (rows * scores.vocab()).div_ceil(ENTRIES_PER_THREAD);
    let threads = threads.min(useful).max(1);
    let part = |index: usize| {
        let range = rows * index / threads..rows * (index + 1) / threads;
        draw_rows(canvases, wanted, scores, &range)
    };
    let part = &part;
    let mut outcomes: Vec<Result<Moves, BadScores>> = vec![Ok(Moves::new()); canvases.len()];
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|index| scope.spawn(move || part(index)))
            .collect();
        let mut parts = vec![part(0)];
        for other in others {
            parts.push(
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        for (canvas, drawn) in parts.into_iter().flatten() {
            outcomes[canvas] = match (std::mem::replace(&mut outcomes[canvas], Err(BadScores)), drawn) {
                (Ok(mut moves), Ok(more)) => {
                    moves.extend(more);
                    Ok(moves)
                }
                _ => Err(BadScores),
            };
        }
    });
    outcomes
}

/// Draws rows `range` of the batch; for every canvas that has some of them, its number and its moves.
fn draw_rows(
    canvases: &[&Canvas],
    wanted: &[Vec<usize>],
    scores: &ScoreRows<'_>,
    range: &Range<usize>,
) -> Vec<(usize, Result<Moves, BadScores>)> {
    let (mut drawn, mut scratch) = (Vec::new(), Scratch::default());
    let mut first = 0;
    for (index, (canvas, positions)) in canvases.iter().zip(wanted).enumerate() {
        let own = range.start.clamp(first, first + positions.len())
            ..range.end.clamp(first, first + positions.len());
        if !own.is_empty() {
            let mut rows = canvas.rows();
            let moves = own.filter_map(|row| {
                let position = positions[row - first];
                rows.draw(position, scores.row(row), &mut scratch).transpose()
            });
            drawn.push((index, moves.collect()));
        }
        first += positions.len();
    }
    drawn
}
