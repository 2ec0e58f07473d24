use serde_json::Value;

use super::generate::request_from_file;
use super::start_engine;
use crate::cli::{BenchArgs, EngineArgs};
use crate::context::JobContext;
use crate::error::Result;
use crate::handler;

/// Runs a request several times in one process; a line of JSON for each: what the benchmark measures.
pub fn bench(arguments: &EngineArgs, options: &BenchArgs) -> Result<()> {
    let input = Value::Object(request_from_file(&options.input)?);
    let engine = start_engine(arguments)?;
    let limits = handler::limits(&engine, arguments.max_pixels, arguments.max_num_images);
    for _ in 0..options.repeat {
        let output = handler::run(&engine, &input, &limits, JobContext::default())?;
        println!("{}", serde_json::to_string(output.timings()).expect("numbers are JSON"));
    }
    Ok(())
}
