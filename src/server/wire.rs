//! What clients send and get, beside the request's `input` and the reply. Field names and their order are the public
//! endpoint API's, so that its clients cannot tell the difference; `/openapi.json` is made from these types.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::api::{GenerateRequest, GenerateResponse};

/// JSON text that was checked, and is passed on as it is: large pictures are not taken apart to be put together again.
pub(super) type Json = Arc<RawValue>;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Status {
    InQueue,
    InProgress,
    Completed,
    Failed,
    Cancelled,
    TimedOut,
}

impl Status {
    pub(super) fn is_final(self) -> bool {
        !matches!(self, Status::InQueue | Status::InProgress)
    }

    /// The label in metrics and logs.
    pub(super) fn name(self) -> &'static str {
        match self {
            Status::InQueue => "in_queue",
            Status::InProgress => "in_progress",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
            Status::TimedOut => "timed_out",
        }
    }
}

/// Body of `/run` and `/runsync`. Further keys are ignored.
#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "camelCase")]
pub(super) struct RunRequest {
    #[schemars(with = "GenerateRequest")]
    pub(super) input: Json,
    /// Gets the job's final state, with `input` and `webhook` added, as a POST; three tries.
    pub(super) webhook: Option<String>,
    pub(super) policy: Policy,
    /// A bucket of the client's own, for the pictures.
    #[schemars(with = "Option<S3Config>")]
    pub(super) s3_config: Option<Json>,
}

/// Body of `/realtime`.
#[derive(Debug, JsonSchema)]
pub(super) struct RealtimeRequest {
    pub(super) id: String,
    #[schemars(with = "GenerateRequest")]
    pub(super) input: Json,
}

/// A value out of range is moved to the nearer end.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Policy {
    /// Milliseconds the job may run: 5 seconds to 7 days, 10 minutes if absent.
    #[serde(deserialize_with = "milliseconds")]
    #[schemars(with = "Option<u64>")]
    pub(super) execution_timeout: Option<Duration>,
    /// Milliseconds the job may exist, waiting and running included: 10 seconds to 7 days, a day if absent.
    #[serde(deserialize_with = "milliseconds")]
    #[schemars(with = "Option<u64>")]
    pub(super) ttl: Option<Duration>,
}

/// Some clients know only one kind of number, so 60000.0 is one.
fn milliseconds<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let number = Option::<f64>::deserialize(deserializer)?;
    Ok(number.map(|number| Duration::from_millis(number.max(0.0) as u64)))
}

/// Only for the description: the keys are read by whoever uploads.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[expect(dead_code, reason = "a description")]
pub(super) struct S3Config {
    endpoint_url: String,
    access_id: String,
    access_secret: String,
    bucket_name: Option<String>,
}

/// A job's state: the answer of `/status`, and of `/runsync` when the job is over.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobState {
    /// Milliseconds the job waited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) delay_time: Option<u64>,
    /// The error as JSON text: a JSON string with an object inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// Milliseconds the job ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) execution_time: Option<u64>,
    pub(super) id: String,
    /// The reply; while the job runs, its last progress.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "raw")]
    #[schemars(with = "Option<GenerateResponse>")]
    pub(super) output: Option<Json>,
    pub(super) status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) worker_id: Option<String>,
}

fn raw<S: Serializer>(json: &Option<Json>, serializer: S) -> Result<S::Ok, S::Error> {
    json.as_deref().serialize(serializer)
}

/// What a webhook gets: the job's state and what was asked.
#[derive(Serialize)]
pub(super) struct WebhookPayload<'a> {
    #[serde(flatten)]
    pub(super) state: &'a JobState,
    pub(super) input: &'a RawValue,
    pub(super) webhook: &'a str,
}

/// Which job, and where it is now.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct JobStatus {
    pub(super) id: String,
    pub(super) status: Status,
}

/// The progress updates since the last call; always `[]` for a job whose input did not say `stream: true`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct StreamReply {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    pub(super) id: String,
    pub(super) status: Status,
    pub(super) stream: Vec<Chunk>,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(super) struct Chunk {
    #[serde(serialize_with = "raw_chunk")]
    #[schemars(with = "Value")]
    pub(super) output: Json,
}

fn raw_chunk<S: Serializer>(json: &Json, serializer: S) -> Result<S::Ok, S::Error> {
    json.as_ref().serialize(serializer)
}

/// What waited and was removed.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct PurgeReply {
    pub(super) removed: usize,
    pub(super) status: &'static str,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct HealthReply {
    pub(super) jobs: JobCounts,
    pub(super) workers: WorkerCounts,
}

/// Since the start; `inProgress` and `inQueue` are of now.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobCounts {
    pub(super) completed: u64,
    pub(super) failed: u64,
    pub(super) in_progress: usize,
    pub(super) in_queue: usize,
    pub(super) retried: u64,
}

/// There is one worker, this one.
#[derive(Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct WorkerCounts {
    pub(super) idle: u8,
    pub(super) initializing: u8,
    pub(super) ready: u8,
    pub(super) running: u8,
    pub(super) throttled: u8,
    pub(super) unhealthy: u8,
}

/// The jobs that are remembered, the newest first.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct RequestsReply {
    pub(super) requests: Vec<JobState>,
}

/// What `/realtime` answers: one of both.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct RealtimeReply {
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "raw")]
    #[schemars(with = "Option<GenerateResponse>")]
    pub(super) output: Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// Every answer that is not 2xx.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ErrorReply {
    /// Words; for a body that is not as it should be (422), a list of `{type, loc, msg, input}`.
    pub(super) detail: Value,
    /// The error as JSON text, as in a failed job.
    pub(super) error: String,
}

/// What is wrong with a request's body, in the words of the SDK's local API.
#[derive(Debug)]
pub(super) struct BodyProblem {
    pub(super) field: String,
    pub(super) message: String,
    /// `{type, loc, msg, input}`
    pub(super) detail: Value,
}

impl BodyProblem {
    fn new(kind: &str, loc: &[&str], message: &str, input: Value) -> Self {
        let detail = json!({ "type": kind, "loc": loc, "msg": message, "input": input });
        BodyProblem { field: loc.join("."), message: message.into(), detail }
    }

    /// Something in the body; what stands there is shown where it is short.
    fn of_body(kind: &str, field: Option<&str>, message: &str, input: Option<&str>) -> Self {
        let short = input.filter(|text| text.len() <= 1000);
        let input = short.and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null);
        let loc: Vec<&str> = std::iter::once("body").chain(field).collect();
        BodyProblem::new(kind, &loc, message, input)
    }

    fn not_json(position: usize, reason: &str) -> Self {
        let mut problem = BodyProblem::new("json_invalid", &["body"], "JSON decode error", json!({}));
        problem.detail["loc"] = json!(["body", position]);
        problem.detail["ctx"] = json!({ "error": reason });
        problem
    }

    pub(super) fn of_query(field: &str, value: &str) -> Self {
        let input = value.chars().take(100).collect::<String>().into();
        let message = "Input should be a valid integer, unable to parse string as an integer";
        BodyProblem::new("int_parsing", &["query", field], message, input)
    }

    pub(super) fn of_field(field: &str, message: &str) -> Self {
        BodyProblem::new("value_error", &["body", field], message, Value::Null)
    }
}

/// A body's fields as JSON text, each checked to be JSON and not looked into.
struct Fields<'a> {
    body: &'a str,
    fields: BTreeMap<String, &'a RawValue>,
}

impl<'a> Fields<'a> {
    fn read(body: &'a [u8]) -> Result<Self, BodyProblem> {
        let body = std::str::from_utf8(body).map_err(|e| BodyProblem::not_json(e.valid_up_to(), "not UTF-8"))?;
        if body.trim().is_empty() {
            return Err(BodyProblem::of_body("missing", None, "Field required", None));
        }
        let whole: &RawValue = serde_json::from_str(body).map_err(|e| {
            let position = body.split_inclusive('\n').take(e.line().saturating_sub(1)).map(str::len).sum::<usize>();
            BodyProblem::not_json(position + e.column().saturating_sub(1), &e.to_string())
        })?;
        let fields = serde_json::from_str(whole.get()).map_err(|_| {
            let message = "Input should be a valid dictionary or object to extract fields from";
            BodyProblem::of_body("model_attributes_type", None, message, Some(body))
        })?;
        Ok(Fields { body, fields })
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.fields.get(name).map(|raw| raw.get()).filter(|text| *text != "null")
    }

    fn required(&self, name: &str) -> Result<&'a RawValue, BodyProblem> {
        let missing = || BodyProblem::of_body("missing", Some(name), "Field required", Some(self.body));
        self.fields.get(name).copied().ok_or_else(missing)
    }

    fn object(&self, name: &str) -> Result<Json, BodyProblem> {
        let value = self.required(name)?;
        if !value.get().starts_with('{') {
            let message = "Input should be a valid dictionary";
            return Err(BodyProblem::of_body("dict_type", Some(name), message, Some(value.get())));
        }
        Ok(value.to_owned().into())
    }

    /// An optional field; `null` equals absent.
    fn optional<T: DeserializeOwned>(
        &self,
        name: &str,
        kind: &'static str,
        expected: &str,
    ) -> Result<Option<T>, BodyProblem> {
        let Some(text) = self.text(name) else { return Ok(None) };
        serde_json::from_str(text)
            .map(Some)
            .map_err(|_| BodyProblem::of_body(kind, Some(name), &format!("Input should be {expected}"), Some(text)))
    }
}

impl RunRequest {
    pub(super) fn read(body: &[u8]) -> Result<Self, BodyProblem> {
        let fields = Fields::read(body)?;
        let milliseconds = "an object whose executionTimeout and ttl are numbers of milliseconds";
        Ok(RunRequest {
            input: fields.object("input")?,
            webhook: fields.optional("webhook", "string_type", "a valid string")?,
            policy: fields.optional("policy", "dict_type", milliseconds)?.unwrap_or_default(),
            s3_config: fields.text("s3Config").map(|_| fields.object("s3Config")).transpose()?,
        })
    }
}

impl RealtimeRequest {
    pub(super) fn read(body: &[u8]) -> Result<Self, BodyProblem> {
        let fields = Fields::read(body)?;
        let text = fields.required("id")?.get();
        let id = serde_json::from_str(text).map_err(|_| {
            BodyProblem::of_body("string_type", Some("id"), "Input should be a valid string", Some(text))
        })?;
        Ok(RealtimeRequest { id, input: fields.object("input")? })
    }
}

/// Whether the job's progress is wanted as stream chunks.
pub(super) fn asks_for_stream(input: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Input {
        #[serde(default)]
        stream: Value,
        #[serde(default)]
        stream_progress: Value,
    }
    serde_json::from_str::<Input>(input.get())
        .is_ok_and(|input| input.stream == true || (input.stream.is_null() && input.stream_progress == true))
}
