//! What is posted: pure functions from an outcome to JSON, as the SDK writes it.

use serde_json::{Map, Value, json};

use super::settings::Settings;
use crate::error::{Error, ErrorClass};

/// One body, ready to be posted as often as it takes.
#[derive(Debug, Clone)]
pub struct Body {
    pub bytes: Vec<u8>,
    pub is_error: bool,
    /// The host is asked for a new worker.
    pub stop_pod: bool,
}

impl Body {
    pub fn new(value: &Value) -> Body {
        Body {
            bytes: value.to_string().into_bytes(),
            is_error: value.get("error").is_some(),
            stop_pod: value.get("stopPod") == Some(&Value::Bool(true)),
        }
    }
}

/// The final post of a job that returned `value`.
pub fn result(value: Value) -> Value {
    let mut body = Map::new();
    let Value::Object(mut object) = value else {
        return json!({ "output": value });
    };
    let error = object.shift_remove("error").filter(is_truthy);
    let refresh_worker = object.shift_remove("refresh_worker").filter(is_truthy);
    if !object.is_empty() {
        body.insert("output".into(), Value::Object(object));
    }
    if let Some(error) = error {
        // The host shows a job as completed whose error is no string.
        let error = error.as_str().map_or_else(|| error.to_string(), ToOwned::to_owned);
        body.insert("error".into(), clipped(error).into());
    }
    if refresh_worker.is_some() {
        body.insert("stopPod".into(), true.into());
    }
    Value::Object(body)
}

/// The final post of a job that failed: the report is JSON inside a string.
pub fn failure(error: &Error, settings: &Settings) -> Value {
    let mut report = error.to_json();
    report["hostname"] = settings.hostname.as_str().into();
    report["worker_id"] = settings.reported_worker_id.as_str().into();
    report["runpod_version"] = settings.runpod_version.as_str().into();
    for value in report.as_object_mut().expect("an error's report is an object").values_mut() {
        if let Value::String(text) = value {
            *text = clipped(std::mem::take(text));
        }
    }
    let mut body = json!({ "error": report.to_string() });
    if error.class == ErrorClass::DeviceLost {
        body["stopPod"] = true.into();
    }
    body
}

pub fn progress(update: &Value) -> Value {
    json!({ "status": "IN_PROGRESS", "output": update })
}

pub fn chunk(chunk: &Value) -> Value {
    json!({ "output": chunk })
}

/// As Python sees it.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// Of a longer text, head and tail are kept.
const LONGEST_TEXT: usize = 16 << 10;

fn clipped(text: String) -> String {
    if text.len() <= LONGEST_TEXT {
        return text;
    }
    let half = LONGEST_TEXT / 2 - 32;
    let (mut head, mut tail) = (half, text.len() - half);
    while !text.is_char_boundary(head) {
        head -= 1;
    }
    while !text.is_char_boundary(tail) {
        tail += 1;
    }
    format!("{}\n... {} bytes left out ...\n{}", &text[..head], tail - head, &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let get = |name: &str| match name {
            "RUNPOD_WEBHOOK_GET_JOB" => Some("http://h/job-take/$ID".to_owned()),
            "RUNPOD_POD_ID" => Some("pod1".to_owned()),
            _ => None,
        };
        Settings::from_variables(get).unwrap()
    }

    #[test]
    fn every_kind_of_result_has_the_body_the_sdk_gives_it() {
        for (value, body) in [
            (json!("text"), r#"{"output":"text"}"#),
            (json!(null), r#"{"output":null}"#),
            (json!(true), r#"{"output":true}"#),
            (json!([1]), r#"{"output":[1]}"#),
            (json!(f64::NAN), r#"{"output":null}"#),
            (json!({"a": 1, "output": 2}), r#"{"output":{"a":1,"output":2}}"#),
            (json!({}), "{}"),
            (json!({"error": ""}), "{}"),
            (json!({"error": "bad"}), r#"{"error":"bad"}"#),
            (json!({"error": "bad", "a": 1}), r#"{"output":{"a":1},"error":"bad"}"#),
            (json!({"error": {"code": 7}}), r#"{"error":"{\"code\":7}"}"#),
            (json!({"error": 0, "refresh_worker": false, "é": "ü"}), r#"{"output":{"é":"ü"}}"#),
            (json!({"refresh_worker": true}), r#"{"stopPod":true}"#),
            (json!({"a": 1, "refresh_worker": 1}), r#"{"output":{"a":1},"stopPod":true}"#),
        ] {
            assert_eq!(result(value).to_string(), body);
        }
        assert_eq!(progress(&json!("p")).to_string(), r#"{"status":"IN_PROGRESS","output":"p"}"#);
    }

    #[test]
    fn a_failure_report_is_a_string_that_parses_to_the_sdks_keys_in_order() {
        let error = Error::new(ErrorClass::Internal, "internal", "it broke").source(anyhow::anyhow!("cause"));
        let body = failure(&error, &settings());
        let report: Value = serde_json::from_str(body["error"].as_str().unwrap()).unwrap();
        let keys: Vec<&String> = report.as_object().unwrap().keys().take(6).collect();
        assert_eq!(keys, ["error_type", "error_message", "error_traceback", "hostname", "worker_id", "runpod_version"]);
        assert_eq!((&report["worker_id"], &report["hostname"]), (&json!("pod1"), &json!("unknown")));
        assert_eq!((&report["error_message"], &report["error_traceback"]), (&json!("it broke"), &json!("cause")));
        assert_eq!(body.get("stopPod"), None);
    }

    #[test]
    fn only_a_lost_device_asks_for_a_new_worker() {
        for (class, asks) in [
            (ErrorClass::DeviceLost, true),
            (ErrorClass::OutOfMemory, false),
            (ErrorClass::Internal, false),
            (ErrorClass::InvalidInput, false),
        ] {
            let body = Body::new(&failure(&Error::new(class, "code", "text"), &settings()));
            assert_eq!((body.stop_pod, body.is_error), (asks, true));
        }
    }

    #[test]
    fn a_very_long_text_keeps_its_head_and_tail() {
        let text = format!("head{}tail", "é".repeat(50_000));
        let error = Error::new(ErrorClass::Internal, "internal", text.clone());
        let report = failure(&error, &settings())["error"].as_str().unwrap().to_owned();
        assert!(report.len() < 40_000 && report.contains("head") && report.contains("tail"));
        let direct = result(json!({ "error": text }))["error"].as_str().unwrap().to_owned();
        assert!(direct.len() <= LONGEST_TEXT && direct.starts_with("head") && direct.ends_with("tail"));
    }
}
