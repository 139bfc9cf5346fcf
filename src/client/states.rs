//! The newest states of a request's canvases, put together from keyframes and deltas.

use std::collections::{BTreeMap, BTreeSet};

use crate::proto::v1::frame::Content;
use crate::proto::{bits, v1};

/// What has come of a request: enough to go on from on any server.
#[derive(Clone, Debug, Default)]
pub(crate) struct States {
    accepted: Option<v1::Accepted>,
    /// With a keyframe each.
    frames: BTreeMap<u32, v1::Frame>,
    /// The token of masked positions, once one was seen.
    mask: Option<u32>,
    finished: BTreeSet<u32>,
}

impl States {
    /// Takes note of the first event; whether it is news.
    pub(crate) fn accepted(&mut self, accepted: &v1::Accepted) -> bool {
        let is_first = self.accepted.is_none();
        if is_first {
            self.accepted = Some(accepted.clone());
        }
        is_first
    }

    /// Takes note of a frame; whether it is news.
    pub(crate) fn frame(&mut self, mut frame: v1::Frame) -> bool {
        frame.text = None;
        if let Some(Content::Keyframe(key)) = &frame.content {
            let is_masked = |(at, _): &(usize, &u32)| {
                let byte = key.masked.get(at / 8).copied().unwrap_or(0);
                byte >> (at % 8) & 1 == 1
            };
            let masked = key.tokens.iter().enumerate().find(is_masked);
            self.mask = self.mask.or(masked.map(|(_, token)| *token));
        }
        let known = self.frames.get_mut(&frame.canvas);
        match (frame.content.take(), known) {
            (Some(Content::Keyframe(key)), known) => {
                let is_news = known.is_none_or(|known| {
                    let same = known.step == frame.step && known.nfe == frame.nfe;
                    !(same
                        && matches!(&known.content, Some(Content::Keyframe(old)) if old.tokens == key.tokens))
                });
                frame.content = Some(Content::Keyframe(key));
                self.frames.insert(frame.canvas, frame);
                is_news
            }
            (Some(Content::Delta(delta)), Some(known)) => {
                let Some(Content::Keyframe(mut key)) = known.content.take() else {
                    return true;
                };
                put(&mut key, &delta);
                key.masked = bits(key.tokens.iter().map(|token| Some(*token) == self.mask));
                frame.content = Some(Content::Keyframe(key));
                *known = frame;
                true
            }
            (Some(Content::Delta(_)) | None, _) => true,
        }
    }

    /// Takes note of a result; whether it is news.
    pub(crate) fn result(&mut self, result: &v1::CanvasResult) -> bool {
        self.finished.insert(result.canvas)
    }

    /// Whether all results have come.
    pub(crate) fn is_whole(&self) -> bool {
        let samples = self
            .accepted
            .as_ref()
            .and_then(|accepted| accepted.sampling)
            .map_or(1, |sampling| sampling.num_samples());
        self.finished.len() >= samples as usize
    }

    /// The newest state of a canvas, with a keyframe.
    pub(crate) fn newest(&self, canvas: u32) -> Option<&v1::Frame> {
        self.frames.get(&canvas)
    }

    /// What to go on from, once the request was accepted.
    pub(crate) fn resume(&self) -> Option<v1::Resume> {
        let accepted = self.accepted.clone()?;
        let running = self
            .frames
            .iter()
            .filter(|(canvas, _)| !self.finished.contains(canvas));
        Some(v1::Resume {
            accepted: Some(accepted),
            frames: running.map(|(_, newest)| newest.clone()).collect(),
            finished: self.finished.iter().copied().collect(),
        })
    }
}

/// Puts what has changed into a canvas; what lies outside of it is not.
fn put(key: &mut v1::Keyframe, delta: &v1::Delta) {
    for (index, &position) in delta.positions.iter().enumerate() {
        let position = position as usize;
        let news = delta.log_probabilities.get(index);
        if let (Some(value), Some(new)) = (key.log_probabilities.get_mut(position), news) {
            *value = *new;
        }
        for (values, news) in [
            (&mut key.tokens, &delta.tokens),
            (&mut key.committed_at, &delta.committed_at),
        ] {
            if let (Some(value), Some(new)) = (values.get_mut(position), news.get(index)) {
                *value = *new;
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const MASK: u32 = 9;

    fn frame(step: u32, content: Content) -> v1::Frame {
        v1::Frame {
            step,
            text: Some("told".to_owned()),
            content: Some(content),
            ..v1::Frame::default()
        }
    }

    #[test]
    fn deltas_are_put_into_the_keyframe_before_them() {
        let mut states = States::default();
        assert!(states.resume().is_none() && states.accepted(&v1::Accepted::default()));
        let key = v1::Keyframe {
            tokens: vec![MASK, 1, MASK],
            masked: vec![0b101],
            clamped: vec![0b010],
            committed_at: vec![0, 0, 0],
            log_probabilities: vec![0.0; 3],
        };
        assert!(states.frame(frame(0, Content::Keyframe(key.clone()))));
        assert!(
            !states.frame(frame(0, Content::Keyframe(key))),
            "the same once more is no news"
        );
        let delta = v1::Delta {
            positions: vec![2, 77],
            tokens: vec![4, 4],
            committed_at: vec![3, 3],
            log_probabilities: vec![-1.5, -2.0],
        };
        assert!(states.frame(frame(3, Content::Delta(delta))));
        let resume = states.resume().unwrap();
        let newest = &resume.frames[0];
        let wanted = v1::Keyframe {
            tokens: vec![MASK, 1, 4],
            masked: vec![0b001],
            clamped: vec![0b010],
            committed_at: vec![0, 0, 3],
            log_probabilities: vec![0.0, 0.0, -1.5],
        };
        assert_eq!((newest.step, &newest.text), (3, &None));
        assert_eq!(newest.content, Some(Content::Keyframe(wanted)));
        assert!(!states.is_whole());
        let result = v1::CanvasResult::default();
        assert!(states.result(&result) && !states.result(&result) && states.is_whole());
        let resume = states.resume().unwrap();
        assert_eq!((resume.frames.len(), resume.finished), (0, vec![0]));
    }
}
