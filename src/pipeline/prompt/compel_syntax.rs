//! The prompt syntax of compel 2 (`prompt_parser.py`), from text to weighted fragments.
//!
//! Its parser tries a quoted or bracketed text, and takes the characters as they stand where that fails: an open bracket
//! is no error. Here each is tried once, so that no prompt takes more than a moment.

use super::compel_words::{WHITE, number, quoted, signs, word_length};
use crate::error::{Error, Result};

/// A text for the tokenizer, and how much it counts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fragment {
    pub(super) text: String,
    pub(super) weight: f64,
}

/// What is encoded on its own.
#[derive(Debug, PartialEq)]
pub(super) enum Part {
    Prompt(Vec<Fragment>),
    /// `("a", "b").blend(0.7, 0.3)`: the weighted mean of their embeddings, or the sum with `no_normalize`.
    Blend {
        prompts: Vec<Vec<Fragment>>,
        weights: Vec<f64>,
        normalize: bool,
    },
}

/// Parts whose embeddings follow each other, each with its weight: one, or those of `("a", "b").and(1, 0.5)`.
pub(super) type Conjunction = Vec<(Part, f64)>;

/// More brackets in each other than anybody writes, and fewer than a thread's stack can hold.
const MAX_DEPTH: usize = 64;

/// # Errors
/// `unsupported_option` for `.swap()` and `withLora()`; `prompt_syntax` for a `.blend()` or `.and()` that cannot be.
pub(super) fn parse(text: &str, field: &str) -> Result<Conjunction> {
    if text.trim().is_empty() {
        return Ok(vec![(Part::Prompt(vec![Fragment { text: String::new(), weight: 1.0 }]), 1.0)]);
    }
    let text = space_after_commas(text);
    let mut parser = Parser { text: &text, field, depth: 0 };
    if let Some((targets, operator, options, _)) = parser.operation(&[".and", ".add"])? {
        let weights = parser.weights(&options, targets.len(), operator)?;
        let parts = targets.iter().map(|nodes| fragments(nodes)).zip(weights);
        // one without a word is left out
        return Ok(parts
            .filter(|(part, _)| !part.is_empty())
            .map(|(part, weight)| (Part::Prompt(part), weight))
            .collect());
    }
    if let Some((targets, operator, mut options, end)) = parser.operation(&[".blend"])? {
        if !text[end..].trim_matches(WHITE).is_empty() {
            return Err(parser.invalid("text follows `.blend(...)`", "put all of the prompt into the blend"));
        }
        let normalize = options.pop_if(|last| last == "no_normalize").is_none();
        let weights = parser.weights(&options, targets.len(), operator)?;
        let prompts: Vec<Vec<Fragment>> = targets.iter().map(|nodes| fragments(nodes)).collect();
        if prompts.iter().any(Vec::is_empty) {
            return Err(parser.invalid("a prompt of `.blend(...)` is empty", "give each of them a word"));
        }
        return Ok(vec![(Part::Blend { prompts, weights, normalize }, 1.0)]);
    }
    let words = fragments(&parser.prompt()?);
    Ok(if words.is_empty() { vec![] } else { vec![(Part::Prompt(words), 1.0)] })
}

/// A space behind each comma, as compel puts it.
fn space_after_commas(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        spaced.push(c);
        // what follows is taken along, so the second of two commas has none
        if c == ','
            && let Some(next) = chars.next_if(|next| !next.is_whitespace())
        {
            spaced.extend([' ', next]);
        }
    }
    spaced
}

#[derive(Debug)]
enum Node {
    Text(String),
    Attention(f64, Vec<Node>),
}

/// What an operator can follow.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    Quoted,
    Bracketed,
    Word,
}

struct Parser<'a> {
    text: &'a str,
    field: &'a str,
    /// Of brackets and quotes around the place.
    depth: usize,
}

/// Targets of an operation, its name, its options as they stand, and where it ends.
type Operation = (Vec<Vec<Node>>, &'static str, Vec<String>, usize);

impl Parser<'_> {
    /// A whole prompt: words with what can be made of brackets, quotes and signs, everything else as it stands.
    fn prompt(&mut self) -> Result<Vec<Node>> {
        let mut nodes = Vec::new();
        let mut at = self.skip_white(0);
        while at < self.text.len() {
            at = match self.item(at)? {
                Some((Item { target: Target::Word, plain: true, .. }, _)) | None => {
                    let end = self.text[at..].find(WHITE).map_or(self.text.len(), |length| at + length);
                    nodes.push(Node::Text(self.text[at..end].into()));
                    end
                }
                Some((item, end)) => {
                    nodes.extend(item.nodes);
                    end
                }
            };
            at = self.skip_white(at);
        }
        Ok(nodes)
    }

    /// What stands in brackets or quotes, up to the first place that fits nothing.
    fn inside(&mut self, mut at: usize) -> Result<(Vec<Node>, usize)> {
        let mut nodes = Vec::new();
        loop {
            let start = self.skip_white(at);
            if let Some((item, end)) = self.item(start)? {
                nodes.extend(item.nodes);
                at = end;
            } else if self.text[start..].starts_with([',', '.']) {
                nodes.push(Node::Text(self.text[start..=start].into()));
                at = start + 1;
            } else {
                return Ok((nodes, start));
            }
        }
    }

    /// A word, a bracket or a quote, with the operator behind it. `at` is no white space.
    fn item(&mut self, at: usize) -> Result<Option<(Item, usize)>> {
        let Some((target, nodes, end)) = self.target(at)? else { return Ok(None) };
        let rest = &self.text[end..];
        if let Some(weight) = self.after(end, ".attend").and_then(|open| self.attend(open)) {
            return Ok(Some((Item { target, nodes: vec![Node::Attention(weight.0, nodes)], plain: false }, weight.1)));
        }
        let weight = match target {
            Target::Word => signs(rest),
            Target::Quoted | Target::Bracketed => signs(rest).or_else(|| number(rest)),
        };
        if let Some((weight, length)) = weight {
            let attention = Node::Attention(weight, nodes);
            return Ok(Some((Item { target, nodes: vec![attention], plain: false }, end + length)));
        }
        if self.after(end, ".swap").is_some() {
            return Err(
                self.unsupported("`.swap()`", "compel's cross-attention control is not; describe one of the two")
            );
        }
        Ok(Some((Item { target, nodes, plain: true }, end)))
    }

    /// The weight in `.attend(...)`, and where that ends; `open` is behind the bracket.
    fn attend(&self, open: usize) -> Option<(f64, usize)> {
        let at = self.skip_white(open);
        let rest = &self.text[at..];
        let (weight, length) = signs(rest).or_else(|| number(rest))?;
        Some((weight, self.after_literal(at + length, ")")?))
    }

    fn target(&mut self, at: usize) -> Result<Option<(Target, Vec<Node>, usize)>> {
        match self.text[at..].chars().next() {
            Some('"') => {
                let Some((content, end)) = quoted(self.text, at) else { return Ok(None) };
                if content.trim().is_empty() {
                    return Ok(Some((Target::Quoted, vec![Node::Text(String::new())], end)));
                }
                let nodes = self.nested(&content, |parser| {
                    let (nodes, end) = parser.inside(0)?;
                    Ok((end == parser.text.len()).then_some(nodes))
                })?;
                Ok(nodes.map(|nodes| (Target::Quoted, nodes, end)))
            }
            Some('(') => {
                self.deeper()?;
                let (nodes, end) = self.inside(at + 1)?;
                self.depth -= 1;
                Ok(self.text[end..].starts_with(')').then_some((Target::Bracketed, nodes, end + 1)))
            }
            _ => match word_length(&self.text[at..]) {
                0 => Ok(None),
                length => {
                    let word = &self.text[at..at + length];
                    let call = |name: &str| word == name && self.after_literal(at + length, "(").is_some();
                    if call("withLora") || call("useLora") {
                        return Err(self.unsupported("`withLora()`", "name a LoRA as <lora:NAME:SCALE> or in `loras`"));
                    }
                    Ok(Some((Target::Word, vec![Node::Text(word.into())], at + length)))
                }
            },
        }
    }

    /// Reads a quote's content as a text of its own.
    fn nested<T>(&mut self, content: &str, read: impl FnOnce(&mut Parser) -> Result<Option<T>>) -> Result<Option<T>> {
        self.deeper()?;
        let nodes = read(&mut Parser { text: content, field: self.field, depth: self.depth });
        self.depth -= 1;
        nodes
    }

    fn deeper(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.invalid("brackets are nested too deeply", "at most 64 in each other are read"));
        }
        Ok(())
    }

    /// `(target, target).name(options)` at the beginning.
    fn operation(&mut self, names: &[&'static str]) -> Result<Option<Operation>> {
        let Some(mut at) = self.after_literal(0, "(") else { return Ok(None) };
        let mut targets = Vec::new();
        loop {
            at = self.skip_white(at);
            let (nodes, end) = match self.target(at)? {
                Some((_, nodes, end)) => (nodes, end),
                None => {
                    // a quote with anything in it is still a prompt
                    let Some((content, end)) = quoted(self.text, at) else { return Ok(None) };
                    let nodes = self.nested(&content, |parser| parser.prompt().map(Some))?;
                    (nodes.unwrap_or_default(), end)
                }
            };
            targets.push(nodes);
            match self.after_literal(end, ",") {
                Some(next) => at = next,
                None => {
                    at = end;
                    break;
                }
            }
        }
        let Some(close) = self.after_literal(at, ")") else { return Ok(None) };
        let found = names.iter().find_map(|name| Some((*name, self.after(close, name)?)));
        let Some((name, open)) = found else { return Ok(None) };
        let Some(length) = self.text[open..].find(')') else { return Ok(None) };
        let options = self.text[open..open + length].split(',').map(|option| option.trim_matches(WHITE).to_owned());
        let options: Vec<String> = options.collect();
        let options = if options == [""] { vec![] } else { options };
        Ok(Some((targets, name, options, open + length + 1)))
    }

    /// One weight for each target; none at all are ones.
    fn weights(&self, options: &[String], count: usize, operator: &str) -> Result<Vec<f64>> {
        if options.is_empty() {
            return Ok(vec![1.0; count]);
        }
        let weight = |text: &String| number(text).filter(|(_, length)| *length == text.len()).map(|(weight, _)| weight);
        let weights: Option<Vec<f64>> = options.iter().map(weight).collect();
        let remedy = "give one number for each prompt, or none";
        match weights {
            None => Err(self.invalid(&format!("`{operator}(...)` takes numbers"), remedy)),
            Some(weights) if weights.len() != count => {
                let what = format!("`{operator}(...)` has {} weights for {count} prompts", weights.len());
                Err(self.invalid(&what, remedy))
            }
            Some(weights) => Ok(weights),
        }
    }

    fn skip_white(&self, at: usize) -> usize {
        self.text.len() - self.text[at..].trim_start_matches(WHITE).len()
    }

    fn after_literal(&self, at: usize, literal: &str) -> Option<usize> {
        let at = self.skip_white(at);
        self.text[at..].starts_with(literal).then_some(at + literal.len())
    }

    /// Behind `name(`.
    fn after(&self, at: usize, name: &str) -> Option<usize> {
        self.after_literal(self.after_literal(at, name)?, "(")
    }

    fn invalid(&self, what: &str, remedy: &str) -> Error {
        Error::invalid("prompt_syntax", self.field, format!("{what} in `{}`", self.field)).remedy(remedy)
    }

    fn unsupported(&self, what: &str, remedy: &str) -> Error {
        let message = format!("{what} in `{}` is not supported", self.field);
        Error::invalid("unsupported_option", self.field, message).remedy(remedy)
    }
}

struct Item {
    target: Target,
    nodes: Vec<Node>,
    /// No operator follows.
    plain: bool,
}

/// The tree as a line: weights multiplied, neighbours of one weight in one fragment.
fn fragments(nodes: &[Node]) -> Vec<Fragment> {
    let mut flat = Vec::new();
    flatten(nodes, 1.0, &mut flat);
    let mut fused: Vec<Fragment> = Vec::new();
    for fragment in flat {
        match fused.last_mut() {
            Some(last) if last.weight == fragment.weight => {
                last.text = unescape(&format!("{} {}", last.text, fragment.text));
            }
            _ => fused.push(fragment),
        }
    }
    fused
}

fn flatten(nodes: &[Node], scale: f64, flat: &mut Vec<Fragment>) {
    for node in nodes {
        match node {
            Node::Text(text) => flat.push(Fragment { text: unescape(&unescape(text)), weight: scale }),
            Node::Attention(weight, nodes) => flatten(nodes, scale * weight, flat),
        }
    }
}

/// Brackets and quotes without their backslash. compel does so each time that it makes a fragment of another.
fn unescape(text: &str) -> String {
    text.replace("\\(", "(").replace("\\)", ")").replace("\\\"", "\"")
}

#[cfg(test)]
#[path = "compel_syntax_tests.rs"]
mod tests;
