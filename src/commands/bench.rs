use serde_json::Value;

use super::generate::request_from_file;
use super::start_handler;
use crate::cli::{BenchArgs, EngineArgs};
use crate::context::JobContext;
use crate::error::Result;

/// Runs a request several times in one process; a line of JSON for each: what the benchmark measures.
pub fn bench(arguments: &EngineArgs, options: &BenchArgs) -> Result<()> {
    let input = Value::Object(request_from_file(&options.input)?);
    let handler = start_handler(arguments)?.with_any_path();
    for _ in 0..options.repeat {
        let output = handler.generate(&input, JobContext::default())?.0;
        println!("{}", serde_json::to_string(output.timings()).expect("numbers are JSON"));
    }
    Ok(())
}
