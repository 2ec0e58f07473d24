//! CLIP's tokenizer from a model's own files, equal id by id to `transformers.CLIPTokenizer`.

use std::path::Path;

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{
    AddedToken, PaddingParams, PaddingStrategy, SplitDelimiterBehavior, Tokenizer, TruncationParams,
    normalizers::replace::ReplacePattern,
};

use crate::error::{Error, Result};

/// How CLIP cuts a text into words before the byte pairs.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    max_length: usize,
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
        let mut tokenizer = if whole.is_file() {
            Tokenizer::from_file(&whole).map_err(invalid)?
        } else {
            from_vocab(dir, &special).map_err(invalid)?
        };

        let max_length = config.get("model_max_length").and_then(Value::as_u64).unwrap_or(77) as usize;
        let pad_token = special.content("pad_token");
        let pad_id = tokenizer.token_to_id(&pad_token).ok_or_else(|| invalid("no such pad_token".into()))?;
        let truncation = TruncationParams { max_length, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(invalid)?;
        let strategy = PaddingStrategy::Fixed(max_length);
        tokenizer.with_padding(Some(PaddingParams { strategy, pad_id, pad_token, ..Default::default() }));
        Ok(ClipTokenizer { tokenizer, max_length })
    }

    pub fn encode(&self, text: &str) -> Result<TokenIds> {
        let encoding = self
            .tokenizer
            .encode(text, true)
            .map_err(|e| Error::from(anyhow::anyhow!(e).context("a text could not be tokenized")))?;
        let ids = encoding.get_ids().iter().map(|&id| id as i64).collect();
        Ok(TokenIds { ids, truncated: !encoding.get_overflowing().is_empty() })
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
fn from_vocab(dir: &Path, special: &SpecialTokens) -> tokenizers::Result<Tokenizer> {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let bpe = BPE::from_file(&path("vocab.json"), &path("merges.txt"))
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

fn read_optional_json(path: &Path) -> Result<Value> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).map_err(|e| {
            let message = format!("{} is not JSON", path.display());
            Error::setup("model_invalid", message).source(e).remedy("download the model's tokenizer again")
        }),
        Err(_) => Ok(Value::Null),
    }
}
