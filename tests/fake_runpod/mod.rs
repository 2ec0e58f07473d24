//! RunPod's host as a worker sees it: six routes on loopback, answers that a test scripts, faults below HTTP, and a record
//! of every call as it came over the wire. Written on a socket, since what matters here no HTTP library lets one do wrong.

mod serve;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

pub use wire::Request;

/// What a worker can call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    Take,
    TakeBatch,
    Stop,
    Done,
    Stream,
    Ping,
    /// Anything else; answered 404.
    Unknown,
}

/// What the host does with one call.
#[derive(Debug, Clone)]
pub enum Answer {
    Status(u16),
    /// 200 with JSON.
    Json(Value),
    /// Status, headers, body; all as they are.
    Full(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The connection is reset or closed before an answer.
    Drop,
    /// Half an answer, then the end of the connection.
    Truncated(Value),
    Delayed(Duration, Box<Answer>),
    /// No answer, for as long as the worker waits.
    Never,
}

impl Answer {
    pub fn text(status: u16, content_type: &str, body: &str) -> Answer {
        Answer::Full(status, vec![("Content-Type", content_type.into())], body.as_bytes().to_vec())
    }

    pub fn after(delay: Duration, answer: Answer) -> Answer {
        Answer::Delayed(delay, Box::new(answer))
    }
}

/// One call as it came, and what became of it.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub call: Call,
    pub at: Instant,
    pub request: Request,
    /// 0 where there was no answer (yet).
    pub status: u16,
}

impl Recorded {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.request.header(name)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.request.body).expect("a post's body is JSON")
    }

    /// The last segment of the path: a job's id in posts.
    pub fn job_id(&self) -> &str {
        self.request.path().rsplit('/').next().unwrap_or_default()
    }

    /// A job-done that ends the job.
    pub fn is_final(&self) -> bool {
        self.call == Call::Done && self.json().get("status").is_none()
    }
}

/// Decides about calls that no script answers; `None` for the usual answer.
type Rule = Box<dyn Fn(&Recorded) -> Option<Answer> + Send>;
/// Hears of a job that was handed out, and whether the worker can have it.
type Observer = Box<dyn Fn(&Value, bool) + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Value>,
    scripts: HashMap<Call, VecDeque<Answer>>,
    rule: Option<Rule>,
    observer: Option<Observer>,
    calls: Vec<Recorded>,
    /// Calls before these, whose records are gone.
    forgotten: usize,
    connections: usize,
    /// How long a poll without an answer is held.
    hold: Duration,
}

/// The host. Serves until it is dropped.
pub struct FakeRunpod {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    /// Counts what may have changed anything.
    changed: watch::Sender<u64>,
}

impl Drop for FakeRunpod {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeRunpod {
    pub async fn start() -> FakeRunpod {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { hold: Duration::from_secs(20), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: watch::Sender::new(0) });
        let server = tokio::spawn(serve::accept(listener, shared.clone()));
        FakeRunpod { address, shared, server }
    }

    /// The variables the platform would set.
    pub fn variables(&self) -> HashMap<String, String> {
        let base = format!("http://{}/v2/endpoint", self.address);
        let gpu = "gpu=NVIDIA+GeForce+RTX+4090";
        [
            ("RUNPOD_WEBHOOK_GET_JOB", format!("{base}/job-take/$ID?{gpu}")),
            ("RUNPOD_WEBHOOK_POST_OUTPUT", format!("{base}/job-done/$RUNPOD_POD_ID/$ID?{gpu}")),
            ("RUNPOD_WEBHOOK_POST_STREAM", format!("{base}/job-stream/$RUNPOD_POD_ID/$ID?{gpu}")),
            ("RUNPOD_WEBHOOK_PING", format!("{base}/ping/$RUNPOD_POD_ID?{gpu}")),
            ("RUNPOD_AI_API_KEY", "raw-api-key".into()),
            ("RUNPOD_POD_ID", "pod1".into()),
            ("RUNPOD_ENDPOINT_ID", "endpoint".into()),
            ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true".into()),
            ("RUNPOD_SKIP_GPU_CHECK", "true".into()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }

    /// Queues a job; the next take gets it.
    pub fn give(&self, job: Value) {
        self.change(|state| state.jobs.push_back(job));
    }

    /// Answers the next call of this kind so, before anything else.
    pub fn answer(&self, call: Call, answer: Answer) {
        self.change(|state| state.scripts.entry(call).or_default().push_back(answer));
    }

    pub fn answers(&self, call: Call, answers: impl IntoIterator<Item = Answer>) {
        answers.into_iter().for_each(|answer| self.answer(call, answer));
    }

    /// Decides about every call that no script answers.
    pub fn rule(&self, rule: impl Fn(&Recorded) -> Option<Answer> + Send + 'static) {
        self.change(|state| state.rule = Some(Box::new(rule)));
    }

    /// Answers every call of this kind so.
    pub fn always(&self, call: Call, answer: Answer) {
        self.rule(move |recorded| (recorded.call == call).then(|| answer.clone()));
    }

    pub fn observe(&self, observer: impl Fn(&Value, bool) + Send + 'static) {
        self.change(|state| state.observer = Some(Box::new(observer)));
    }

    pub fn hold_polls(&self, hold: Duration) {
        self.change(|state| state.hold = hold);
    }

    pub fn calls(&self, call: Call) -> Vec<Recorded> {
        self.shared.lock().calls.iter().filter(|recorded| recorded.call == call).cloned().collect()
    }

    pub fn all_calls(&self) -> Vec<Recorded> {
        self.shared.lock().calls.clone()
    }

    /// For long runs: what was recorded so far takes no more memory.
    pub fn forget_calls(&self) {
        self.change(|state| {
            state.forgotten += state.calls.len();
            state.calls.clear();
        });
    }

    pub fn finals(&self) -> Vec<Recorded> {
        self.calls(Call::Done).into_iter().filter(Recorded::is_final).collect()
    }

    pub fn waiting_jobs(&self) -> usize {
        self.shared.lock().jobs.len()
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections
    }

    /// Waits until this kind of call was made so often.
    pub async fn wait_for(&self, call: Call, count: usize) -> Vec<Recorded> {
        self.until(&format!("{count} x {call:?}"), || Some(self.calls(call)).filter(|calls| calls.len() >= count)).await
    }

    /// Waits until so many final results were answered with 2xx.
    pub async fn wait_for_results(&self, count: usize) -> Vec<Recorded> {
        let accepted = || {
            let finals = self.finals().into_iter().filter(|post| (200..300).contains(&post.status));
            Some(finals.collect::<Vec<_>>()).filter(|posts| posts.len() >= count)
        };
        self.until(&format!("{count} results"), accepted).await
    }

    pub async fn until<T>(&self, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let mut changes = self.shared.changed.subscribe();
        let search = async {
            loop {
                changes.mark_unchanged();
                if let Some(found) = found() {
                    return found;
                }
                let _ = timeout(Duration::from_millis(50), changes.changed()).await;
            }
        };
        match timeout(Duration::from_secs(20), search).await {
            Ok(found) => found,
            Err(_) => panic!("waited in vain for {what}; there were {:#?}", summary(&self.all_calls())),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.tell();
    }
}

fn summary(calls: &[Recorded]) -> Vec<String> {
    calls.iter().map(|call| format!("{} {} -> {}", call.request.method, call.request.target, call.status)).collect()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}
