//! From rows of log-scores to new tokens, for a whole batch.

use std::ops::Range;
use std::thread;

use super::job::Job;
use crate::diffusion::Token;
use crate::diffusion::sampler::row::{RowError, Scratch};
use crate::diffusion::sampler::{Candidate, Evaluation};
use crate::network::ScoreRows;

/// Candidates of one canvas.
pub(super) type Moves = Vec<Candidate>;

/// Log-scores that are worth a thread: about a millisecond of reading, and starting a thread takes a
/// twentieth of that.
const ENTRIES_PER_THREAD: usize = 1 << 20;

/// A job and what was asked about it.
#[derive(Debug)]
pub(super) struct Task<'a> {
    pub(super) job: &'a Job,
    pub(super) evaluation: &'a Evaluation,
    /// Where this is the second evaluation of a step.
    pub(super) between: Option<Between<'a>>,
}

/// The canvas in between of a second evaluation, and the rows of the first.
#[derive(Debug)]
pub(super) struct Between<'a> {
    pub(super) tokens: &'a [Token],
    /// The first evaluation's rows for the positions of the second, side by side.
    pub(super) rows: &'a [f32],
    /// Offset that makes log-scores of them.
    pub(super) offset: f64,
}

/// Draws what becomes of the positions that every evaluation is about, whose `scores` follow one another.
///
/// Which thread draws a row makes no difference to what is drawn.
pub(super) fn draw(
    asked: &[Task<'_>],
    scores: &ScoreRows<'_>,
    threads: usize,
) -> Vec<Result<Moves, RowError>> {
    let rows: usize = asked.iter().map(|asked| asked.evaluation.positions.len()).sum();
    let useful = (rows * scores.vocab()).div_ceil(ENTRIES_PER_THREAD);
    let threads = threads.min(useful).max(1);
    let part = |index: usize| {
        let range = rows * index / threads..rows * (index + 1) / threads;
        draw_rows(asked, scores, &range)
    };
    let part = &part;
    let mut outcomes: Vec<Result<Moves, RowError>> = vec![Ok(Moves::new()); asked.len()];
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
            add(&mut outcomes[canvas], drawn);
        }
    });
    outcomes
}

/// Adds what more rows of a canvas gave to what the rows before them did.
pub(super) fn add(outcome: &mut Result<Moves, RowError>, more: Result<Moves, RowError>) {
    match (&mut *outcome, more) {
        (Ok(moves), Ok(more)) => moves.extend(more),
        (Ok(_), Err(error)) => *outcome = Err(error),
        (Err(_), _) => {}
    }
}

/// Draws rows `range` of the batch; for every canvas that has some of them, its number and its moves.
fn draw_rows(
    asked: &[Task<'_>],
    scores: &ScoreRows<'_>,
    range: &Range<usize>,
) -> Vec<(usize, Result<Moves, RowError>)> {
    let (mut drawn, mut scratch, mut row_buffer) = (Vec::new(), Scratch::default(), Vec::new());
    let (mut first, vocab) = (0, scores.vocab());
    for (
        index,
        Task {
            job,
            evaluation,
            between,
        },
    ) in asked.iter().enumerate()
    {
        let positions = &evaluation.positions;
        let own = range.start.clamp(first, first + positions.len())
            ..range.end.clamp(first, first + positions.len());
        if !own.is_empty() {
            let mut rows = job.rows(evaluation);
            if let Some(between) = between {
                rows = rows.about(between.tokens);
            }
            let moves = own.filter_map(|row| {
                let at = row - first;
                let kept = between.as_ref().map(|between| {
                    let row = &between.rows[at * vocab..(at + 1) * vocab];
                    (row, between.offset)
                });
                let log_score = scores.row_in(row, &mut row_buffer);
                rows.draw(positions[at], log_score, kept, &mut scratch)
                    .transpose()
            });
            drawn.push((index, moves.collect()));
        }
        first += positions.len();
    }
    drawn
}
