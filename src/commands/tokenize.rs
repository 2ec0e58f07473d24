use std::io::{BufRead, stdin};

use serde_json::json;

use super::deliver;
use crate::cli::EngineArgs;
use crate::config;
use crate::error::{Error, Result};
use crate::pipeline::ClipTokenizer;

/// Reads a JSON string a line and prints the ids that both tokenizers give it: what the tests compare.
pub fn tokenize(arguments: &EngineArgs) -> Result<()> {
    let model = config::model(&deliver::find(arguments)?)?;
    let tokenizer = ClipTokenizer::load(&model.join("tokenizer"))?;
    let tokenizer_2 = ClipTokenizer::load(&model.join("tokenizer_2"))?;
    for line in stdin().lock().lines() {
        let text = line.map_err(anyhow::Error::from).and_then(|line| Ok(serde_json::from_str::<String>(&line)?));
        let text =
            text.map_err(|e| Error::invalid("invalid_json", "stdin", "expected a JSON string a line").source(e))?;
        let (ids, ids_2) = (tokenizer.encode(&text)?.ids, tokenizer_2.encode(&text)?.ids);
        println!("{}", json!({ "tokenizer": ids, "tokenizer_2": ids_2 }));
    }
    Ok(())
}
