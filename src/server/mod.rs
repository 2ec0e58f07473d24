//! The local HTTP API: RunPod's public endpoint API in front of one worker, so that its clients work unchanged.
//!
//! [`serve`] is the way in. A request goes through `access` (key, origin), its handler here, and `jobs` (queue and
//! table); `wire` has the JSON, and `page` what a browser gets at `/`. Nothing here logs an input or an output.

mod access;
mod attempts;
mod jobs;
mod lifecycle;
mod metrics;
mod openapi;
mod page;
mod refusal;
mod settings;
mod table;
mod webhook;
mod wire;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router, middleware};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::error::{Error, ErrorClass, Result};
use jobs::{Jobs, Mode, Ticket};
use refusal::Refusal;
pub use settings::{
    Boxed, ColdStart, CountCalls, CountEngines, Encode, Finished, GpuMemory, Hooks, ModelSources, PostWebhook,
    ReadCapabilities, ReadGpuMemory, RunnerState, Settings,
};
pub use wire::Status;
use wire::{BodyProblem, PurgeReply, RealtimeReply, RealtimeRequest, RequestsReply, RunRequest};

/// Bodies that may be on their way at the same time; together they bound the memory of what is not a job yet.
static BODIES: Semaphore = Semaphore::const_new(32);
/// What is read of a body beyond its limit, so that a client that sends first and reads then sees the answer.
const DRAINED: usize = 64 << 20;
/// How long connections may take to close at the very end.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Where the server listens.
pub struct Listeners {
    pub api: TcpListener,
    /// Answers the load balancer's question on every path; `/ping` of the API answers it too.
    pub health: Option<TcpListener>,
}

/// Serves until it is told to stop: each message on `shutdown` is one signal. After the first, no job is accepted, those
/// that wait are answered, those that run are finished; after the second, those that run are stopped and answered.
///
/// # Errors
/// The runner's own error when it failed to load, or `DeviceLost` of a job; every client was answered before. Or that
/// of a listener.
pub async fn serve(
    listeners: Listeners,
    settings: Settings,
    runner: watch::Receiver<RunnerState>,
    hooks: Hooks,
    mut shutdown: mpsc::Receiver<()>,
) -> Result<()> {
    warn_if_open(&listeners.api, &settings);
    let jobs = Jobs::new(settings, hooks);
    let (over, _) = watch::channel(false);
    let mut background = JoinSet::new();
    background.spawn(Arc::clone(&jobs).follow_runner(runner));
    background.spawn(Arc::clone(&jobs).expire());
    let mut servers = JoinSet::new();
    let apps = [(Some(listeners.api), router(&jobs)), (listeners.health, health_router(&jobs))];
    for (listener, app) in apps {
        if let Some(listener) = listener {
            servers.spawn(listen(listener, app, over.subscribe()));
        }
    }

    let outcome = tokio::select! {
        () = signal(&mut shutdown) => Ok(()),
        error = jobs.failure() => Err(error),
        ended = servers.join_next() => Err(listener_failed(ended)),
    };
    jobs.close();
    match &outcome {
        Ok(()) => drain(&jobs, &mut shutdown).await,
        Err(_) => jobs.stop_running().await,
    }
    jobs.everybody_told().await;
    over.send_replace(true);
    timeout(CLOSE_GRACE, async { while servers.join_next().await.is_some() {} }).await.ok();
    outcome
}

fn warn_if_open(listener: &TcpListener, settings: &Settings) {
    let beyond_loopback = listener.local_addr().is_ok_and(|address| !address.ip().is_loopback());
    if beyond_loopback && settings.api_key.is_none() {
        tracing::warn!("this server can be reached from other machines and asks for no API key");
    }
}

async fn listen(listener: TcpListener, app: Router, mut over: watch::Receiver<bool>) -> std::io::Result<()> {
    // small answers at once: a client that polls waits for each
    let listener = listener.tap_io(|connection| {
        connection.set_nodelay(true).ok();
    });
    let over = async move {
        over.wait_for(|over| *over).await.ok();
    };
    axum::serve(listener, app).with_graceful_shutdown(over).await
}

/// Never returns when nobody can send a signal any more.
async fn signal(shutdown: &mut mpsc::Receiver<()>) {
    if shutdown.recv().await.is_none() {
        std::future::pending::<()>().await;
    }
}

/// Waits for the jobs that run: as long as they may, or until the second signal.
async fn drain(jobs: &Arc<Jobs>, shutdown: &mut mpsc::Receiver<()>) {
    let budget = jobs.settings.drain;
    let used_up = async {
        match budget {
            Some(budget) => sleep(budget).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = jobs.idle() => return,
        () = signal(shutdown) => {}
        () = used_up => {}
    }
    jobs.stop_running().await;
}

fn listener_failed(ended: Option<Result<std::io::Result<()>, tokio::task::JoinError>>) -> Error {
    let error = Error::new(ErrorClass::Internal, "listener_failed", "the server cannot accept connections any more");
    match ended {
        Some(Ok(Err(cause))) => error.source(cause),
        Some(Err(cause)) => error.source(cause),
        _ => error,
    }
}

// --- Routes ---

fn router(jobs: &Arc<Jobs>) -> Router {
    let endpoint = || {
        Router::new()
            .route("/run", post(run))
            .route("/runsync", post(runsync))
            .route("/status/{id}", get(status).post(status))
            .route("/status-sync/{id}", get(status_sync).post(status_sync))
            .route("/stream/{id}", get(stream).post(stream))
            .route("/cancel/{id}", post(cancel))
            .route("/retry/{id}", post(retry))
            .route("/purge-queue", post(purge_queue))
            .route("/health", get(health))
            .route("/requests", get(requests))
            .route("/realtime", post(realtime))
    };
    let mut router = endpoint()
        .nest("/{endpoint}", endpoint())
        .nest("/v2/{endpoint}", endpoint())
        .route("/", get(index))
        .route("/capabilities", get(capabilities))
        .route("/docs", get(|| async { Redirect::temporary("/") }))
        .route("/openapi.json", get(openapi_document))
        .route("/metrics", get(metrics_text))
        .route("/ping", get(ping));
    let health_path = jobs.settings.health_path.as_str();
    if health_path != "/ping" && health_path.starts_with('/') && !health_path.contains(['{', '}']) {
        router = router.route(health_path, get(ping));
    }
    router
        .fallback(|| async {
            Refusal::new(StatusCode::NOT_FOUND, ErrorClass::NotFound, "route_not_found", "Not Found")
        })
        .method_not_allowed_fallback(|| async {
            let status = StatusCode::METHOD_NOT_ALLOWED;
            Refusal::new(status, ErrorClass::InvalidInput, "method_not_allowed", "Method Not Allowed")
        })
        .layer(middleware::from_fn_with_state(jobs.clone(), access::check))
        .with_state(jobs.clone())
}

fn health_router(jobs: &Arc<Jobs>) -> Router {
    Router::new().fallback(ping).with_state(jobs.clone())
}

type Server = State<Arc<Jobs>>;
type Answer<T = Response> = Result<T, Refusal>;

#[derive(Deserialize)]
struct JobPath {
    id: String,
}

#[derive(Deserialize)]
struct Wait {
    wait: Option<String>,
}

async fn run(State(jobs): Server, request: Request) -> Answer {
    let body = read_body(&jobs, request, jobs.settings.max_run_body).await?;
    let ticket = submit(&jobs, &body, Mode::Run)?;
    Ok(Json(json!({ "id": ticket.id, "status": Status::InQueue })).into_response())
}

async fn runsync(State(jobs): Server, Query(wait): Query<Wait>, request: Request) -> Answer {
    let wait = read_wait(&jobs, wait)?;
    let body = read_body(&jobs, request, jobs.settings.max_sync_body).await?;
    let ticket = submit(&jobs, &body, Mode::Sync)?;
    drop(body);
    Ok(wait_for(&jobs, ticket, wait).await)
}

fn submit(jobs: &Arc<Jobs>, body: &[u8], mode: Mode) -> Answer<Ticket> {
    let request = RunRequest::read(body)?;
    if request.webhook.is_some() && jobs.hooks.post_webhook.is_none() {
        return Err(BodyProblem::of_field("webhook", "This server posts no webhooks").into());
    }
    Ok(jobs.submit(request, mode, None)?)
}

/// The job's state when it is over in time, else which job and how far.
async fn wait_for(jobs: &Arc<Jobs>, mut ticket: Ticket, at_most: Duration) -> Response {
    ticket.wait(at_most).await;
    let status = ticket.status();
    match status.status.is_final().then(|| jobs.state(&ticket.id)).flatten() {
        Some(state) => Json(state).into_response(),
        None => Json(status).into_response(),
    }
}

fn read_wait(jobs: &Jobs, Wait { wait }: Wait) -> Answer<Duration> {
    let Some(text) = wait else { return Ok(jobs.settings.wait) };
    let wait = text.parse().map(Duration::from_millis).map_err(|_| BodyProblem::of_query("wait", &text))?;
    Ok(wait.clamp(*jobs.settings.wait_range.start(), *jobs.settings.wait_range.end()))
}

async fn status(State(jobs): Server, Path(JobPath { id }): Path<JobPath>) -> Answer {
    let state = jobs.state(&id).ok_or_else(|| Refusal::unknown_job(&id))?;
    Ok(Json(state).into_response())
}

async fn status_sync(State(jobs): Server, Path(JobPath { id }): Path<JobPath>, Query(wait): Query<Wait>) -> Answer {
    let wait = read_wait(&jobs, wait)?;
    let mut ticket = jobs.ticket(&id).ok_or_else(|| Refusal::unknown_job(&id))?;
    ticket.wait(wait).await;
    match jobs.state(&id) {
        Some(state) => Ok(Json(state).into_response()),
        None => Ok(Json(ticket.status()).into_response()),
    }
}

async fn stream(State(jobs): Server, Path(JobPath { id }): Path<JobPath>) -> Answer {
    let reply = jobs.stream(&id).ok_or_else(|| Refusal::unknown_job(&id))?;
    Ok(Json(reply).into_response())
}

async fn cancel(State(jobs): Server, Path(JobPath { id }): Path<JobPath>) -> Answer {
    let status = jobs.cancel(&id).ok_or_else(|| Refusal::unknown_job(&id))?;
    Ok(Json(status).into_response())
}

async fn retry(State(jobs): Server, Path(JobPath { id }): Path<JobPath>) -> Answer {
    let status = jobs.retry(&id).ok_or_else(|| Refusal::unknown_job(&id))??;
    Ok(Json(status).into_response())
}

async fn purge_queue(State(jobs): Server) -> Response {
    Json(PurgeReply { removed: jobs.purge(), status: "completed" }).into_response()
}

async fn health(State(jobs): Server) -> Response {
    Json(jobs.health()).into_response()
}

async fn requests(State(jobs): Server) -> Response {
    Json(RequestsReply { requests: jobs.requests() }).into_response()
}

/// The bare result, as soon as it is there. A client that goes away takes its job with it.
async fn realtime(State(jobs): Server, request: Request) -> Answer {
    struct Forget<'a>(&'a Arc<Jobs>, String);
    impl Drop for Forget<'_> {
        fn drop(&mut self) {
            self.0.forget(&self.1);
        }
    }
    let body = read_body(&jobs, request, jobs.settings.max_sync_body).await?;
    let RealtimeRequest { id, input } = RealtimeRequest::read(&body)?;
    drop(body);
    let request = RunRequest { input, webhook: None, policy: Default::default(), s3_config: None };
    let mut ticket = jobs.submit(request, Mode::Realtime, Some(id))?;
    let forget = Forget(&jobs, ticket.id.clone());
    ticket.wait(Duration::MAX).await;
    let state = jobs.state(&ticket.id);
    drop(forget);
    let reply = match state {
        Some(state) if state.status == Status::Completed => RealtimeReply { output: state.output, error: None },
        state => {
            let cancelled = || Error::new(ErrorClass::Cancelled, "cancelled", "the job was cancelled");
            let error = state.and_then(|state| state.error).unwrap_or_else(|| jobs::error_text(&cancelled()));
            RealtimeReply { output: None, error: Some(error) }
        }
    };
    Ok(Json(reply).into_response())
}

/// For a load balancer: 200 takes jobs, 204 will do so, 503 will not.
async fn ping(State(jobs): Server) -> Response {
    match jobs.is_healthy() {
        Some(true) => Json(json!({ "status": "ready" })).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
        Some(false) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "unhealthy" }))).into_response(),
    }
}

async fn metrics_text(State(jobs): Server) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], jobs.metrics()).into_response()
}

async fn openapi_document(State(jobs): Server) -> Response {
    Json(openapi::document(&jobs.settings)).into_response()
}

async fn capabilities(State(jobs): Server) -> Answer {
    let read = jobs.hooks.capabilities.clone();
    let capabilities = tokio::task::spawn_blocking(move || read.and_then(|read| read())).await;
    let capabilities = capabilities.map_err(anyhow::Error::from).map_err(Error::from)?;
    Ok(Json(capabilities.ok_or_else(Refusal::loading)?).into_response())
}

/// The page to a browser, the names of the routes to others.
async fn index(headers: HeaderMap) -> Response {
    if page::is_wanted(&headers) {
        return page::answer(&headers);
    }
    let routes: Vec<String> = openapi::ROUTES.iter().map(|route| format!("{} {}", route.methods, route.path)).collect();
    let version = env!("CARGO_PKG_VERSION");
    let index = json!({ "name": "sdxl-worker", "version": version, "openapi": "/openapi.json", "routes": routes });
    ([(header::VARY, "Accept")], Json(index)).into_response()
}

// --- Bodies ---

async fn read_body(jobs: &Jobs, request: Request, limit: usize) -> Answer<Vec<u8>> {
    let declared = header_number(request.headers());
    let waits_for_leave = request.headers().contains_key(header::EXPECT);
    if waits_for_leave && declared.is_some_and(|declared| declared > limit) {
        return Err(Refusal::body_too_large(limit));
    }
    let body_timeout = jobs.settings.body_timeout;
    let read = async {
        let _permit = BODIES.acquire().await;
        read_up_to(request.into_body(), limit, declared.unwrap_or(0)).await
    };
    timeout(body_timeout, read).await.unwrap_or_else(|_| Err(Refusal::body_too_slow(body_timeout)))
}

fn header_number(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read_up_to(mut body: Body, limit: usize, declared: usize) -> Answer<Vec<u8>> {
    let mut bytes = Vec::with_capacity(declared.min(limit));
    let mut received = 0;
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let Ok(data) = frame.map_err(|_| Refusal::body_broken())?.into_data() else { continue };
        received += data.len();
        if received <= limit {
            bytes.extend_from_slice(&data);
        } else if received > limit + DRAINED {
            break;
        } else {
            bytes = Vec::new();
        }
    }
    if received > limit { Err(Refusal::body_too_large(limit)) } else { Ok(bytes) }
}
