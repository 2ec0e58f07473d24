//! `prompt_weighting: a1111`: the prompt syntax of AUTOMATIC1111's web UI, and what its weights do.

use tch::{Kind, Tensor};

use super::super::tokenizer::ClipTokenizer;
use super::stage::StageRun;
use crate::error::Result;

/// What one pair of brackets does to what is inside.
const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;

/// How far back from a chunk's end a comma may be where the chunk ends instead.
const COMMA_BACKTRACK: usize = 20;

/// A piece of a prompt.
#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String, f64),
    /// Fills up the chunk.
    Break,
}

/// Tokens that an encoder takes at once, and how much each counts.
#[derive(Debug, PartialEq)]
struct Chunk {
    ids: Vec<i64>,
    weights: Vec<f64>,
}

/// The hidden states of all chunks, `[1, 77 n, hidden_size]`, and the first one's pooled output.
pub(super) fn encode(run: &StageRun, text: &str) -> Result<(Tensor, Tensor)> {
    let mut hidden = Vec::new();
    let mut pooled = None;
    for chunk in chunks(run, &parse(text))? {
        let encoded = run.encode(&run.tokenizer.frame(&chunk.ids).ids)?;
        hidden.push(weighted(encoded.hidden, &chunk.weights));
        pooled.get_or_insert(encoded.pooled);
    }
    Ok((Tensor::cat(&hidden, 1), pooled.expect("a prompt has a chunk")))
}

/// Each token's vector times its weight; then all of the chunk brought back to the mean that it had.
fn weighted(hidden: Tensor, weights: &[f64]) -> Tensor {
    if weights.iter().all(|weight| *weight == 1.0) {
        return hidden;
    }
    let mut factors = vec![1.0f32; hidden.size()[1] as usize];
    for (factor, weight) in factors[1..].iter_mut().zip(weights) {
        *factor = *weight as f32;
    }
    let factors = Tensor::from_slice(&factors).view([1, -1, 1]).to_device(hidden.device());
    let before = hidden.to_kind(Kind::Float);
    let after = &before * factors;
    let restored = &after * (before.mean(Kind::Float) / after.mean(Kind::Float));
    restored.to_kind(hidden.kind())
}

/// Reads the brackets: `(text)`, `[text]`, `(text:1.3)`, nested in each other, and a backslash before a bracket that is
/// none. A bracket that is not closed acts to the end, one that was not opened is text. Neighbours of one weight are one
/// part, since a tokenizer may see a word across them.
fn parse(text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let mut taken = first.len_utf8();
        match first {
            '\\' => {
                let escaped = rest[1..].chars().next().filter(|c| "()[]\\".contains(*c));
                taken += escaped.map_or(0, char::len_utf8);
                parts.push(Part::Text(escaped.map(String::from).unwrap_or_default(), 1.0));
            }
            '(' => round.push(parts.len()),
            '[' => square.push(parts.len()),
            ')' if !round.is_empty() => multiply(&mut parts, round.pop(), ROUND),
            ']' if !square.is_empty() => multiply(&mut parts, square.pop(), SQUARE),
            ':' => match explicit_weight(rest) {
                Some((length, weight)) if !round.is_empty() => {
                    taken = length;
                    multiply(&mut parts, round.pop(), weight);
                }
                // without a bracket to end, it is text as it stands
                Some((length, _)) => {
                    taken = length;
                    parts.push(Part::Text(rest[..length].into(), 1.0));
                }
                None => parts.push(Part::Text(":".into(), 1.0)),
            },
            ')' | ']' => parts.push(Part::Text(first.into(), 1.0)),
            _ => {
                taken = rest.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(rest.len());
                push_with_breaks(&rest[..taken], &mut parts);
            }
        }
        rest = &rest[taken..];
    }
    for start in round {
        multiply(&mut parts, Some(start), ROUND);
    }
    for start in square {
        multiply(&mut parts, Some(start), SQUARE);
    }
    merged(parts)
}

fn multiply(parts: &mut [Part], start: Option<usize>, factor: f64) {
    for part in &mut parts[start.unwrap_or(0)..] {
        if let Part::Text(_, weight) = part {
            *weight *= factor;
        }
    }
}

/// `:1.3)` at the beginning of `text`: its length and the number.
fn explicit_weight(text: &str) -> Option<(usize, f64)> {
    let inside = &text[1..text.find(')')?];
    let number = inside.trim();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let plain = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
    Some((inside.len() + 2, number.parse().ok().filter(|_| plain)?))
}

/// `BREAK` as a word of its own is one; the white space around it goes with it.
fn push_with_breaks(text: &str, parts: &mut Vec<Part>) {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut start = 0;
    for (at, word) in text.match_indices("BREAK") {
        let end = at + word.len();
        if text[..at].ends_with(is_word) || text[end..].starts_with(is_word) {
            continue;
        }
        parts.push(Part::Text(text[start..at].trim_end().into(), 1.0));
        parts.push(Part::Break);
        start = end + (text[end..].len() - text[end..].trim_start().len());
    }
    parts.push(Part::Text(text[start..].into(), 1.0));
}

fn merged(parts: Vec<Part>) -> Vec<Part> {
    let mut merged: Vec<Part> = Vec::new();
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Part::Text(text, weight)), Part::Text(more, same)) if *weight == same => text.push_str(&more),
            (_, part) => merged.push(part),
        }
    }
    merged
}

/// Fills chunks of 75 tokens. One that would end within 20 tokens after a comma ends at the comma, and what follows it
/// begins the next. The vectors of one textual inversion stay together.
fn chunks(run: &StageRun, parts: &[Part]) -> Result<Vec<Chunk>> {
    let mut filler = Filler::new(run.tokenizer);
    for part in parts {
        let Part::Text(text, weight) = part else {
            filler.next();
            continue;
        };
        let ids = run.ids(text)?;
        let mut at = 0;
        while at < ids.len() {
            let together = run.run_length(ids[at]).min(ids.len() - at);
            filler.push(&ids[at..at + together], *weight);
            at += together;
        }
    }
    Ok(filler.finish())
}

struct Filler {
    chunks: Vec<Chunk>,
    chunk: Chunk,
    /// Where in the chunk the last comma is.
    last_comma: Option<usize>,
    comma: Option<i64>,
    length: usize,
}

impl Filler {
    fn new(tokenizer: &ClipTokenizer) -> Self {
        Filler {
            chunks: vec![],
            chunk: Chunk { ids: vec![], weights: vec![] },
            last_comma: None,
            comma: tokenizer.id(",</w>"),
            length: tokenizer.max_length() - 2,
        }
    }

    fn push(&mut self, ids: &[i64], weight: f64) {
        let filled = self.chunk.ids.len();
        if Some(ids[0]) == self.comma {
            self.last_comma = Some(filled);
        } else if filled == self.length
            && let Some(comma) = self.last_comma.filter(|comma| filled - comma <= COMMA_BACKTRACK)
        {
            let ids = self.chunk.ids.split_off(comma + 1);
            let weights = self.chunk.weights.split_off(comma + 1);
            self.next();
            self.chunk = Chunk { ids, weights };
        }
        if self.chunk.ids.len() + ids.len() > self.length {
            self.next();
        }
        self.chunk.ids.extend_from_slice(ids);
        self.chunk.weights.extend(ids.iter().map(|_| weight));
    }

    fn next(&mut self) {
        self.last_comma = None;
        self.chunks.push(std::mem::replace(&mut self.chunk, Chunk { ids: vec![], weights: vec![] }));
    }

    fn finish(mut self) -> Vec<Chunk> {
        if !self.chunk.ids.is_empty() || self.chunks.is_empty() {
            self.next();
        }
        self.chunks
    }
}

#[cfg(test)]
#[path = "a1111_tests.rs"]
mod tests;
