//! `/openapi.json`, made from the types that are really read and written; only the list of routes is written down.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::settings::Settings;
use super::wire::{
    ErrorReply, HealthReply, JobState, JobStatus, PurgeReply, RealtimeReply, RealtimeRequest, RequestsReply,
    RunRequest, StreamReply,
};
use crate::api::Capabilities;

pub(super) struct Route {
    /// Separated by a space.
    pub(super) methods: &'static str,
    pub(super) path: &'static str,
    summary: &'static str,
    parameters: &'static [&'static str],
    body: Option<fn(&mut SchemaGenerator) -> Value>,
    answer: Answer,
    /// Those of 4xx that this route has beside 401, 403 and 404.
    refusals: &'static [u16],
}

enum Answer {
    Json(fn(&mut SchemaGenerator) -> Value),
    Other(&'static str),
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

const fn route(methods: &'static str, path: &'static str, answer: Answer, summary: &'static str) -> Route {
    Route { methods, path, summary, parameters: &[], body: None, answer, refusals: &[] }
}

const GET_POST: &str = "GET POST";
const SUBMIT: &[u16] = &[400, 408, 413, 422, 429, 503];

pub(super) static ROUTES: &[Route] = &[
    Route {
        body: Some(schema::<RunRequest>),
        refusals: SUBMIT,
        ..route("POST", "/run", Answer::Json(schema::<JobStatus>), "Queue a job")
    },
    Route {
        body: Some(schema::<RunRequest>),
        parameters: &["wait"],
        refusals: SUBMIT,
        ..route("POST", "/runsync", Answer::Json(schema::<JobState>), "Run a job and wait for its end")
    },
    Route {
        parameters: &["id"],
        ..route(GET_POST, "/status/{id}", Answer::Json(schema::<JobState>), "A job's state, with its result")
    },
    Route {
        parameters: &["id", "wait"],
        refusals: &[422],
        ..route(GET_POST, "/status-sync/{id}", Answer::Json(schema::<JobState>), "Wait for a job's end")
    },
    Route {
        parameters: &["id"],
        ..route(GET_POST, "/stream/{id}", Answer::Json(schema::<StreamReply>), "Progress since the last call")
    },
    Route { parameters: &["id"], ..route("POST", "/cancel/{id}", Answer::Json(schema::<JobStatus>), "Stop a job") },
    Route {
        parameters: &["id"],
        refusals: &[400, 429, 503],
        ..route("POST", "/retry/{id}", Answer::Json(schema::<JobStatus>), "Queue a job again that failed or timed out")
    },
    route("POST", "/purge-queue", Answer::Json(schema::<PurgeReply>), "Cancel all jobs that wait"),
    route("GET", "/health", Answer::Json(schema::<HealthReply>), "Counts of jobs and workers"),
    route("GET", "/requests", Answer::Json(schema::<RequestsReply>), "The jobs that are remembered, the newest first"),
    Route {
        body: Some(schema::<RealtimeRequest>),
        refusals: SUBMIT,
        ..route("POST", "/realtime", Answer::Json(schema::<RealtimeReply>), "Run a job and get its bare result")
    },
    Route {
        refusals: &[503],
        ..route(
            "GET",
            "/capabilities",
            Answer::Json(schema::<Capabilities>),
            "What a request may ask for, and defaults",
        )
    },
    route("GET", "/ping", Answer::Other("application/json"), "200 takes jobs, 204 loads, 503 does not work"),
    route("GET", "/metrics", Answer::Other("application/openmetrics-text"), "Numbers for Prometheus"),
    route("GET", "/openapi.json", Answer::Other("application/json"), "This description"),
];

pub(super) fn document(settings: &Settings) -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let mut methods = Map::new();
        for method in route.methods.split(' ') {
            let name = format!("{}_{}", method.to_lowercase(), route.path[1..].replace(['/', '-', '.'], "_"));
            let name = name.replace(['{', '}'], "");
            methods.insert(method.to_lowercase(), operation(route, &name, &mut generator));
        }
        paths.insert(route.path.into(), methods.into());
    }
    let mut schemas = generator.take_definitions(true);
    accept_aliases(&mut schemas);
    let mut document = json!({
        "openapi": "3.0.3",
        "info": {
            "title": "sdxl-worker",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Stable Diffusion XL behind RunPod's endpoint API. All routes but /capabilities, \
                /ping, /metrics and /openapi.json are also there below /{endpoint} and /v2/{endpoint}, with any name.",
        },
        "servers": [
            { "url": "/" },
            { "url": "/v2/{endpoint}", "variables": { "endpoint": { "default": "sdxl" } } },
        ],
        "paths": paths,
        "components": { "schemas": schemas },
    });
    if settings.api_key.is_some() {
        document["components"]["securitySchemes"] = json!({ "key": { "type": "http", "scheme": "bearer" } });
        document["security"] = json!([{ "key": [] }]);
    }
    document
}

fn operation(route: &Route, name: &str, generator: &mut SchemaGenerator) -> Value {
    let mut operation = Map::from_iter([("operationId".into(), name.into()), ("summary".into(), route.summary.into())]);
    let parameters: Vec<Value> = route.parameters.iter().map(|name| parameter(name)).collect();
    if !parameters.is_empty() {
        operation.insert("parameters".into(), parameters.into());
    }
    if let Some(body) = route.body {
        let content = json!({ "application/json": { "schema": body(generator) } });
        operation.insert("requestBody".into(), json!({ "required": true, "content": content }));
    }
    let content = match &route.answer {
        Answer::Json(schema) => json!({ "application/json": { "schema": schema(generator) } }),
        Answer::Other(media_type) => json!({ *media_type: {} }),
    };
    let mut responses = Map::from_iter([("200".into(), json!({ "description": "Done", "content": content }))]);
    if route.path == "/ping" {
        responses.insert("204".into(), json!({ "description": "The model is being loaded" }));
        responses.insert("503".into(), json!({ "description": "No job can run" }));
    }
    let takes_key: &[u16] = if matches!(route.path, "/ping" | "/openapi.json") { &[] } else { &[401, 403] };
    let unknown: &[u16] = if route.parameters.contains(&"id") { &[404] } else { &[] };
    for status in takes_key.iter().chain(unknown).chain(route.refusals) {
        let content = json!({ "application/json": { "schema": schema::<ErrorReply>(generator) } });
        responses.insert(status.to_string(), json!({ "description": reason(*status), "content": content }));
    }
    operation.insert("responses".into(), responses.into());
    operation.into()
}

fn parameter(name: &str) -> Value {
    match name {
        "wait" => json!({
            "name": "wait",
            "in": "query",
            "description": "Milliseconds to wait, 1000 to 300000",
            "schema": { "type": "integer", "default": 90000 },
        }),
        name => json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }),
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        400 => "The request cannot be done",
        401 => "The API key is missing or wrong",
        403 => "A web page of another origin asked",
        404 => "No such job",
        408 => "The body took too long",
        413 => "The body is too large",
        422 => "The body is not as it should be",
        429 => "The queue is full",
        503 => "The server is stopping, or the model is being loaded",
        _ => "Refused",
    }
}

/// The request's type holds canonical names alone, while aliases are read as well; so a client must not refuse them.
fn accept_aliases(schemas: &mut Map<String, Value>) {
    for (name, schema) in schemas {
        let Some(schema) = schema.as_object_mut() else { continue };
        schema.remove("additionalProperties");
        if name == "GenerateRequest" {
            schema.insert("required".into(), json!(["prompt"]));
            let words =
                "Canonical names; their aliases are accepted too. Unknown fields are refused, null equals absent.";
            schema.insert("description".into(), words.into());
        }
    }
}
