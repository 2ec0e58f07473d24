//! Connections and calls: from a request to the answer that a script, a rule or the usual behaviour gives it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::wire::{Request, Wire};
use super::{Answer, Call, Recorded, Shared};

pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = shared.clone();
        connections.spawn(async move {
            shared.lock().connections += 1;
            // counts down also where the task is aborted
            let _open = Open(shared.clone());
            serve(stream, &shared).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().connections -= 1;
    }
}

/// One connection, call by call; `None` from anything below ends it.
async fn serve(stream: TcpStream, shared: &Shared) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut wire = Wire::new(stream);
    loop {
        let request = wire.read_request().await?;
        let call = kind(&request);
        let recorded = Recorded { call, at: Instant::now(), request, status: 0 };
        let (index, scripted) = {
            let mut state = shared.lock();
            state.calls.push(recorded.clone());
            let index = state.forgotten + state.calls.len() - 1;
            let scripted = state.scripts.get_mut(&call).and_then(VecDeque::pop_front);
            (index, scripted.or_else(|| state.rule.as_ref().and_then(|rule| rule(&recorded))))
        };
        shared.tell();
        let (answer, jobs) = match scripted {
            Some(answer) => (answer, vec![]),
            None => usual(&recorded, shared, &mut wire).await?,
        };
        let status = act(&mut wire, answer).await;
        // A job is taken when the whole answer was written and the connection stays open.
        let taken = status.is_some() && (jobs.is_empty() || wire.stays_open(Duration::from_millis(50)).await);
        {
            let mut state = shared.lock();
            let kept = index.checked_sub(state.forgotten);
            if let Some(recorded) = kept.and_then(|index| state.calls.get_mut(index)) {
                recorded.status = status.unwrap_or(0);
            }
            for job in jobs.into_iter().rev() {
                if let Some(observer) = &state.observer {
                    observer(&job, taken);
                }
                if !taken {
                    state.jobs.push_front(job);
                }
            }
        }
        shared.tell();
        status.filter(|_| taken)?;
    }
}

/// Does it; the status that was written, if a whole answer was.
async fn act(wire: &mut Wire, answer: Answer) -> Option<u16> {
    match answer {
        Answer::Delayed(delay, answer) => {
            tokio::select! {
                () = sleep(delay) => {}
                () = wire.closed() => return None,
            }
            Box::pin(act(wire, *answer)).await
        }
        Answer::Status(status) => wire.write(status, &[], b"").await,
        Answer::Json(value) => {
            wire.write(200, &[("Content-Type", "application/json".into())], value.to_string().as_bytes()).await
        }
        Answer::Full(status, headers, body) => wire.write(status, &headers, &body).await,
        Answer::Drop => None,
        Answer::Truncated(value) => {
            wire.write_half(value.to_string().as_bytes()).await;
            None
        }
        Answer::Never => {
            wire.closed().await;
            None
        }
    }
}

/// What the host does when no test says otherwise, and the jobs that this hands out.
async fn usual(recorded: &Recorded, shared: &Shared, wire: &mut Wire) -> Option<(Answer, Vec<Value>)> {
    let size = match recorded.call {
        Call::Take => 1,
        Call::TakeBatch => recorded.request.parameter("batch_size")?.parse().ok()?,
        Call::Stop => 0,
        Call::Unknown => return Some((Answer::Status(404), vec![])),
        _ => return Some((Answer::Json(serde_json::json!({ "status": "ok" })), vec![])),
    };
    let hold = shared.lock().hold;
    let mut changes = shared.changed.subscribe();
    let held = async {
        loop {
            changes.mark_unchanged();
            {
                // A script that comes while the poll is held is its answer.
                let mut state = shared.lock();
                if let Some(answer) = state.scripts.get_mut(&recorded.call).and_then(VecDeque::pop_front) {
                    return (answer, vec![]);
                }
                let count = state.jobs.len().min(size);
                if count > 0 {
                    let jobs: Vec<Value> = state.jobs.drain(..count).collect();
                    let answer = match recorded.call {
                        Call::TakeBatch => Answer::Json(Value::Array(jobs.clone())),
                        _ => Answer::Json(jobs[0].clone()),
                    };
                    return (answer, jobs);
                }
            }
            changes.changed().await.ok();
        }
    };
    tokio::select! {
        biased;
        () = wire.closed() => None,
        answer = held => Some(answer),
        () = sleep(hold) => Some((Answer::Status(204), vec![])),
    }
}

fn kind(request: &Request) -> Call {
    let has = |segment: &str| request.path().split('/').any(|found| found == segment);
    let calls = [
        ("job-take", Call::Take),
        ("job-take-batch", Call::TakeBatch),
        ("job-stop", Call::Stop),
        ("job-done", Call::Done),
        ("job-stream", Call::Stream),
        ("ping", Call::Ping),
    ];
    calls.into_iter().find(|(segment, _)| has(segment)).map_or(Call::Unknown, |(_, call)| call)
}
