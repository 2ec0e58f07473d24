//! The local API over TCP, with a fake in the runner's place: every route, status, field and error that a client of
//! RunPod's endpoints meets. Nothing sleeps for a fixed time; what has to happen is waited for.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use sdxl_worker::api::{Capabilities, Limits};
use sdxl_worker::context::{JobContext, Progress};
use sdxl_worker::error::{Error, ErrorClass, Result};
use sdxl_worker::job::{Job, PictureFile, Reply, Runner, Running};
use sdxl_worker::net::Secret;
use sdxl_worker::server::{self, GpuMemory, Hooks, Listeners, RunnerState, Settings};

// --- The fake runner ---

/// Does with `input.do` what the test says.
#[derive(Default)]
struct FakeRunner {
    /// A permit lets one held job go on.
    gate: Arc<Gate>,
}

struct Gate {
    permits: Semaphore,
    /// Jobs that were cancelled and have stopped.
    stopped: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        let zero = AtomicUsize::default;
        Gate { permits: Semaphore::new(0), stopped: zero(), running: zero(), most_running: zero() }
    }
}

impl Gate {
    async fn pass(&self, context: &JobContext) -> Result<()> {
        loop {
            tokio::select! {
                permit = self.permits.acquire() => {
                    permit.expect("nobody closes the gate").forget();
                    return Ok(());
                }
                () = tokio::time::sleep(Duration::from_millis(1)) => {
                    if let Err(cancelled) = context.check_cancelled() {
                        self.stopped.fetch_add(1, Ordering::SeqCst);
                        return Err(cancelled);
                    }
                }
            }
        }
    }
}

struct FakeReply(Value);

impl Reply for FakeReply {
    fn to_json(&self) -> Value {
        if self.0["echo"]["do"] == "panic_in_reply" {
            panic!("while encoding");
        }
        self.0.clone()
    }

    fn pictures(&self) -> Vec<PictureFile> {
        Vec::new()
    }

    fn with_links(&self, _: &[String]) -> Value {
        self.to_json()
    }

    fn smaller(&self) -> Option<Box<dyn Reply>> {
        None
    }
}

fn step(step: usize) -> Progress {
    Progress::Denoising { step, steps: 3, seconds_left: None, preview: None }
}

impl Runner for FakeRunner {
    fn run(&self, job: Job, context: JobContext) -> Running {
        if job.input["do"] == "panic" {
            panic!("a fault in the runner");
        }
        let gate = self.gate.clone();
        Box::pin(async move {
            let running = gate.running.fetch_add(1, Ordering::SeqCst) + 1;
            gate.most_running.fetch_max(running, Ordering::SeqCst);
            let result = act(&job.input, &context, &gate).await;
            gate.running.fetch_sub(1, Ordering::SeqCst);
            result?;
            let reply = json!({ "echo": job.input, "timings": { "denoise": 1500.0, "total": 2000 } });
            Ok(Box::new(FakeReply(reply)) as Box<dyn Reply>)
        })
    }
}

async fn act(input: &Value, context: &JobContext, gate: &Gate) -> Result<()> {
    match input["do"].as_str() {
        Some("fail") => Err(Error::invalid("empty_prompt", "prompt", "`prompt` must not be empty").remedy("write one")),
        Some("lose_device") => Err(Error::new(ErrorClass::DeviceLost, "device_lost", "the GPU is gone")),
        Some("panic_later") => panic!("a fault in the runner, later"),
        Some("hold") => gate.pass(context).await,
        Some("steps") => {
            for done in 1..=2 {
                context.report(step(done));
            }
            gate.pass(context).await?;
            context.report(step(3));
            context.report(Progress::Decoding);
            gate.pass(context).await
        }
        Some("deaf") => {
            gate.permits.acquire().await.expect("nobody closes the gate").forget();
            context.report(step(3));
            Ok(())
        }
        _ => Ok(()),
    }
}

// --- The server under test ---

struct Server {
    url: String,
    health_url: String,
    client: reqwest::Client,
    gate: Arc<Gate>,
    runner: watch::Sender<RunnerState>,
    signals: mpsc::Sender<()>,
    ended: JoinHandle<Result<()>>,
}

fn quick() -> Settings {
    Settings {
        worker_id: "worker-1".into(),
        execution_timeout_range: Duration::from_millis(20)..=Duration::from_secs(60),
        ttl_range: Duration::from_millis(20)..=Duration::from_secs(60),
        wait_range: Duration::from_millis(10)..=Duration::from_secs(300),
        webhook_pause: Duration::from_millis(5),
        ..Settings::default()
    }
}

async fn start() -> Server {
    start_with(quick(), Hooks::default()).await
}

async fn start_with(settings: Settings, hooks: Hooks) -> Server {
    let server = start_loading(settings, hooks).await;
    server.load();
    server
}

async fn start_loading(settings: Settings, hooks: Hooks) -> Server {
    let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (api, health) = (bind().await, bind().await);
    let url = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
    let (url, health_url) = (url(&api), url(&health));
    let (runner, states) = watch::channel(RunnerState::Loading);
    let (signals, shutdown) = mpsc::channel(4);
    let ended = tokio::spawn(server::serve(Listeners { api, health: Some(health) }, settings, states, hooks, shutdown));
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    Server { url, health_url, client, gate: Arc::default(), runner, signals, ended }
}

impl Server {
    fn load(&self) {
        self.runner.send_replace(RunnerState::Ready(Arc::new(FakeRunner { gate: self.gate.clone() })));
    }

    fn open_gate(&self, jobs: usize) {
        self.gate.permits.add_permits(jobs);
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.parse().unwrap(), format!("{}{path}", self.url))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        answer(self.request("GET", path)).await
    }

    /// Without a body and with a content type, as the SDK's client does.
    async fn post_nothing(&self, path: &str) -> (u16, Value) {
        answer(self.request("POST", path).header("content-type", "application/json")).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.post_text(path, body.to_string()).await
    }

    async fn post_text(&self, path: &str, body: String) -> (u16, Value) {
        answer(self.request("POST", path).body(body)).await
    }

    async fn run(&self, body: Value) -> String {
        let (status, reply) = self.post("/run", body).await;
        assert_eq!((status, &reply["status"]), (200, &json!("IN_QUEUE")), "{reply}");
        reply["id"].as_str().unwrap().to_owned()
    }

    async fn act(&self, action: &str) -> String {
        self.run(json!({ "input": { "do": action } })).await
    }

    async fn status(&self, id: &str) -> Value {
        self.get(&format!("/status/{id}")).await.1
    }

    /// Waits until the job's state is so.
    async fn until(&self, id: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let state = self.status(id).await;
            if is_so(&state) {
                return state;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "never {what}: {state}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn until_status(&self, id: &str, status: &str) -> Value {
        self.until(id, status, |state| state["status"] == status).await
    }

    /// Waits until the runner has so many jobs.
    async fn until_running(&self, jobs: usize) {
        let begun = Instant::now();
        while self.gate.running.load(Ordering::SeqCst) != jobs {
            assert!(begun.elapsed() < Duration::from_secs(10), "never {jobs} jobs at once");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Sends the signal, and waits until the server has ended.
    async fn stop(self) -> Result<()> {
        self.signals.send(()).await.unwrap();
        self.end().await
    }

    async fn end(self) -> Result<()> {
        tokio::time::timeout(Duration::from_secs(10), self.ended).await.expect("the server ends").unwrap()
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let json = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") };
    (status, json)
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The error inside the string that `error` is.
fn error(state: &Value) -> Value {
    serde_json::from_str(state["error"].as_str().expect("a string")).expect("JSON inside")
}

async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(10), "never {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

// --- Jobs ---

#[tokio::test]
async fn a_job_goes_from_the_queue_through_progress_to_its_result() {
    let server = start().await;
    let first = server.act("steps").await;
    let second = server.act("echo").await;
    assert!(first.ends_with("-u1") && first.len() == 39, "{first}");

    let step_2 = json!({ "step": 2, "steps": 3, "seconds_left": null });
    let running = server.until(&first, "at step 2", |state| state["output"] == step_2).await;
    assert_eq!(keys(&running), ["delayTime", "id", "output", "status", "workerId"]);
    assert_eq!((&running["status"], &running["workerId"]), (&json!("IN_PROGRESS"), &json!("worker-1")));

    let waiting = server.status(&second).await;
    assert_eq!(waiting, json!({ "id": second, "status": "IN_QUEUE" }));

    server.open_gate(2);
    let done = server.until_status(&first, "COMPLETED").await;
    assert_eq!(keys(&done), ["delayTime", "executionTime", "id", "output", "status", "workerId"]);
    assert_eq!(done["output"]["echo"], json!({ "do": "steps" }));
    assert!(done["delayTime"].is_u64() && done["executionTime"].is_u64());
    server.until_status(&second, "COMPLETED").await;
    assert_eq!(server.status(&first).await, done, "a result can be fetched again");
}

#[tokio::test]
async fn every_route_is_there_below_any_endpoint_s_name() {
    let server = start().await;
    for prefix in ["", "/any-id", "/v2/any-id", "/v2"] {
        let (status, reply) = server.post(&format!("{prefix}/runsync"), json!({ "input": {} })).await;
        assert_eq!((status, &reply["status"]), (200, &json!("COMPLETED")), "{prefix}");
        let id = reply["id"].as_str().unwrap();
        for path in [format!("status/{id}"), format!("status-sync/{id}"), format!("stream/{id}")] {
            for method in ["GET", "POST"] {
                let (status, reply) = answer(server.request(method, &format!("{prefix}/{path}"))).await;
                assert_eq!((status, &reply["status"]), (200, &json!("COMPLETED")), "{method} {prefix}/{path}");
            }
        }
        for path in [format!("cancel/{id}"), "purge-queue".into()] {
            assert_eq!(server.post_nothing(&format!("{prefix}/{path}")).await.0, 200, "{prefix}/{path}");
        }
        for path in ["health", "requests"] {
            assert_eq!(server.get(&format!("{prefix}/{path}")).await.0, 200, "{prefix}/{path}");
        }
    }
}

#[tokio::test]
async fn runsync_answers_with_the_result() {
    let server = start().await;
    let (status, reply) = server.post("/runsync", json!({ "input": { "a": "é\u{0}\"" } })).await;
    assert_eq!((status, &reply["status"]), (200, &json!("COMPLETED")));
    assert_eq!(reply["output"]["echo"], json!({ "a": "é\u{0}\"" }));
    assert!(reply["id"].as_str().unwrap().starts_with("sync-"));
}

#[tokio::test]
async fn runsync_that_waited_long_enough_says_how_far_the_job_is() {
    let server = start().await;
    let hold = json!({ "input": { "do": "hold" } });
    let (status, first) = server.post("/runsync?wait=30", hold.clone()).await;
    assert_eq!((status, &first["status"], keys(&first)), (200, &json!("IN_PROGRESS"), vec!["id", "status"]));
    let (_, second) = server.post("/runsync?wait=30", hold).await;
    assert_eq!((&second["status"], keys(&second)), (&json!("IN_QUEUE"), vec!["id", "status"]));
    server.open_gate(2);
    let (_, done) = server.get(&format!("/status-sync/{}?wait=10000", second["id"].as_str().unwrap())).await;
    assert_eq!(done["status"], "COMPLETED");
}

#[tokio::test]
async fn a_wait_below_the_range_is_moved_into_it() {
    let range = Duration::from_secs(30)..=Duration::from_secs(60);
    let server = start_with(Settings { wait_range: range, ..quick() }, Hooks::default()).await;
    let id = server.act("hold").await;
    let wait = tokio::spawn(answer(server.request("GET", &format!("/status-sync/{id}?wait=1"))));
    server.until_status(&id, "IN_PROGRESS").await;
    server.open_gate(1);
    assert_eq!(wait.await.unwrap().1["status"], "COMPLETED");
}

#[tokio::test]
async fn a_failed_job_carries_its_error_as_a_json_string() {
    let server = start().await;
    let (status, reply) = server.post("/runsync", json!({ "input": { "do": "fail" } })).await;
    assert_eq!((status, &reply["status"]), (200, &json!("FAILED")));
    assert_eq!(keys(&reply), ["delayTime", "error", "executionTime", "id", "status", "workerId"]);
    let error = error(&reply);
    let expected = ["error_type", "error_message", "error_traceback", "hostname", "worker_id", "runpod_version"];
    assert_eq!(keys(&error)[..6], expected);
    assert_eq!((&error["code"], &error["field"]), (&json!("empty_prompt"), &json!("prompt")));
    assert_eq!(error["remedy"], "write one");
}

#[tokio::test]
async fn a_runner_that_panics_fails_its_job_and_no_other() {
    let server = start().await;
    for action in ["panic", "panic_later", "panic_in_reply"] {
        let (status, reply) = server.post("/runsync", json!({ "input": { "do": action } })).await;
        assert_eq!((status, &reply["status"]), (200, &json!("FAILED")), "{action}");
        assert_eq!(error(&reply)["code"], "internal");
        let (_, next) = server.post("/runsync", json!({ "input": {} })).await;
        assert_eq!(next["status"], "COMPLETED", "after {action}");
    }
}

#[tokio::test]
async fn an_input_too_deep_to_be_read_fails_its_job() {
    let server = start().await;
    let deep = format!("{{\"input\":{{\"a\":{}1{}}}}}", "[".repeat(100_000), "]".repeat(100_000));
    let (status, reply) = server.post_text("/runsync", deep).await;
    assert_eq!((status, &reply["status"]), (200, &json!("FAILED")));
    assert_eq!(error(&reply)["code"], "invalid_json");
}

#[tokio::test]
async fn a_large_result_arrives_whole() {
    let server = start().await;
    let picture = "A".repeat(9_000_000);
    let id = server.run(json!({ "input": { "picture": picture } })).await;
    let done = server.until_status(&id, "COMPLETED").await;
    assert_eq!(done["output"]["echo"]["picture"].as_str().unwrap().len(), 9_000_000);
}

#[tokio::test]
async fn as_many_jobs_run_at_once_as_there_are_slots() {
    let server = start_with(Settings { concurrency: 3, ..quick() }, Hooks::default()).await;
    let mut ids = Vec::new();
    for _ in 0..7 {
        ids.push(server.act("hold").await);
    }
    server.until_running(3).await;
    let (_, health) = server.get("/health").await;
    assert_eq!((&health["jobs"]["inProgress"], &health["jobs"]["inQueue"]), (&json!(3), &json!(4)));
    server.open_gate(7);
    for id in &ids {
        server.until_status(id, "COMPLETED").await;
    }
    assert_eq!(server.gate.most_running.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn the_next_job_starts_the_moment_a_slot_is_free() {
    let server = start().await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(server.act("hold").await);
    }
    let begun = Instant::now();
    server.open_gate(20);
    server.until_status(ids.last().unwrap(), "COMPLETED").await;
    let gap = begun.elapsed() / 20;
    assert!(gap < Duration::from_millis(20), "{gap:?} for each job");
}

// --- Limits ---

#[tokio::test]
async fn a_full_queue_refuses_with_429() {
    let server = start_with(Settings { max_queue: 2, ..quick() }, Hooks::default()).await;
    let hold = json!({ "input": { "do": "hold" } });
    for _ in 0..3 {
        server.run(hold.clone()).await;
    }
    let response = server.request("POST", "/run").body(hold.to_string()).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    let reply: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
    assert_eq!(error(&reply)["code"], "queue_full");
    assert_eq!(server.post("/runsync", hold.clone()).await.0, 429);
    assert_eq!(server.post("/x/realtime", json!({ "id": "r", "input": {} })).await.0, 429);
}

#[tokio::test]
async fn memory_is_bounded_by_dropping_the_oldest_results_and_then_by_429() {
    let server = start_with(Settings { max_held_bytes: 10_000, ..quick() }, Hooks::default()).await;
    let filled = |action: &str| json!({ "input": { "do": action, "fill": "x".repeat(2000) } });
    let mut ids = Vec::new();
    for _ in 0..4 {
        let (_, reply) = server.post("/runsync", filled("echo")).await;
        ids.push(reply["id"].as_str().unwrap().to_owned());
    }
    assert_eq!(server.get(&format!("/status/{}", ids[0])).await.0, 404, "the oldest result went");
    assert_eq!(server.get(&format!("/status/{}", ids[3])).await.0, 200, "the newest is there");
    for _ in 0..4 {
        server.run(filled("hold")).await;
    }
    let (status, reply) = server.post("/run", filled("hold")).await;
    assert_eq!((status, &error(&reply)["code"]), (429, &json!("memory_full")));
}

#[tokio::test]
async fn a_result_that_was_fetched_goes_before_one_that_was_not() {
    let server = start_with(Settings { max_finished: 2, ..quick() }, Hooks::default()).await;
    let unseen = server.act("hold").await;
    let seen = server.act("hold").await;
    server.open_gate(2);
    server.until_status(&seen, "COMPLETED").await;
    server.post("/runsync", json!({ "input": {} })).await;
    assert_eq!(server.get(&format!("/status/{seen}")).await.0, 404);
    assert_eq!(server.get(&format!("/status/{unseen}")).await.0, 200);
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused_with_413() {
    let settings = Settings { max_run_body: 1000, max_sync_body: 2000, ..quick() };
    let server = start_with(settings, Hooks::default()).await;
    let body = |bytes: usize| format!("{{\"input\":{{\"a\":\"{}\"}}}}", "x".repeat(bytes - 18));
    assert_eq!(body(1000).len(), 1000);
    assert_eq!(server.post_text("/run", body(1000)).await.0, 200);
    assert_eq!(server.post_text("/runsync", body(2000)).await.0, 200);
    for (path, bytes) in [("/run", 1001), ("/runsync", 2001), ("/x/realtime", 2001), ("/run", 50_000_000)] {
        let (status, reply) = server.post_text(path, body(bytes)).await;
        assert_eq!((status, &error(&reply)["code"]), (413, &json!("body_too_large")), "{path}");
    }
}

#[tokio::test]
async fn the_default_limits_are_the_public_ones() {
    let settings = Settings::default();
    assert_eq!((settings.max_run_body, settings.max_sync_body), (10 << 20, 20 << 20));
    let seconds = Duration::from_secs;
    assert_eq!((settings.wait, settings.wait_range), (seconds(90), seconds(1)..=seconds(300)));
    assert_eq!((settings.execution_timeout, settings.ttl), (seconds(600), seconds(86400)));
    assert_eq!(*settings.execution_timeout_range.start(), seconds(5));
    assert_eq!(*settings.ttl_range.start(), seconds(10));
    assert_eq!((settings.keep, settings.keep_sync), (seconds(1800), seconds(60)));
}

#[tokio::test]
async fn a_body_without_length_is_measured_as_it_comes() {
    let server = start_with(Settings { max_run_body: 1000, ..quick() }, Hooks::default()).await;
    let chunk = format!("1f4\r\n{}\r\n", "x".repeat(500)).repeat(3);
    let head = "POST /run HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let reply = raw(&server, &format!("{head}{chunk}0\r\n\r\n")).await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
}

#[tokio::test]
async fn a_client_that_waits_for_leave_is_refused_before_it_sends() {
    let server = start_with(Settings { max_run_body: 1000, ..quick() }, Hooks::default()).await;
    let head = "POST /run HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n";
    let mut connection = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    connection.write_all(head.as_bytes()).await.unwrap();
    let mut reply = [0; 12];
    connection.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_body_that_does_not_arrive_is_given_up() {
    let server = start_with(Settings { body_timeout: Duration::from_millis(20), ..quick() }, Hooks::default()).await;
    let reply = raw(&server, "POST /run HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{").await;
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
}

/// Sends bytes and reads until the server closes.
async fn raw(server: &Server, request: &str) -> String {
    let mut connection = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    connection.read_to_string(&mut reply).await.unwrap();
    reply
}

// --- Bad requests ---

#[tokio::test]
async fn a_bad_body_is_answered_in_the_sdk_s_words() {
    let server = start().await;
    let cases = [
        (r#"{"prompt":"x"}"#, "missing", json!(["body", "input"]), "Field required", json!({ "prompt": "x" })),
        (
            r#"{"input":"text"}"#,
            "dict_type",
            json!(["body", "input"]),
            "Input should be a valid dictionary",
            json!("text"),
        ),
        (r#"{"input":null}"#, "dict_type", json!(["body", "input"]), "Input should be a valid dictionary", Value::Null),
        (r#"{"input":[{}]}"#, "dict_type", json!(["body", "input"]), "Input should be a valid dictionary", json!([{}])),
        ("{bad", "json_invalid", json!(["body", 1]), "JSON decode error", json!({})),
        ("{\"input\":{}}\n}", "json_invalid", json!(["body", 13]), "JSON decode error", json!({})),
        ("", "missing", json!(["body"]), "Field required", Value::Null),
        (
            r#"{"input":{},"webhook":7}"#,
            "string_type",
            json!(["body", "webhook"]),
            "Input should be a valid string",
            json!(7),
        ),
        (
            r#"{"input":{},"s3Config":"x"}"#,
            "dict_type",
            json!(["body", "s3Config"]),
            "Input should be a valid dictionary",
            json!("x"),
        ),
    ];
    for (body, kind, loc, message, input) in cases {
        for path in ["/run", "/runsync", "/v2/x/run"] {
            let (status, reply) = server.post_text(path, body.into()).await;
            assert_eq!(status, 422, "{body}");
            let detail = &reply["detail"][0];
            assert_eq!((&detail["type"], &detail["loc"]), (&json!(kind), &loc), "{body}");
            assert_eq!((&detail["msg"], &detail["input"]), (&json!(message), &input), "{body}");
            assert_eq!(error(&reply)["code"], "invalid_body");
        }
    }
    let (status, reply) = server.post_text("/run", "[]".into()).await;
    assert_eq!((status, &reply["detail"][0]["type"]), (422, &json!("model_attributes_type")));
    let (status, reply) = server.post("/run", json!({ "input": {}, "policy": { "ttl": "soon" } })).await;
    assert_eq!((status, &reply["detail"][0]["loc"]), (422, &json!(["body", "policy"])));
    let (status, reply) = server.post("/runsync?wait=soon", json!({ "input": {} })).await;
    assert_eq!((status, &reply["detail"][0]["loc"]), (422, &json!(["query", "wait"])));
    let not_utf8 = server.request("POST", "/run").body(b"{\"input\":{\"a\":\"\xff\"}}".to_vec());
    assert_eq!(answer(not_utf8).await.0, 422);
    let (status, reply) = server.post("/run", json!({ "input": {}, "webhook": "http://hook" })).await;
    assert_eq!((status, &reply["detail"][0]["loc"]), (422, &json!(["body", "webhook"])), "there is nobody to post it");
}

#[tokio::test]
async fn further_keys_and_null_are_no_mistake() {
    let server = start().await;
    let body = json!({
        "input": {}, "policy": { "ttl": 1, "executionTimeout": 60000.0, "lowPriority": true }, "webhook": null,
        "s3Config": { "accessId": "a" }, "webhookV2": "x", "id": 3,
    });
    assert_eq!(server.post("/runsync", body).await.0, 200);
    assert_eq!(server.post("/runsync", json!({ "input": {}, "policy": null, "s3Config": null })).await.0, 200);
}

#[tokio::test]
async fn an_unknown_job_is_404_everywhere() {
    let server = start().await;
    for (method, path) in [
        ("GET", "/status/x"),
        ("POST", "/status/x"),
        ("GET", "/status-sync/x"),
        ("GET", "/stream/x"),
        ("POST", "/stream/x"),
        ("POST", "/cancel/x"),
        ("POST", "/retry/x"),
        ("GET", "/v2/any-id/status/x"),
    ] {
        let (status, reply) = answer(server.request(method, path)).await;
        assert_eq!((status, &error(&reply)["code"]), (404, &json!("job_not_found")), "{method} {path}");
    }
}

#[tokio::test]
async fn an_unknown_route_is_404_and_a_wrong_method_405() {
    let server = start().await;
    for (method, path, status, detail) in [
        ("GET", "/nothing", 404, "Not Found"),
        ("GET", "/v2/any-id/nothing", 404, "Not Found"),
        ("POST", "/status/", 404, "Not Found"),
        ("GET", "/run", 405, "Method Not Allowed"),
        ("GET", "/v2/any-id/runsync", 405, "Method Not Allowed"),
        ("GET", "/any-id/cancel/x", 405, "Method Not Allowed"),
        ("DELETE", "/status/x", 405, "Method Not Allowed"),
        ("POST", "/ping", 405, "Method Not Allowed"),
    ] {
        let (got, reply) = answer(server.request(method, path)).await;
        assert_eq!((got, &reply["detail"]), (status, &json!(detail)), "{method} {path}");
    }
}

// --- Stream ---

#[tokio::test]
async fn a_stream_gives_each_chunk_once_and_in_order() {
    let server = start().await;
    let id = server.run(json!({ "input": { "do": "steps", "stream": true } })).await;
    let path = format!("/v2/any-id/stream/{id}");
    server.until(&id, "at step 2", |state| state["output"]["step"] == 2).await;
    let (_, first) = server.get(&path).await;
    let step = |step| json!({ "output": { "step": step, "steps": 3, "seconds_left": null } });
    assert_eq!(first, json!({ "id": id, "status": "IN_PROGRESS", "stream": [step(1), step(2)] }));
    assert_eq!(server.get(&path).await.1["stream"], json!([]));
    server.open_gate(2);
    let done = server.until_status(&id, "COMPLETED").await;
    assert_eq!(done["output"]["echo"]["do"], "steps", "the final result holds the whole reply");
    let (_, last) = server.post_nothing(&path).await;
    let decoding = json!({ "output": { "phase": "decoding" } });
    assert_eq!(last, json!({ "id": id, "status": "COMPLETED", "stream": [step(3), decoding] }));
    assert_eq!(server.get(&path).await.1, json!({ "id": id, "status": "COMPLETED", "stream": [] }));
}

#[tokio::test]
async fn a_job_that_does_not_stream_has_an_empty_stream() {
    let server = start().await;
    for input in [json!({ "do": "steps" }), json!({ "do": "steps", "stream": "yes" })] {
        let id = server.run(json!({ "input": input })).await;
        server.until(&id, "at step 2", |state| state["output"]["step"] == 2).await;
        let (_, reply) = server.get(&format!("/stream/{id}")).await;
        assert_eq!(reply, json!({ "id": id, "status": "IN_PROGRESS", "stream": [] }));
        server.open_gate(2);
        server.until_status(&id, "COMPLETED").await;
    }
}

#[tokio::test]
async fn a_stream_s_reader_learns_that_the_job_failed() {
    let server = start().await;
    let (_, reply) = server.post("/runsync", json!({ "input": { "do": "fail", "stream": true } })).await;
    let (_, stream) = server.get(&format!("/stream/{}", reply["id"].as_str().unwrap())).await;
    assert_eq!((&stream["status"], &stream["stream"]), (&json!("FAILED"), &json!([])));
    assert_eq!(stream["error"], reply["error"]);
}

// --- Cancel, retry, purge ---

#[tokio::test]
async fn a_running_job_that_is_cancelled_stops_and_frees_its_slot() {
    let server = start().await;
    let id = server.act("hold").await;
    server.until_running(1).await;
    let next = server.act("echo").await;
    let (status, reply) = server.post_nothing(&format!("/cancel/{id}")).await;
    assert_eq!((status, reply), (200, json!({ "id": id, "status": "CANCELLED" })));
    server.until_status(&next, "COMPLETED").await;
    assert_eq!(server.gate.stopped.load(Ordering::SeqCst), 1);
    let state = server.status(&id).await;
    assert_eq!(state["status"], "CANCELLED");
    assert!(state.get("output").is_none() && state.get("error").is_none(), "{state}");
}

#[tokio::test]
async fn a_waiting_job_that_is_cancelled_never_runs() {
    let server = start().await;
    let first = server.act("hold").await;
    let waiting = server.act("echo").await;
    assert_eq!(server.post_nothing(&format!("/cancel/{waiting}")).await.1["status"], "CANCELLED");
    server.open_gate(1);
    server.until_status(&first, "COMPLETED").await;
    let state = server.status(&waiting).await;
    assert_eq!(state, json!({ "id": waiting, "status": "CANCELLED" }));
}

#[tokio::test]
async fn cancelling_what_is_over_changes_nothing() {
    let server = start().await;
    let (_, reply) = server.post("/runsync", json!({ "input": {} })).await;
    let path = format!("/cancel/{}", reply["id"].as_str().unwrap());
    assert_eq!(server.post_nothing(&path).await.1["status"], "COMPLETED");
}

#[tokio::test]
async fn a_client_that_waits_is_told_of_the_cancellation() {
    let server = start().await;
    let waiting = tokio::spawn(answer(server.request("POST", "/runsync").body(r#"{"input":{"do":"hold"}}"#)));
    server.until_running(1).await;
    let (_, requests) = server.get("/requests").await;
    let id = requests["requests"][0]["id"].as_str().unwrap();
    server.post_nothing(&format!("/cancel/{id}")).await;
    assert_eq!(waiting.await.unwrap().1["status"], "CANCELLED");
}

#[tokio::test]
async fn late_progress_and_a_late_result_do_not_change_a_final_state() {
    let server = start().await;
    let id = server.act("deaf").await;
    server.until_running(1).await;
    server.post_nothing(&format!("/cancel/{id}")).await;
    let next = server.act("echo").await;
    assert_eq!(server.status(&next).await["status"], "IN_QUEUE", "the slot is not free before the runner lets go");
    server.open_gate(1);
    server.until_status(&next, "COMPLETED").await;
    let state = server.status(&id).await;
    assert!(state["status"] == "CANCELLED" && state.get("output").is_none(), "{state}");
}

#[tokio::test]
async fn only_what_failed_can_be_retried_and_it_keeps_id_and_input() {
    let server = start().await;
    let (_, failed) = server.post("/runsync", json!({ "input": { "do": "fail" } })).await;
    let id = failed["id"].as_str().unwrap();
    let held = server.act("hold").await;
    let (status, reply) = server.post_nothing(&format!("/v2/any-id/retry/{id}")).await;
    assert_eq!((status, reply), (200, json!({ "id": id, "status": "IN_QUEUE" })));
    assert_eq!(server.status(id).await, json!({ "id": id, "status": "IN_QUEUE" }), "what it had is cleared");
    server.open_gate(1);
    server.until_status(&held, "COMPLETED").await;
    let again = server.until_status(id, "FAILED").await;
    assert_eq!(error(&again)["code"], "empty_prompt");
    let (_, health) = server.get("/health").await;
    assert_eq!((&health["jobs"]["retried"], &health["jobs"]["failed"]), (&json!(1), &json!(2)));

    let cancelled = server.act("hold").await;
    server.post_nothing(&format!("/cancel/{cancelled}")).await;
    for id in [held, cancelled] {
        let (status, reply) = server.post_nothing(&format!("/retry/{id}")).await;
        assert_eq!((status, &error(&reply)["code"]), (400, &json!("not_retryable")));
    }
}

#[tokio::test]
async fn purging_the_queue_cancels_what_waits_and_leaves_what_runs() {
    let server = start().await;
    let running = server.act("hold").await;
    server.until_status(&running, "IN_PROGRESS").await;
    let waiting = [server.act("echo").await, server.act("echo").await];
    let (status, reply) = server.post_nothing("/v2/any-id/purge-queue").await;
    assert_eq!((status, reply), (200, json!({ "removed": 2, "status": "completed" })));
    for id in &waiting {
        assert_eq!(server.status(id).await["status"], "CANCELLED");
    }
    assert_eq!(server.post_nothing("/purge-queue").await.1["removed"], 0);
    server.open_gate(1);
    server.until_status(&running, "COMPLETED").await;
}

// --- Time ---

#[tokio::test]
async fn a_job_beyond_its_execution_timeout_is_stopped_and_answered() {
    let server = start().await;
    let body = json!({ "input": { "do": "hold" }, "policy": { "executionTimeout": 30 } });
    let (status, reply) = server.post("/runsync", body).await;
    assert_eq!((status, &reply["status"]), (200, &json!("TIMED_OUT")));
    assert_eq!(error(&reply)["code"], "timed_out");
    assert!(reply["executionTime"].as_u64().unwrap() >= 30);
    server.until_running(0).await;
    let id = reply["id"].as_str().unwrap();
    assert_eq!(server.post_nothing(&format!("/retry/{id}")).await.0, 200);
    server.open_gate(1);
    server.until_status(id, "COMPLETED").await;
}

#[tokio::test]
async fn a_job_beyond_its_ttl_is_gone_whether_it_waits_or_runs() {
    let server = start().await;
    let running = server.run(json!({ "input": { "do": "hold" }, "policy": { "ttl": 80 } })).await;
    let waiting = json!({ "input": { "do": "echo" }, "policy": { "ttl": 40 } });
    let (status, reply) = server.post("/runsync", waiting).await;
    assert_eq!((status, &reply["status"]), (200, &json!("TIMED_OUT")), "who waits is told");
    server.until(&running, "gone", |state| state.get("status").is_none()).await;
    let id = reply["id"].as_str().unwrap();
    for id in [id, &running] {
        assert_eq!(server.get(&format!("/status/{id}")).await.0, 404);
    }
    server.until_running(0).await;
}

#[tokio::test]
async fn a_result_can_be_fetched_for_its_time_and_no_longer() {
    let short = Duration::from_millis(60);
    let server = start_with(Settings { keep_sync: short, ..quick() }, Hooks::default()).await;
    let kept = server.act("echo").await;
    let (_, reply) = server.post("/runsync", json!({ "input": {} })).await;
    let id = reply["id"].as_str().unwrap();
    let begun = Instant::now();
    server.until(id, "gone", |state| state.get("status").is_none()).await;
    assert!(begun.elapsed() + Duration::from_millis(20) > short);
    server.until_status(&kept, "COMPLETED").await;
}

// --- Health, metrics, description ---

#[tokio::test]
async fn health_counts_jobs_and_says_what_the_worker_does() {
    let server = start_loading(quick(), Hooks::default()).await;
    let workers = |state: &str| {
        let mut workers = json!({
            "idle": 0, "initializing": 0, "ready": 0, "running": 0, "throttled": 0, "unhealthy": 0,
        });
        for state in state.split(' ') {
            workers[state] = json!(1);
        }
        workers
    };
    let (_, health) = server.get("/v2/any-id/health").await;
    assert_eq!(health["workers"], workers("initializing"));
    server.load();
    for action in ["echo", "fail", "echo"] {
        server.post("/runsync", json!({ "input": { "do": action } })).await;
    }
    let running = server.act("hold").await;
    let waiting = server.act("hold").await;
    server.until_status(&running, "IN_PROGRESS").await;
    let (_, health) = server.get("/health").await;
    let jobs = json!({ "completed": 2, "failed": 1, "inProgress": 1, "inQueue": 1, "retried": 0 });
    assert_eq!(health, json!({ "jobs": jobs, "workers": workers("running") }));
    server.open_gate(2);
    server.until_status(&waiting, "COMPLETED").await;
    assert_eq!(server.get("/health").await.1["workers"], workers("idle ready"));
}

#[tokio::test]
async fn ping_says_204_while_the_model_loads_and_200_after() {
    let settings = Settings { health_path: "/healthz".into(), ..quick() };
    let server = start_loading(settings, Hooks::default()).await;
    let urls =
        [format!("{}/ping", server.url), format!("{}/healthz", server.url), format!("{}/any", server.health_url)];
    for url in &urls {
        assert_eq!(answer(server.client.get(url)).await, (204, Value::Null), "{url}");
    }
    let waiting = server.act("echo").await;
    assert_eq!(server.status(&waiting).await["status"], "IN_QUEUE");
    server.load();
    server.until_status(&waiting, "COMPLETED").await;
    for url in &urls {
        assert_eq!(answer(server.client.get(url)).await.0, 200, "{url}");
    }
}

#[tokio::test]
async fn metrics_tell_outcomes_levels_phases_memory_and_the_start() {
    let hooks = Hooks {
        gpu_memory: Some(Arc::new(|| Some(GpuMemory { used_bytes: 5, total_bytes: 9 }))),
        engines: Some(Arc::new(|| 2)),
        cold_start: Some(Arc::new(|| vec![("load_model", Duration::from_millis(2500))])),
        ..Hooks::default()
    };
    let server = start_with(quick(), hooks).await;
    for action in ["echo", "fail"] {
        server.post("/runsync", json!({ "input": { "do": action } })).await;
    }
    let running = server.act("hold").await;
    server.until_status(&running, "IN_PROGRESS").await;
    server.act("hold").await;
    let response = server.request("GET", "/metrics").send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = response.text().await.unwrap();
    for line in [
        r#"sdxl_worker_jobs_total{outcome="completed"} 1"#,
        r#"sdxl_worker_jobs_total{outcome="failed"} 1"#,
        r#"sdxl_worker_jobs_total{outcome="cancelled"} 0"#,
        "sdxl_worker_queue_length 1",
        "sdxl_worker_jobs_in_progress 1",
        r#"sdxl_worker_phase_seconds_sum{phase="denoise"} 1.5"#,
        r#"sdxl_worker_phase_seconds_count{phase="total"} 1"#,
        r#"sdxl_worker_phase_seconds_bucket{le="2.5",phase="denoise"} 1"#,
        r#"sdxl_worker_phase_seconds_count{phase="queue"} 3"#,
        r#"sdxl_worker_gpu_memory_bytes{kind="used"} 5"#,
        r#"sdxl_worker_gpu_memory_bytes{kind="total"} 9"#,
        "sdxl_worker_engines 2",
        r#"sdxl_worker_cold_start_seconds{phase="load_model"} 2.5"#,
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn requests_lists_jobs_without_what_they_hold() {
    let server = start().await;
    server.post("/runsync", json!({ "input": { "do": "fail" } })).await;
    server.post("/runsync", json!({ "input": { "prompt": "secret" } })).await;
    let (_, reply) = server.get("/requests").await;
    let statuses: Vec<_> = reply["requests"].as_array().unwrap().iter().map(|job| &job["status"]).collect();
    assert_eq!(statuses, ["COMPLETED", "FAILED"]);
    assert!(!reply.to_string().contains("secret") && !reply.to_string().contains("error"), "{reply}");
}

#[tokio::test]
async fn the_description_names_every_route_and_every_reference_in_it_resolves() {
    let server = start().await;
    let (status, document) = server.get("/openapi.json").await;
    assert_eq!((status, &document["openapi"]), (200, &json!("3.0.3")));
    let mut references = BTreeSet::new();
    collect_references(&document, &mut references);
    assert!(references.contains("#/components/schemas/GenerateRequest"), "{references:?}");
    for reference in &references {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "x");
        for method in ["GET", "POST"] {
            let (status, reply) = if path == "/metrics" && method == "GET" {
                (200, Value::Null)
            } else {
                answer(server.request(method, &path)).await
            };
            let exists = status != 405 && reply["detail"] != "Not Found";
            assert_eq!(exists, methods.get(method.to_lowercase()).is_some(), "{method} {path}: {status}");
        }
    }
    let request = &document["components"]["schemas"]["GenerateRequest"];
    assert_eq!(request["required"], json!(["prompt"]));
    assert_eq!(request["properties"]["width"]["type"], "integer");
    let state = &document["components"]["schemas"]["JobState"]["properties"];
    assert_eq!(keys(state), ["delayTime", "error", "executionTime", "id", "output", "status", "workerId"]);
    let statuses = &document["components"]["schemas"]["Status"]["enum"];
    assert_eq!(*statuses, json!(["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]));
}

fn collect_references(value: &Value, references: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(reference) if key == "$ref" => drop(references.insert(reference.clone())),
                    _ => collect_references(value, references),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, references)),
        _ => {}
    }
}

#[tokio::test]
async fn the_index_is_json_to_a_client_and_docs_leads_there() {
    let server = start().await;
    let (status, index) = server.get("/").await;
    assert_eq!((status, &index["openapi"]), (200, &json!("/openapi.json")));
    let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let response = client.get(format!("{}/docs", server.url)).send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["location"]), (307, &"/".parse().unwrap()));
}

#[tokio::test]
async fn the_index_is_a_page_to_a_browser_which_it_keeps_and_asks_after() {
    let server = start().await;
    let ask = || server.request("GET", "/").header("accept", "text/html,application/xhtml+xml,*/*;q=0.8");
    let page = ask().send().await.unwrap();
    let header = |name: &str| page.headers()[name].to_str().unwrap().to_owned();
    assert_eq!((page.status().as_u16(), header("content-type").as_str()), (200, "text/html; charset=utf-8"));
    assert_eq!((header("cache-control").as_str(), header("vary").as_str()), ("no-cache", "Accept"));
    let policy = header("content-security-policy");
    assert!(policy.starts_with("default-src 'none';") && policy.contains("connect-src 'self';"), "{policy}");
    assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
    let tag = header("etag");
    assert!(page.text().await.unwrap().starts_with("<!doctype html>"));
    let again = ask().header("if-none-match", &tag).send().await.unwrap();
    assert_eq!((again.status().as_u16(), again.headers()["etag"].to_str().unwrap()), (304, tag.as_str()));
    assert_eq!(again.text().await.unwrap(), "");
}

#[tokio::test]
async fn capabilities_are_told_once_the_model_is_loaded() {
    let hooks = Hooks { capabilities: Some(Arc::new(|| None)), ..Hooks::default() };
    let server = start_with(quick(), hooks).await;
    let (status, reply) = server.get("/capabilities").await;
    assert_eq!((status, &error(&reply)["code"]), (503, &json!("loading")));
    let read = || Some(Capabilities::new(&Limits::default(), vec!["ink".into()]));
    let hooks = Hooks { capabilities: Some(Arc::new(read)), ..Hooks::default() };
    let server = start_with(Settings { api_key: Some(Secret::new("k")), ..quick() }, hooks).await;
    assert_eq!(server.get("/capabilities").await.0, 401);
    let (status, reply) = answer(server.request("GET", "/capabilities").header("authorization", "k")).await;
    assert_eq!((status, &reply["loras"], &reply["width"]), (200, &json!(["ink"]), &json!(1024)));
    assert_eq!(reply["schedulers"].as_array().unwrap().len(), 21);
}

// --- Realtime ---

#[tokio::test]
async fn realtime_answers_with_the_bare_result() {
    let server = start().await;
    let (status, reply) = server.post("/any-id/realtime", json!({ "id": "rt-1", "input": { "a": 1 } })).await;
    assert_eq!((status, keys(&reply)), (200, vec!["output"]));
    assert_eq!(reply["output"]["echo"], json!({ "a": 1 }));
    let (status, reply) = server.post("/any-id/realtime", json!({ "id": "rt-1", "input": { "do": "fail" } })).await;
    assert_eq!((status, keys(&reply), &error(&reply)["code"]), (200, vec!["error"], &json!("empty_prompt")));
    assert_eq!(server.get("/status/rt-1").await.0, 404, "nothing is kept");
    let (status, reply) = server.post("/any-id/realtime", json!({ "input": {} })).await;
    assert_eq!((status, &reply["detail"][0]["loc"]), (422, &json!(["body", "id"])));
    let (status, reply) = server.post("/any-id/realtime", json!({ "id": 1, "input": {} })).await;
    assert_eq!((status, &reply["detail"][0]["type"]), (422, &json!("string_type")));
}

#[tokio::test]
async fn a_realtime_client_that_goes_away_takes_its_job_with_it() {
    let server = start().await;
    let body = r#"{"id":"rt-2","input":{"do":"hold"}}"#;
    let waiting = tokio::spawn(answer(server.request("POST", "/any-id/realtime").body(body)));
    server.until_running(1).await;
    let (status, reply) = server.post_text("/any-id/realtime", body.into()).await;
    assert_eq!((status, &error(&reply)["code"]), (400, &json!("duplicate_id")));
    waiting.abort();
    server.until_running(0).await;
    assert_eq!(server.get("/status/rt-2").await.0, 404);
}

#[tokio::test]
async fn a_realtime_job_that_is_cancelled_is_answered() {
    let server = start().await;
    let body = r#"{"id":"rt-3","input":{"do":"hold"}}"#;
    let waiting = tokio::spawn(answer(server.request("POST", "/any-id/realtime").body(body)));
    server.until_status("rt-3", "IN_PROGRESS").await;
    server.post_nothing("/cancel/rt-3").await;
    let (status, reply) = waiting.await.unwrap();
    assert_eq!((status, &error(&reply)["code"]), (200, &json!("cancelled")));
}

// --- Access ---

#[tokio::test]
async fn with_a_key_only_who_has_it_may_call() {
    let server = start_with(Settings { api_key: Some(Secret::new("k-123")), ..quick() }, Hooks::default()).await;
    for (header, status) in [
        (None, 401),
        (Some("Bearer k-12"), 401),
        (Some("Bearer k-1234"), 401),
        (Some("Bearer"), 401),
        (Some("Basic k-123"), 401),
        (Some("Bearer k-123"), 200),
        (Some("bearer  k-123"), 200),
        (Some("k-123"), 200),
    ] {
        for (method, path) in [("GET", "/v2/any-id/health"), ("POST", "/purge-queue"), ("GET", "/metrics")] {
            let request = server.request(method, path);
            let request = header.iter().fold(request, |request, value| request.header("authorization", *value));
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{method} {path} with {header:?}");
            assert_eq!(response.headers().contains_key("www-authenticate"), status == 401);
        }
    }
    for path in ["/ping", "/", "/openapi.json"] {
        assert_eq!(server.get(path).await.0, 200, "{path}");
    }
    let (status, reply) = server.post("/run", json!({ "input": {} })).await;
    assert_eq!((status, &error(&reply)["code"]), (401, &json!("unauthorized")));
    assert!(!format!("{:?}", Settings { api_key: Some(Secret::new("k-123")), ..quick() }).contains("k-123"));
}

#[tokio::test]
async fn a_web_page_of_another_origin_may_not_call_unless_it_is_allowed() {
    let settings = Settings { allow_origins: vec!["http://good.example".into()], ..quick() };
    let server = start_with(settings, Hooks::default()).await;
    let from = |origin: &str| server.request("POST", "/purge-queue").header("origin", origin).send();
    let own = from(&server.url).await.unwrap();
    assert_eq!(own.status().as_u16(), 200);
    assert!(!own.headers().contains_key("access-control-allow-origin"));
    for origin in ["http://bad.example", "null", "https://good.example"] {
        assert_eq!(from(origin).await.unwrap().status().as_u16(), 403, "{origin}");
    }
    let good = from("http://good.example").await.unwrap();
    assert_eq!(good.status().as_u16(), 200);
    assert_eq!(good.headers()["access-control-allow-origin"], "http://good.example");
    let preflight = |origin: &str| {
        let request = server.request("OPTIONS", "/run").header("access-control-request-method", "POST");
        request.header("origin", origin).send()
    };
    let good = preflight("http://good.example").await.unwrap();
    assert_eq!(
        (good.status().as_u16(), &good.headers()["access-control-allow-methods"]),
        (204, &"GET, POST".parse().unwrap())
    );
    let bad = preflight("http://bad.example").await.unwrap();
    assert!(!bad.status().is_success() && !bad.headers().contains_key("access-control-allow-methods"));
}

// --- Webhooks ---

/// Address and payload of what was posted.
type Posts = Arc<Mutex<Vec<(String, Value)>>>;

/// Records what is posted, and answers with the statuses given, then with 200.
fn recorder(statuses: Vec<Result<u16>>) -> (Hooks, Posts) {
    let posts = Posts::default();
    let (seen, statuses) = (posts.clone(), Mutex::new(statuses.into_iter()));
    let post_webhook: server::PostWebhook = Arc::new(move |url, body| {
        seen.lock().unwrap().push((url, serde_json::from_str(&body).unwrap()));
        let status = statuses.lock().unwrap().next().unwrap_or(Ok(200));
        Box::pin(async move { status })
    });
    (Hooks { post_webhook: Some(post_webhook), ..Hooks::default() }, posts)
}

#[tokio::test]
async fn a_webhook_gets_the_public_payload_on_success_and_failure() {
    let (hooks, posts) = recorder(vec![]);
    let server = start_with(quick(), hooks).await;
    for action in ["echo", "fail", "hold"] {
        let body = json!({
            "input": { "do": action }, "webhook": "https://hook.example/x?key=1",
            "policy": { "executionTimeout": 20 }, "s3Config": { "accessSecret": "s3-secret" },
        });
        let (_, state) = server.post("/v2/any-id/runsync", body).await;
        eventually("posted", || !posts.lock().unwrap().is_empty()).await;
        let (url, payload) = posts.lock().unwrap().pop().unwrap();
        assert_eq!(url, "https://hook.example/x?key=1");
        let mut expected = state.clone();
        expected["input"] = json!({ "do": action });
        expected["webhook"] = json!("https://hook.example/x?key=1");
        assert_eq!(payload, expected);
        let status = [("echo", "COMPLETED"), ("fail", "FAILED"), ("hold", "TIMED_OUT")];
        assert!(status.contains(&(action, payload["status"].as_str().unwrap())), "{payload}");
    }
}

#[tokio::test]
async fn a_webhook_is_tried_three_times() {
    let lost = || Err(Error::new(ErrorClass::Internal, "post_failed", "no connection"));
    let refused = || Err(Error::invalid("forbidden_address", "webhook", "a private address"));
    for (answers, tries) in [
        (vec![Ok(500), lost(), Ok(200)], 3),
        (vec![Ok(404), Ok(204)], 2),
        (vec![Ok(500), Ok(500), Ok(500), Ok(500)], 3),
        (vec![refused()], 1),
    ] {
        let (hooks, posts) = recorder(answers);
        let server = start_with(quick(), hooks).await;
        server.post("/runsync", json!({ "input": {}, "webhook": "https://hook.example" })).await;
        eventually("posted", || posts.lock().unwrap().len() >= tries).await;
        let urls = posts.clone();
        server.stop().await.unwrap();
        assert_eq!(urls.lock().unwrap().len(), tries);
    }
}

#[tokio::test]
async fn webhooks_of_the_last_jobs_are_posted_before_the_server_ends() {
    let (hooks, posts) = recorder(vec![Ok(500), Ok(500)]);
    let settings = Settings { webhook_pause: Duration::from_secs(3600), ..quick() };
    let server = start_with(settings, hooks).await;
    server.post("/runsync", json!({ "input": {}, "webhook": "https://hook.example" })).await;
    server.stop().await.unwrap();
    assert_eq!(posts.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn the_encoder_gets_the_job_s_own_bucket_and_makes_the_output() {
    let encode: server::Encode = Arc::new(|finished: server::Finished| {
        Box::pin(async move {
            match finished.s3_config {
                Some(config) => Ok(json!({ "bucket": config["bucketName"], "reply": finished.reply.to_json() })),
                None => Err(Error::new(ErrorClass::Internal, "upload_failed", "no bucket")),
            }
        })
    });
    let server = start_with(quick(), Hooks { encode: Some(encode), ..Hooks::default() }).await;
    let body = json!({ "input": { "a": 1 }, "s3Config": { "bucketName": "mine" } });
    let (_, reply) = server.post("/runsync", body).await;
    assert_eq!((&reply["output"]["bucket"], &reply["output"]["reply"]["echo"]["a"]), (&json!("mine"), &json!(1)));
    let (_, reply) = server.post("/runsync", json!({ "input": {} })).await;
    assert_eq!((&reply["status"], &error(&reply)["code"]), (&json!("FAILED"), &json!("upload_failed")));
}

// --- The end ---

#[tokio::test]
async fn an_idle_server_ends_at_once() {
    let server = start().await;
    server.post("/runsync", json!({ "input": {} })).await;
    let begun = Instant::now();
    server.stop().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn the_first_signal_answers_who_waits_and_finishes_who_runs() {
    let server = start().await;
    let request =
        |action: &str| server.request("POST", "/runsync").body(json!({ "input": { "do": action } }).to_string());
    let running = tokio::spawn(answer(request("hold")));
    server.until_running(1).await;
    let waiting = tokio::spawn(answer(request("echo")));
    let polled = server.act("echo").await;
    let begun = Instant::now();
    while server.get("/health").await.1["jobs"]["inQueue"] != 2 {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    server.signals.send(()).await.unwrap();
    let (status, reply) = waiting.await.unwrap();
    assert_eq!((status, &reply["status"], &error(&reply)["code"]), (200, &json!("FAILED"), &json!("shutting_down")));

    let (status, reply) = server.post("/run", json!({ "input": {} })).await;
    assert_eq!((status, &error(&reply)["code"]), (503, &json!("shutting_down")));
    assert_eq!(server.get("/ping").await.0, 503);
    assert_eq!(server.status(&polled).await["status"], "FAILED", "results can still be fetched");

    server.open_gate(1);
    assert_eq!(running.await.unwrap().1["status"], "COMPLETED");
    server.end().await.unwrap();
}

#[tokio::test]
async fn the_result_of_a_job_that_ended_meanwhile_can_be_fetched_before_the_server_ends() {
    let server = start().await;
    let id = server.act("hold").await;
    server.until_status(&id, "IN_PROGRESS").await;
    server.signals.send(()).await.unwrap();
    server.open_gate(1);
    server.until_status(&id, "COMPLETED").await;
    let begun = Instant::now();
    server.end().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(1), "it waits no longer than it must: {:?}", begun.elapsed());
}

#[tokio::test]
async fn the_second_signal_stops_who_runs() {
    let server = start().await;
    let running = tokio::spawn(answer(server.request("POST", "/runsync").body(r#"{"input":{"do":"hold"}}"#)));
    server.until_running(1).await;
    server.signals.send(()).await.unwrap();
    let gate = server.gate.clone();
    server.stop().await.unwrap();
    let (_, reply) = running.await.unwrap();
    assert_eq!((&reply["status"], &error(&reply)["code"]), (&json!("FAILED"), &json!("shutting_down")));
    assert_eq!(gate.stopped.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_drain_budget_that_is_used_up_stops_who_runs() {
    let settings = Settings { drain: Some(Duration::from_millis(20)), ..quick() };
    let server = start_with(settings, Hooks::default()).await;
    let running = tokio::spawn(answer(server.request("POST", "/runsync").body(r#"{"input":{"do":"hold"}}"#)));
    server.until_running(1).await;
    server.stop().await.unwrap();
    assert_eq!(running.await.unwrap().1["status"], "FAILED");
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_fails_the_jobs_with_the_reason_and_ends_the_server() {
    let server = start_loading(quick(), Hooks::default()).await;
    let waiting = tokio::spawn(answer(server.request("POST", "/runsync").body(r#"{"input":{}}"#)));
    let begun = Instant::now();
    while server.get("/health").await.1["jobs"]["inQueue"] != 1 {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    let error_of_load =
        Error::setup("model_not_found", "there is no model").source(anyhow::anyhow!("the disk is empty"));
    server.runner.send_replace(RunnerState::Failed(error_of_load));
    let (_, reply) = waiting.await.unwrap();
    assert_eq!((&reply["status"], &error(&reply)["code"]), (&json!("FAILED"), &json!("model_not_found")));
    assert_eq!(error(&reply)["error_traceback"], "the disk is empty");
    let error = server.end().await.unwrap_err();
    assert_eq!((error.code, error.class), ("model_not_found", ErrorClass::Setup));
    assert!(error.source.is_some());
}

#[tokio::test]
async fn a_lost_device_fails_the_jobs_and_ends_the_server() {
    let server = start().await;
    let (_, reply) = server.post("/runsync", json!({ "input": { "do": "lose_device" } })).await;
    assert_eq!((&reply["status"], &error(&reply)["code"]), (&json!("FAILED"), &json!("device_lost")));
    assert_eq!(server.end().await.unwrap_err().class, ErrorClass::DeviceLost);
}

#[tokio::test]
async fn a_thousand_jobs_leave_nothing_behind() {
    let settings = Settings { concurrency: 4, max_queue: 2000, keep: Duration::ZERO, ..quick() };
    let server = start_with(settings, Hooks::default()).await;
    for _ in 0..1000 {
        server.act("echo").await;
    }
    let begun = Instant::now();
    let left = async || server.request("GET", "/metrics").send().await.unwrap().text().await.unwrap();
    while !left().await.contains("sdxl_worker_held_bytes 0") {
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", left().await);
    }
    let (_, health) = server.get("/health").await;
    assert_eq!((&health["jobs"]["completed"], &health["jobs"]["inQueue"]), (&json!(1000), &json!(0)));
    assert_eq!(server.get("/requests").await.1["requests"], json!([]));
}
