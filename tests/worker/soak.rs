//! Many jobs while everything goes wrong at random: every job that was taken ends in exactly one accepted final result,
//! or was stopped on purpose.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::fake_runpod::{Answer, Call, FakeRunpod, Recorded};
use crate::start::{job, ms, settings, start};
use sdxl_worker::worker::Exit;

#[derive(Default, Debug)]
struct Fate {
    taken: usize,
    stopped: bool,
    /// Bodies of final results that were answered 2xx, or whose 2xx was lost.
    accepted: Vec<Vec<u8>>,
}

type Fates = Arc<Mutex<HashMap<String, Fate>>>;

/// What the host does with a call: mostly what it should.
fn misbehave(call: &Recorded, fates: &Fates) -> Option<Answer> {
    let dice = fastrand::u8(..100);
    let usual = Answer::Json(json!({ "status": "ok" }));
    match call.call {
        Call::Take | Call::TakeBatch => match dice {
            0..4 => Some(Answer::Status(500)),
            4..6 => Some(Answer::Full(429, vec![("Retry-After", "0.05".into())], vec![])),
            6..8 => Some(Answer::Status(400)),
            8..11 => Some(Answer::Drop),
            11..13 => Some(Answer::text(200, "application/json", "[{\"input\": 1}, 7")),
            13..15 => Some(Answer::after(ms(30), Answer::Status(204))),
            _ => None,
        },
        Call::Done if !call.is_final() => match dice {
            0..10 => Some(Answer::Status(500)),
            10..15 => Some(Answer::after(ms(50), usual)),
            15..20 => Some(Answer::Drop),
            _ => None,
        },
        Call::Done => {
            let mut fates = fates.lock().unwrap();
            let fate = fates.get_mut(call.job_id()).expect("only jobs that were handed out are posted");
            let body = call.request.body.clone();
            match dice {
                0..8 => Some(Answer::Status(500)),
                8..12 => Some(Answer::Full(429, vec![("Retry-After", "0.05".into())], vec![])),
                // A host that has a result does not refuse its repetition and then take an error in its place.
                12..15 if fate.accepted.is_empty() && call.json().get("error").is_none() => Some(Answer::Status(400)),
                15..20 => Some(Answer::Drop),
                // The host has it, and the worker never hears so.
                20..23 => {
                    fate.accepted.push(body);
                    Some(Answer::Truncated(json!(null)))
                }
                23..25 => {
                    fate.accepted.push(body);
                    Some(Answer::after(ms(40), Answer::Drop))
                }
                25..35 => {
                    fate.accepted.push(body);
                    Some(Answer::after(ms(40), usual))
                }
                _ => {
                    fate.accepted.push(body);
                    None
                }
            }
        }
        Call::Stop if dice < 30 => {
            Some([Answer::Status(500), Answer::Drop, Answer::Status(204)][dice as usize % 3].clone())
        }
        Call::Ping if dice < 30 => Some([Answer::Status(500), Answer::Drop, Answer::Never][dice as usize % 3].clone()),
        _ => None,
    }
}

fn random_job(id: &str) -> Value {
    let input = match fastrand::u8(..10) {
        0 => json!({ "fail": "input" }),
        1 => json!({ "fail": "panic" }),
        2 => json!({ "fail": "memory", "ms": 10 }),
        3 => json!({ "progress": 5, "every_ms": 4 }),
        4 => json!({ "stream": true, "progress": 4, "every_ms": 4 }),
        5 => json!({ "picture": 40_000 }),
        6 => return json!({ "id": id }),
        _ => json!({ "ms": fastrand::u64(..40) }),
    };
    job(id, input)
}

/// Stops and duplicates at random, while there are jobs.
async fn disturb(host: &FakeRunpod, fates: &Fates) {
    loop {
        sleep(ms(fastrand::u64(20..80))).await;
        let open: Vec<String> = {
            let fates = fates.lock().unwrap();
            fates.iter().filter(|(_, fate)| fate.taken > 0 && !is_settled(fate)).map(|(id, _)| id.clone()).collect()
        };
        let Some(id) = fastrand::choice(open) else { continue };
        if fastrand::u8(..4) == 0 {
            fates.lock().unwrap().get_mut(&id).unwrap().stopped = true;
            host.answer(Call::Stop, Answer::Json(json!({ "jobsToStop": [id] })));
        }
    }
}

fn is_settled(fate: &Fate) -> bool {
    fate.stopped || !fate.accepted.is_empty()
}

async fn soak(count: usize, concurrency: usize) {
    let host = Arc::new(FakeRunpod::start().await);
    host.hold_polls(ms(300));
    let fates = Fates::default();
    let (ruled, observed) = (fates.clone(), fates.clone());
    host.rule(move |call| misbehave(call, &ruled));
    host.observe(move |job, taken| {
        let mut fates = observed.lock().unwrap();
        let fate = fates.entry(job["id"].as_str().unwrap().to_owned()).or_default();
        fate.taken += usize::from(taken);
    });
    for index in 0..count {
        let id = format!("{}{index}", if index % 3 == 0 { "sync-" } else { "" });
        fates.lock().unwrap().insert(id.clone(), Fate::default());
        let job = random_job(&id);
        host.give(job.clone());
        if concurrency > 1 && fastrand::u8(..12) == 0 {
            // in one answer with its first delivery, or right after it
            host.give(job);
        }
    }
    let disturbing = tokio::spawn({
        let (host, fates) = (host.clone(), fates.clone());
        async move { disturb(&host, &fates).await }
    });

    let all = |fates: &Fates| fates.lock().unwrap().values().filter(|fate| is_settled(fate)).count();
    let (begun, limit) = (Instant::now(), Duration::from_secs(60 + count as u64));
    let (mut restarts, mut first_memory) = (0, None);
    let tasks = alive_tasks();
    let mut settings = settings(&host);
    (settings.concurrency, settings.max_result_bytes, settings.take_close_grace) = (concurrency, 20_000, ms(60));
    (settings.backoff, settings.post_timeout) = (ms(5), ms(500));
    while all(&fates) < count && begun.elapsed() < limit {
        let mut worker = start(settings.clone());
        let shift = Instant::now() + ms(fastrand::u64(200..1500));
        while all(&fates) < count && Instant::now() < shift {
            sleep(ms(20)).await;
        }
        worker.signal();
        let exit = worker.exit().await;
        assert_eq!(exit, Exit::Drained, "restart {restarts}");
        restarts += 1;
        host.forget_calls();
        if all(&fates) > count / 5 {
            first_memory.get_or_insert_with(resident_megabytes);
        }
    }
    disturbing.abort();
    host.until("the end of the workers' tasks", || (alive_tasks() <= tasks + 2).then_some(())).await;
    let memory = (first_memory.unwrap_or_default(), resident_megabytes());
    // measured where nothing else runs in this process
    let alone = std::env::var_os("SOAK_JOBS").is_some();
    assert!(!alone || memory.1 < memory.0 + 30, "from {} to {} MB", memory.0, memory.1);

    let fates = fates.lock().unwrap();
    let open: Vec<_> = fates.iter().filter(|(_, fate)| !is_settled(fate)).collect();
    assert!(open.is_empty(), "without an end: {open:#?}");
    for (id, fate) in fates.iter() {
        let mut bodies = fate.accepted.clone();
        bodies.dedup();
        // A job that came again after its end is a new one: then each delivery has its result.
        let texts = bodies.iter().map(|body| String::from_utf8_lossy(body).chars().take(200).collect::<String>());
        assert!(bodies.len() <= fate.taken.max(1), "{id} has two results: {:#?}", texts.collect::<Vec<_>>());
    }
    eprintln!(
        "soak: {count} jobs, concurrency {concurrency}, {restarts} restarts, {:?}, {memory:?} MB",
        begun.elapsed()
    );
}

fn alive_tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

fn resident_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
}

/// The length of the run.
///
/// `SOAK_JOBS=500 cargo test --release --test worker soak:: -- --nocapture` is the long form.
fn jobs() -> usize {
    std::env::var("SOAK_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(100)
}

#[tokio::test(flavor = "multi_thread")]
async fn under_random_faults_every_taken_job_has_one_result_or_a_stop_with_one_slot() {
    soak(jobs(), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_random_faults_every_taken_job_has_one_result_or_a_stop_with_three_slots() {
    soak(jobs(), 3).await;
}
