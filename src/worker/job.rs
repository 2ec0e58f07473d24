//! Jobs as the host writes them. Reads exactly `id`, `input` and `s3Config`; whatever else is there may have any type.
//! One bad job never costs its siblings, and whoever has an id is answered.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::Error;

/// One element of a take's answer.
#[derive(Debug)]
pub enum Delivered {
    Job(TakenJob),
    /// Names a job that cannot be run: it is failed with this.
    Invalid {
        id: String,
        error: Error,
    },
    /// Names no job: nobody could be told. Why, for the log.
    Nameless(&'static str),
}

/// A job that can be run.
#[derive(Debug, Clone, PartialEq)]
pub struct TakenJob {
    pub id: String,
    pub input: Value,
    /// The client's own bucket.
    pub s3_config: Option<Value>,
}

impl TakenJob {
    /// Whether the client asked for chunks while the job runs.
    pub fn wants_stream(&self) -> bool {
        ["stream", "stream_progress"].iter().any(|key| self.input.get(key) == Some(&Value::Bool(true)))
    }
}

/// Reads a take's answer: one job or a list of them, on either route. `None` when it is no JSON at all.
pub fn parse(body: &[u8]) -> Option<Vec<Delivered>> {
    let text = std::str::from_utf8(body).ok()?;
    if text.trim_start().starts_with('[') {
        let elements: Vec<&RawValue> = serde_json::from_str(text).ok()?;
        return Some(elements.into_iter().map(|element| parse_one(element.get())).collect());
    }
    let element: &RawValue = serde_json::from_str(text).ok()?;
    Some(vec![parse_one(element.get())])
}

/// Only the id: everything else is skipped unread, however deep or odd it is.
#[derive(Deserialize)]
struct Named {
    id: Option<Value>,
}

fn parse_one(text: &str) -> Delivered {
    let Ok(Named { id }) = serde_json::from_str(text) else {
        return Delivered::Nameless("it is no object with an id");
    };
    let id = match id {
        Some(Value::String(id)) if !id.is_empty() => id,
        Some(Value::Number(id)) => id.to_string(),
        _ => return Delivered::Nameless("it has no id"),
    };
    let mut job = match serde_json::from_str::<Value>(text) {
        Ok(job) => job,
        Err(cause) => {
            let error = Error::invalid("invalid_json", "input", "the job's JSON cannot be read").source(cause);
            return Delivered::Invalid { id, error };
        }
    };
    let Some(input) = job.get_mut("input").map(Value::take) else {
        let error = Error::invalid("missing_input", "input", "the job has no `input`")
            .remedy("send {\"input\": {\"prompt\": \"...\"}}");
        return Delivered::Invalid { id, error };
    };
    let s3_config = job.get_mut("s3Config").map(Value::take).filter(Value::is_object);
    Delivered::Job(TakenJob { id, input, s3_config })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(body: &str) -> Vec<String> {
        let name = |delivered: Delivered| match delivered {
            Delivered::Job(job) => job.id,
            Delivered::Invalid { id, error } => format!("{id}: {}", error.code),
            Delivered::Nameless(_) => "-".into(),
        };
        parse(body.as_bytes()).unwrap_or_default().into_iter().map(name).collect()
    }

    #[test]
    fn ids_may_be_strings_or_numbers_and_a_null_input_is_an_input() {
        assert_eq!(ids(r#"{"id":"a","input":null}"#), ["a"]);
        assert_eq!(ids(r#"[{"id":7,"input":{}},{"id":-1.5,"input":1}]"#), ["7", "-1.5"]);
    }

    #[test]
    fn the_harness_object_is_accepted() {
        let job = r#"{"id":"0","input":{"a":1},"delayTime":0,"executionTime":0,"error":"","status":200,"retries":0,
            "webhook":null,"policy":[1],"s3Config":"none","batchId":3}"#;
        let Delivered::Job(job) = parse(job.as_bytes()).unwrap().remove(0) else { panic!() };
        assert_eq!((job.id.as_str(), job.s3_config), ("0", None));
    }

    #[test]
    fn bad_elements_do_not_cost_their_siblings() {
        let deep = "[".repeat(200) + &"]".repeat(200);
        let body = format!(
            r#"[{{"id":"a","input":1}},{{"input":1}},5,null,{{"id":""}},{{"id":{{}}}},{{"id":"b"}},
                {{"id":"c","input":{deep}}},{{"id":"d","input":"\ud800"}},{{"id":"e","input":2}}]"#
        );
        assert_eq!(
            ids(&body),
            ["a", "-", "-", "-", "-", "-", "b: missing_input", "c: invalid_json", "d: invalid_json", "e"]
        );
    }

    #[test]
    fn what_is_no_json_is_no_job() {
        for body in ["", " ", "{", "[{]", "hello", "{\"id\":\"a\",\"input\":1} tail"] {
            assert!(parse(body.as_bytes()).is_none(), "{body}");
        }
        assert!(parse(&[0xff, 0xfe]).is_none());
        assert_eq!(ids("null"), ["-"]);
        assert!(ids("[]").is_empty());
    }

    #[test]
    fn random_bytes_never_panic() {
        let seeds = [r#"{"id":"a","input":{"p":"x\u00e9","n":[1,2.5e3,null]}}"#, r#"[{"id":1,"input":0},{"id":"b"}]"#];
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let mut body = seeds[random.usize(..2)].as_bytes().to_vec();
            for _ in 0..random.usize(1..6) {
                let at = random.usize(..body.len());
                match random.u8(..3) {
                    0 => body[at] = random.u8(..),
                    1 => body.truncate(at.max(1)),
                    _ => body.insert(at, *random.choice(b"{}[]\",:0\\").unwrap()),
                }
            }
            parse(&body);
        }
    }
}
