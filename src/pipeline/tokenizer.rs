//! CLIP's tokenizer from a model's own files, equal id by id to `transformers.CLIPTokenizer`.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, normalizers::replace::ReplacePattern};

use crate::error::{Error, Result};

/// How CLIP cuts a text into words before the byte pairs.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Of CLIP, one a line after a comment; from OpenAI's `bpe_simple_vocab_16e6.txt` (MIT).
const MERGES: &str = include_str!("../../torchscript/archs/sdxl/tokenizer/merges.txt");

pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    max_length: usize,
    bos: i64,
    eos: i64,
    pad: i64,
}

/// A token beside the vocabulary, and what it stands for: ids that no vocabulary has.
pub(super) struct Placeholder {
    pub(super) text: String,
    pub(super) ids: Vec<i64>,
}

/// A text as the encoder takes it.
pub struct TokenIds {
    /// Padded and cut to `model_max_length`, start and end tokens included.
    pub ids: Vec<i64>,
    /// Whether text was cut off.
    pub truncated: bool,
}

impl ClipTokenizer {
    /// Reads `tokenizer.json` where there is one, else `vocab.json` and `merges.txt`.
    pub fn load(dir: &Path) -> Result<Self> {
        let invalid = |e: Box<dyn std::error::Error + Send + Sync>| {
            Error::setup("model_invalid", format!("the tokenizer in {} cannot be read", dir.display()))
                .source(anyhow::anyhow!(e))
                .remedy("the folder needs tokenizer.json, or vocab.json and merges.txt")
        };
        let config = read_optional_json(&dir.join("tokenizer_config.json"))?;
        let special = SpecialTokens::new(&config, &read_optional_json(&dir.join("special_tokens_map.json"))?);
        let whole = dir.join("tokenizer.json");
        let tokenizer = if whole.is_file() {
            Tokenizer::from_file(&whole).map_err(invalid)?
        } else {
            let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
            from_vocab(BPE::from_file(&path("vocab.json"), &path("merges.txt")), &special).map_err(invalid)?
        };
        Self::new(tokenizer, &config, &special).map_err(invalid)
    }

    /// The vocabulary of CLIP, for a checkpoint that comes without one: `tokenizer` or `tokenizer_2`, which pad differently.
    pub fn clip(name: &str) -> Result<Self> {
        let pad = if name == "tokenizer_2" { "!" } else { "<|endoftext|>" };
        let token = |content: &str| json!({ "content": content, "normalized": true });
        let map = json!({ "bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"),
            "unk_token": token("<|endoftext|>"), "pad_token": pad });
        let special = SpecialTokens::new(&Value::Null, &map);
        let merges: Vec<(String, String)> =
            MERGES.lines().skip(1).filter_map(|line| line.split_once(' ')).map(|(a, b)| (a.into(), b.into())).collect();
        let bpe = BPE::builder().vocab_and_merges(vocabulary(&merges), merges);
        let new = || Self::new(from_vocab(bpe, &special)?, &Value::Null, &special);
        new().map_err(|e| Error::from(anyhow::anyhow!(e).context("CLIP's vocabulary")))
    }

    fn new(mut tokenizer: Tokenizer, config: &Value, special: &SpecialTokens) -> tokenizers::Result<Self> {
        let max_length = config.get("model_max_length").and_then(Value::as_u64).unwrap_or(77) as usize;
        let id = |key: &str| {
            let id = tokenizer.token_to_id(&special.content(key));
            id.map(i64::from).ok_or_else(|| format!("{key} is not in the vocabulary"))
        };
        let (bos, eos, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);
        // start, end, cut and padding are ours, whatever a tokenizer.json says of them
        tokenizer.with_truncation(None)?.with_padding(None);
        Ok(ClipTokenizer { tokenizer, max_length, bos, eos, pad })
    }

    /// The whole text as one sequence, with start and end tokens.
    pub fn encode(&self, text: &str) -> Result<TokenIds> {
        Ok(self.frame(&self.ids(text, &[])?))
    }

    /// A text's own ids, without start and end tokens, however many they are. `added` tokens are found first, in any
    /// case, the longest first, as `transformers` finds tokens that were added to a vocabulary.
    pub(super) fn ids(&self, text: &str, added: &[Placeholder]) -> Result<Vec<i64>> {
        let mut ids = Vec::new();
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            let found = added.iter().filter_map(|token| Some((prefix_length(&text[at..], &token.text)?, token)));
            if let Some((length, token)) = found.max_by_key(|(length, _)| *length) {
                self.append(&text[start..at], &mut ids)?;
                ids.extend_from_slice(&token.ids);
                at += length;
                start = at;
            } else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
            }
        }
        self.append(&text[start..], &mut ids)?;
        Ok(ids)
    }

    fn append(&self, text: &str, ids: &mut Vec<i64>) -> Result<()> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|e| Error::from(anyhow::anyhow!(e).context("a text could not be tokenized")))?;
        ids.extend(encoding.get_ids().iter().map(|&id| i64::from(id)));
        Ok(())
    }

    /// The ids as an encoder takes them.
    pub(super) fn frame(&self, ids: &[i64]) -> TokenIds {
        let fitting = ids.len().min(self.max_length - 2);
        let mut framed = vec![self.bos];
        framed.extend_from_slice(&ids[..fitting]);
        framed.push(self.eos);
        framed.resize(self.max_length, self.pad);
        TokenIds { ids: framed, truncated: fitting < ids.len() }
    }

    /// The id of a token as the vocabulary spells it: `,</w>` is a comma that ends a word.
    pub(super) fn id(&self, token: &str) -> Option<i64> {
        self.tokenizer.token_to_id(token).map(i64::from)
    }

    /// Whether the vocabulary has this token, in any case.
    pub(super) fn knows(&self, token: &str) -> bool {
        self.id(token).is_some() || self.id(&token.to_lowercase()).is_some()
    }

    /// A token as the vocabulary spells it.
    pub(super) fn token(&self, id: i64) -> Option<String> {
        self.tokenizer.id_to_token(u32::try_from(id).ok()?)
    }

    pub(super) fn eos(&self) -> i64 {
        self.eos
    }

    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// One more than the highest id it gives.
    pub fn vocab_size(&self) -> usize {
        let ids = self.tokenizer.get_vocab(true).into_values();
        ids.max().map_or(0, |id| id as usize + 1)
    }
}

/// The tokenizer that `transformers` 5 builds in `tokenization_clip.py`.
fn from_vocab(bpe: BpeBuilder, special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let bpe = bpe
        .unk_token(special.content("unk_token"))
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(vec![
        NFC.into(),
        Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?.into(),
        Lowercase.into(),
    ])));
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));
    for token in special.added() {
        tokenizer.add_special_tokens(&[token]);
    }
    let with_id = |key: &str| {
        let content = special.content(key);
        let id = tokenizer.token_to_id(&content);
        id.map(|id| (content, id)).ok_or_else(|| format!("{key} is not in the vocabulary"))
    };
    let processor = RobertaProcessing::new(with_id("eos_token")?, with_id("bos_token")?);
    tokenizer.with_post_processor(Some(processor.trim_offsets(false).add_prefix_space(false)));
    Ok(tokenizer)
}

/// CLIP's ids: the bytes, the bytes that end a word, what each merge makes, start and end.
fn vocabulary(merges: &[(String, String)]) -> Vocab {
    let is_printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|byte| !is_printable(byte)).count() as u32;
    let symbols: Vec<String> = (0..256u32)
        .filter(is_printable)
        .chain(256..256 + others)
        .map(|code| char::from_u32(code).expect("a character").to_string())
        .collect();
    let ends = symbols.iter().map(|symbol| format!("{symbol}</w>"));
    let merged = merges.iter().map(|(a, b)| format!("{a}{b}"));
    let special = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
    symbols.clone().into_iter().chain(ends).chain(merged).chain(special).zip(0..).collect()
}

/// The tokens with a meaning of their own, which are found in a text before it is cut into words.
struct SpecialTokens(Vec<(&'static str, AddedToken)>);

impl SpecialTokens {
    /// From the two files that may name them. One written as a plain string is matched before the text is normalised;
    /// one written as an object says so itself.
    fn new(config: &Value, map: &Value) -> Self {
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].map(|key| {
            let default = if key == "bos_token" { "<|startoftext|>" } else { "<|endoftext|>" };
            let value = map.get(key).or_else(|| config.get(key)).cloned().unwrap_or(Value::Null);
            let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
            let content = value.as_str().or_else(|| value.get("content")?.as_str()).unwrap_or(default);
            let token = AddedToken::from(content, true)
                .normalized(flag("normalized"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .single_word(flag("single_word"));
            (key, token)
        });
        SpecialTokens(tokens.into())
    }

    fn content(&self, key: &str) -> String {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, token)| token.content.clone()).expect("one of the four")
    }

    /// One token for each text: where two keys share it, the later one's way of matching holds.
    fn added(&self) -> Vec<AddedToken> {
        let mut tokens: Vec<AddedToken> = Vec::new();
        for (_, token) in &self.0 {
            tokens.retain(|t| t.content != token.content);
            tokens.push(token.clone());
        }
        tokens
    }
}

/// Bytes of `text` that are `token` in some case, if it begins with it.
fn prefix_length(text: &str, token: &str) -> Option<usize> {
    let mut rest = text.chars();
    for wanted in token.chars() {
        let given = rest.next()?;
        if given != wanted && !given.to_lowercase().eq(wanted.to_lowercase()) {
            return None;
        }
    }
    Some(text.len() - rest.as_str().len())
}

fn read_optional_json(path: &Path) -> Result<Value> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| {
            let message = format!("{} is not JSON", path.display());
            Error::setup("model_invalid", message).source(e).remedy("download the model's tokenizer again")
        }),
        Err(_) => Ok(Value::Null),
    }
}
