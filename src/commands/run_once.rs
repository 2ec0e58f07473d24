use serde_json::Value;

use super::start_handler;
use crate::api::parse;
use crate::cli::EngineArgs;
use crate::context::JobContext;
use crate::error::{Error, Result};
use crate::job::Reply;

const JOB_HINT: &str = "a job is {\"input\": {\"prompt\": \"...\"}}";
const TEST_INPUT: &str = "test_input.json";

/// Runs one job, `--test_input` or ./test_input.json, and prints the reply as JSON: what RunPod's SDK does outside RunPod.
pub fn run_once(arguments: &EngineArgs, test_input: Option<&str>) -> Result<()> {
    let (text, name) = match test_input {
        Some(text) => (text.to_owned(), "--test_input"),
        None => {
            let text = std::fs::read_to_string(TEST_INPUT).map_err(|e| {
                Error::invalid("test_input_missing", TEST_INPUT, "there is no such file here")
                    .source(e)
                    .remedy("give a command (see --help), --test_input JSON, or start in a folder with test_input.json")
            })?;
            (text, TEST_INPUT)
        }
    };
    let job: Value = serde_json::from_str(&text)
        .map_err(|e| Error::invalid("invalid_json", name, format!("{name} is not JSON")).source(e).remedy(JOB_HINT))?;
    let input = job.get("input").ok_or_else(|| {
        Error::invalid("missing_field", "input", format!("the job in {name} has no `input`")).remedy(JOB_HINT)
    })?;
    parse(input)?;
    let (output, _) = start_handler(arguments)?.with_any_path().generate(input, JobContext::default())?;
    println!("{}", output.to_json());
    Ok(())
}
