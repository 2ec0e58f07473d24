//! `prompt_weighting: compel`: what compel 2 (`compel.py`, `embeddings_provider.py`) makes of a prompt for SDXL.
//!
//! A fragment that counts more is moved away from the embedding of the empty prompt. One that counts less is moved towards
//! it and, besides, the whole prompt towards its embedding with that fragment hidden.

use std::f64::consts::FRAC_PI_2;

use tch::{Kind, Tensor};

use super::super::tokenizer::ClipTokenizer;
use super::compel_syntax::{Fragment, Part, parse};
use super::stage::StageRun;
use crate::error::{Error, ErrorClass, Result};

/// Where a text that is longer than a chunk is cut: behind the last of these that fits; a later row where none does.
const SENTENCE_ENDS: [&str; 1] = [".</w>"];
const PHRASE_ENDS: [&str; 4] = [".</w>", ",</w>", ";</w>", ":</w>"];
const WORD_END: &str = "</w>";

/// Each fragment that counts less than 1 is one more run of the encoder.
const MAX_LESSENED: usize = 128;

/// compel's smallest weight, so that the tangent stays finite.
const EPSILON: f64 = 1e-5;

/// The hidden states `[1, 77 n, hidden_size]`, and the pooled output of the text as it stands, as compel has it.
pub(super) fn encode(run: &StageRun, text: &str, field: &str) -> Result<(Tensor, Tensor)> {
    let mut hidden = Vec::new();
    for (part, weight) in parse(text, field)? {
        let part = match part {
            Part::Prompt(fragments) => prompt(run, &fragments, field)?,
            Part::Blend { prompts, weights, normalize } => blend(run, &prompts, &weights, normalize, field)?,
        };
        hidden.push(if weight == 1.0 { part } else { from_empty(run, part, weight)? });
    }
    if hidden.is_empty() {
        hidden.push(run.empty()?.shallow_clone());
    }
    let pooled = run.encode(&run.tokenizer.frame(&run.ids(text)?).ids)?.pooled;
    Ok((Tensor::cat(&hidden, 1), pooled))
}

/// Moves an embedding away from that of the empty prompt, `weight` times as far as it is.
fn from_empty(run: &StageRun, hidden: Tensor, weight: f64) -> Result<Tensor> {
    let empty = run.padded(run.empty()?.shallow_clone(), hidden.size()[1])?.to_kind(Kind::Float);
    Ok((&empty + (hidden.to_kind(Kind::Float) - &empty) * weight).to_kind(hidden.kind()))
}

fn blend(run: &StageRun, prompts: &[Vec<Fragment>], weights: &[f64], normalize: bool, field: &str) -> Result<Tensor> {
    let parts = prompts.iter().map(|fragments| prompt(run, fragments, field)).collect::<Result<Vec<_>>>()?;
    let tokens = parts.iter().map(|part| part.size()[1]).max().unwrap_or(0);
    let total = if normalize { weights.iter().sum() } else { 1.0 };
    let (kind, mut sum) = (parts[0].kind(), None);
    for (part, weight) in parts.into_iter().zip(weights) {
        let part = run.padded(part, tokens)?.to_kind(Kind::Float) * (weight / total);
        sum = Some(sum.map_or_else(|| part.shallow_clone(), |sum: Tensor| sum + &part));
    }
    Ok(sum.expect("a blend has prompts").to_kind(kind))
}

/// Ids in chunks as the encoder takes them, each with its weight.
struct Chunk {
    ids: Vec<i64>,
    weights: Vec<f32>,
}

/// One prompt's fragments, `[1, 77 n, hidden_size]`.
fn prompt(run: &StageRun, fragments: &[Fragment], field: &str) -> Result<Tensor> {
    let (mut ids, mut weights, mut lessened) = (Vec::new(), Vec::new(), Vec::new());
    for fragment in fragments {
        let own = run.ids(&fragment.text)?;
        if fragment.weight < 1.0 && !own.is_empty() {
            lessened.push((ids.len()..ids.len() + own.len(), fragment.weight));
        }
        weights.extend(own.iter().map(|_| fragment.weight as f32));
        ids.extend(own);
    }
    if lessened.len() > MAX_LESSENED {
        let message = format!("`{field}` lessens {} fragments, at most {MAX_LESSENED} are computed", lessened.len());
        return Err(Error::new(ErrorClass::TooLarge, "too_large", message)
            .field(field)
            .remedy("put fragments of one weight side by side: they are one"));
    }
    let (chunks, places) = chunks(run.tokenizer, &ids, &weights);
    // where the hidden ones are, and how much the prompt without them counts
    let lessened: Vec<(usize, usize, f64)> = lessened
        .into_iter()
        .map(|(range, weight)| {
            let share = ((1.0 - weight.max(EPSILON)) * FRAC_PI_2).tan();
            (places[range.start], places[range.end - 1], share)
        })
        .collect();
    let total = 1.0 + lessened.iter().map(|(_, _, share)| share).sum::<f64>();

    let length = run.tokenizer.max_length();
    let mut hidden = Vec::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let whole = weighted(run, run.encode(&chunk.ids)?.hidden, &chunk.weights)?;
        let here = index * length..(index + 1) * length;
        let (touching, elsewhere): (Vec<_>, Vec<_>) =
            lessened.iter().partition(|(first, last, _)| *first < here.end && here.start <= *last);
        if touching.is_empty() {
            hidden.push(whole);
            continue;
        }
        let share = 1.0 + elsewhere.iter().map(|(_, _, share)| share).sum::<f64>();
        let mut sum = whole.to_kind(Kind::Float) * (share / total);
        for (first, last, share) in touching {
            // start and end of each chunk stay visible
            let is_edge = |place: usize| place == here.start || place + 1 == here.end;
            let visible: Vec<bool> =
                here.clone().map(|place| is_edge(place) || !(first..=last).contains(&place)).collect();
            let without = weighted(run, run.encode_masked(&chunk.ids, &visible)?, &chunk.weights)?;
            sum += without.to_kind(Kind::Float) * (share / total);
        }
        hidden.push(sum.to_kind(whole.kind()));
    }
    Ok(Tensor::cat(&hidden, 1))
}

/// Each token moved away from the empty prompt's; one of weight 1 stays as it is to the bit.
fn weighted(run: &StageRun, hidden: Tensor, weights: &[f32]) -> Result<Tensor> {
    if weights.iter().all(|weight| *weight == 1.0) {
        return Ok(hidden);
    }
    let (whole, empty) = (hidden.to_kind(Kind::Float), run.empty()?.to_kind(Kind::Float));
    let weights = Tensor::from_slice(weights).view([1, -1, 1]).to_device(hidden.device());
    let moved = &empty + (&whole - &empty) * &weights;
    Ok(whole.where_self(&weights.eq(1.0), &moved).to_kind(hidden.kind()))
}

/// The chunks, and where in all of them together each of the ids is.
fn chunks(tokenizer: &ClipTokenizer, ids: &[i64], weights: &[f32]) -> (Vec<Chunk>, Vec<usize>) {
    let length = tokenizer.max_length();
    let (mut chunks, mut places) = (Vec::new(), Vec::new());
    let mut start = 0;
    loop {
        let count = split_point(tokenizer, &ids[start..], length - 2);
        let mut own = vec![1.0];
        own.extend_from_slice(&weights[start..start + count]);
        own.resize(length, 1.0);
        places.extend((0..count).map(|offset| chunks.len() * length + 1 + offset));
        chunks.push(Chunk { ids: tokenizer.frame(&ids[start..start + count]).ids, weights: own });
        start += count;
        if start == ids.len() {
            return (chunks, places);
        }
    }
}

/// How many of the ids the next chunk takes.
fn split_point(tokenizer: &ClipTokenizer, ids: &[i64], most: usize) -> usize {
    if ids.len() <= most {
        return ids.len();
    }
    let tokens: Vec<String> = ids[..most].iter().map(|id| tokenizer.token(*id).unwrap_or_default()).collect();
    let last = |ends: &dyn Fn(&str) -> bool| tokens.iter().rposition(|token| ends(token));
    let end = last(&|token| SENTENCE_ENDS.contains(&token))
        .or_else(|| last(&|token| PHRASE_ENDS.contains(&token)))
        .or_else(|| last(&|token| token.ends_with(WORD_END)));
    end.map_or(most, |end| end + 1)
}
