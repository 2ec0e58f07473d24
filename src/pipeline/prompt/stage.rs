//! One tokenizer and its encoder, as one job uses them.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use super::super::tokenizer::{ClipTokenizer, Placeholder};
use super::textual_inversion::{BorrowedRows, TextualInversion};
use crate::context::JobContext;
use crate::error::{Error, Result};
use crate::models::{TextEncoder, TextEncoderOutput};

/// A tokenizer and the encoder that takes its ids.
pub(in crate::pipeline) struct TextStage {
    pub(in crate::pipeline) tokenizer: ClipTokenizer,
    pub(in crate::pipeline) encoder: TextEncoder,
}

/// A stage with what a job adds to it: tokens of its own, and the layer that it takes.
pub(super) struct StageRun<'a> {
    pub(super) tokenizer: &'a ClipTokenizer,
    encoder: &'a TextEncoder,
    /// Their ids are negative: the n-th vector's is -1 - n.
    placeholders: Vec<Placeholder>,
    /// `[hidden_size]` each, as the encoder's table has them.
    vectors: Vec<Tensor>,
    clip_skip: usize,
    device: Device,
    context: &'a JobContext,
    empty: OnceCell<Tensor>,
}

/// What an encoder makes of up to 75 tokens.
pub(super) struct Encoded {
    /// `[1, 77, hidden_size]`, of the layer that is asked for.
    pub(super) hidden: Tensor,
    /// `[1, projection_dim]`
    pub(super) pooled: Tensor,
}

impl<'a> StageRun<'a> {
    /// `index` is the encoder's place in the model: 0 or 1.
    pub(super) fn new(
        stage: &'a TextStage,
        index: usize,
        inversions: &[TextualInversion],
        clip_skip: Option<u32>,
        (device, context): (Device, &'a JobContext),
    ) -> Self {
        let (mut placeholders, mut vectors) = (Vec::new(), Vec::new());
        let table = stage.encoder.token_embedding();
        for inversion in inversions {
            let Some(added) = &inversion.vectors[index] else { continue };
            let first = vectors.len() as i64;
            let added = added.to_device(device).to_kind(table.kind());
            let count = added.size()[0];
            vectors.extend((0..count).map(|row| added.get(row)));
            let ids = (first..first + count).map(|n| -1 - n).collect();
            placeholders.push(Placeholder { text: inversion.token.clone(), ids });
        }
        StageRun {
            tokenizer: &stage.tokenizer,
            encoder: &stage.encoder,
            placeholders,
            vectors,
            clip_skip: clip_skip.unwrap_or(0) as usize,
            device,
            context,
            empty: OnceCell::new(),
        }
    }

    /// Ids of a text without start and end tokens; those of placeholders are negative.
    pub(super) fn ids(&self, text: &str) -> Result<Vec<i64>> {
        self.tokenizer.ids(text, &self.placeholders)
    }

    /// How many ids belong together from this one on: the vectors of one textual inversion.
    pub(super) fn run_length(&self, id: i64) -> usize {
        self.placeholders.iter().find(|added| added.ids[0] == id).map_or(1, |added| added.ids.len())
    }

    /// `ids`: 77, start and end tokens included.
    pub(super) fn encode(&self, ids: &[i64]) -> Result<Encoded> {
        self.output(ids, |input_ids| self.encoder.forward(input_ids))
    }

    /// The hidden state where tokens that are not `visible` are attended to by none.
    pub(super) fn encode_masked(&self, ids: &[i64], visible: &[bool]) -> Result<Tensor> {
        let mask = causal_mask(visible).to_kind(self.encoder.token_embedding().kind()).to_device(self.device);
        Ok(self.output(ids, |input_ids| self.encoder.forward_masked(input_ids, &mask))?.hidden)
    }

    /// The hidden state of the empty text: what fills up the shorter of two prompts.
    pub(super) fn empty(&self) -> Result<&Tensor> {
        if let Some(empty) = self.empty.get() {
            return Ok(empty);
        }
        let empty = self.encode(&self.tokenizer.frame(&[]).ids)?.hidden;
        Ok(self.empty.get_or_init(|| empty))
    }

    /// `hidden` `[1, 77 n, hidden_size]` with empty texts behind it, up to `tokens`.
    pub(super) fn padded(&self, hidden: Tensor, tokens: i64) -> Result<Tensor> {
        let mut parts = vec![hidden];
        let mut length = parts[0].size()[1];
        while length < tokens {
            parts.push(self.empty()?.shallow_clone());
            length += parts[parts.len() - 1].size()[1];
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1) })
    }

    fn output(&self, ids: &[i64], run: impl FnOnce(&Tensor) -> Result<TextEncoderOutput>) -> Result<Encoded> {
        self.context.check_cancelled()?; // a long text is many runs
        let (ids, _borrowed) = self.with_vectors(ids)?;
        let output = run(&Tensor::from_slice(&ids).unsqueeze(0).to_device(self.device))?;
        // the last layer but one, and further up by clip_skip
        let depth = self.clip_skip + 2;
        let index = output.hidden_states.len().checked_sub(depth).ok_or_else(|| {
            let most = output.hidden_states.len() - 2;
            Error::invalid("out_of_range", "clip_skip", format!("clip_skip must be at most {most} on this model"))
        })?;
        Ok(Encoded { hidden: output.hidden_states[index].shallow_clone(), pooled: output.pooled })
    }

    /// Puts rows of the table in the place of placeholders: those of ids that are not among `ids`, and all below the end
    /// token's, so that it stays the highest id, at which many encoders pool.
    fn with_vectors(&self, ids: &[i64]) -> Result<(Vec<i64>, Option<BorrowedRows>)> {
        let mut wanted: Vec<i64> = ids.iter().copied().filter(|id| *id < 0).collect();
        if wanted.is_empty() {
            return Ok((ids.to_vec(), None));
        }
        wanted.sort_unstable();
        wanted.dedup();
        let free: Vec<i64> =
            (0..self.tokenizer.eos()).rev().filter(|id| !ids.contains(id)).take(wanted.len()).collect();
        if free.len() < wanted.len() {
            return Err(anyhow::anyhow!("a vocabulary of {} has no ids to lend", self.tokenizer.vocab_size()).into());
        }
        let vectors: Vec<&Tensor> = wanted.iter().map(|id| &self.vectors[(-1 - id) as usize]).collect();
        let borrowed = BorrowedRows::new(self.encoder.token_embedding(), &free, &Tensor::stack(&vectors, 0))?;
        let real = |id: &i64| wanted.binary_search(id).map_or(*id, |place| free[place]);
        Ok((ids.iter().map(real).collect(), Some(borrowed)))
    }
}

/// `[1, 1, n, n]`: 0 where a token (row) sees another (column), minus infinity elsewhere.
fn causal_mask(visible: &[bool]) -> Tensor {
    let n = visible.len();
    let seen = |row: usize, column: usize| column <= row && visible[column];
    let values: Vec<f32> = (0..n * n).map(|i| if seen(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY }).collect();
    Tensor::from_slice(&values).view([1, 1, n as i64, n as i64]).to_kind(Kind::Float)
}
