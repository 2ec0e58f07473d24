//! Taking jobs: what is asked, how often, and what becomes of the answers.

use std::collections::HashSet;
use std::time::Instant;

use serde_json::json;
use tokio::time::sleep;

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::start::{job, ms, settings, start};

#[tokio::test(flavor = "multi_thread")]
async fn every_call_carries_the_raw_key_and_takes_look_like_the_sdks() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    host.give(job("a", json!({ "progress": 1, "stream": true })));
    host.give(job("b", json!({ "progress": 1 })));
    host.wait_for_results(2).await;
    host.wait_for(Call::Ping, 1).await;
    host.wait_for(Call::Stop, 1).await;
    worker.stop().await;
    let kinds: HashSet<Call> = host.all_calls().iter().map(|call| call.call).collect();
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    for call in host.all_calls() {
        assert_eq!(call.header("authorization"), Some("raw-api-key"));
    }
    let take = &host.calls(Call::Take)[0];
    assert_eq!(take.request.target, "/v2/endpoint/job-take/pod1?gpu=NVIDIA+GeForce+RTX+4090&job_in_progress=0");
    assert_eq!((take.request.method.as_str(), take.header("content-type")), ("GET", Some("application/json")));
    assert_eq!(take.header("accept"), Some("*/*"));
    assert!(take.header("user-agent").unwrap().starts_with("sdxl-worker/"));
    let stop = &host.calls(Call::Stop)[0];
    assert_eq!(stop.request.target, "/v2/endpoint/job-stop/pod1?gpu=NVIDIA+GeForce+RTX+4090");
    // The SDK lets the id of an earlier job slip into later polls.
    for call in [Call::Take, Call::Stop, Call::Ping] {
        assert!(host.calls(call).iter().all(|call| call.header("x-request-id").is_none()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn job_in_progress_says_whether_any_job_is_held() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 2;
    let _worker = start(settings);
    host.give(job("a", json!({ "ms": 200 })));
    let calls = host.wait_for(Call::Take, 1).await;
    assert_eq!(calls[0].request.parameter("job_in_progress"), Some("1"));
    host.wait_for_results(1).await;
    let batches = host.calls(Call::TakeBatch);
    assert_eq!(batches[0].request.parameter("job_in_progress"), Some("0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn free_slots_decide_between_the_batch_route_and_the_single_one() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 3;
    let _worker = start(settings);
    host.wait_for(Call::TakeBatch, 1).await;
    let jobs = json!([job("long", json!({ "ms": 600 })), job("short", json!({ "ms": 100 }))]);
    host.answer(Call::TakeBatch, Answer::Json(jobs));
    host.give(job("third", json!({ "ms": 600 })));
    let batches = host.wait_for(Call::TakeBatch, 1).await;
    assert_eq!(batches[0].request.parameter("batch_size"), Some("3"));
    host.wait_for(Call::Take, 1).await;
    host.wait_for_results(3).await;
    let last = host.wait_for(Call::TakeBatch, 2).await;
    assert!(matches!(last[1].request.parameter("batch_size"), Some("2" | "3")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_the_batch_route_is_asked_for_single_jobs_for_good() {
    let host = FakeRunpod::start().await;
    host.always(Call::TakeBatch, Answer::Status(404));
    let mut settings = settings(&host);
    settings.concurrency = 2;
    let _worker = start(settings);
    for id in ["a", "b", "c"] {
        host.give(job(id, json!({ "ms": 50 })));
    }
    host.wait_for_results(3).await;
    assert_eq!(host.calls(Call::TakeBatch).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn polls_that_are_answered_at_once_with_204_are_spaced_out_and_held_ones_are_not() {
    let host = FakeRunpod::start().await;
    host.hold_polls(ms(120));
    let _worker = start(settings(&host));
    let takes = host.wait_for(Call::Take, 4).await;
    for pair in takes.windows(2) {
        assert!(pair[1].at - pair[0].at < ms(170), "a held poll is followed by the next at once");
    }
    host.always(Call::Take, Answer::Status(204));
    sleep(ms(200)).await;
    let before = host.calls(Call::Take).len();
    sleep(ms(400)).await;
    let rate = host.calls(Call::Take).len() - before;
    assert!((4..=42).contains(&rate), "{rate} polls in 400 ms with a pause of 10 to 20 ms");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_that_is_held_too_long_is_given_up_and_its_connection_closed() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.take_timeout = ms(150);
    let _worker = start(settings);
    let takes = host.wait_for(Call::Take, 5).await;
    for pair in takes.windows(2) {
        let gap = pair[1].at - pair[0].at;
        assert!((ms(140)..ms(400)).contains(&gap), "{gap:?}");
    }
    // the take, the stop poll, the heartbeat and one that may just be closing
    assert!(host.connections() <= 4, "{}", host.connections());
    host.give(job("a", json!({})));
    host.wait_for_results(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_take_goes_out_the_moment_the_slot_is_free() {
    let host = FakeRunpod::start().await;
    let _worker = start(settings(&host));
    for index in 0..10 {
        host.give(job(&format!("job-{index}"), json!({ "ms": 20 })));
    }
    host.wait_for_results(10).await;
    let (takes, posts) = (host.wait_for(Call::Take, 11).await, host.finals());
    let mut gaps: Vec<_> = posts.iter().zip(&takes[1..]).map(|(post, take)| take.at - post.at).collect();
    gaps.sort();
    assert!(gaps[5] < ms(20), "from a result to the next take: {gaps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_concurrency_changes_at_once_while_jobs_run_and_is_never_exceeded() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    host.give(job("long", json!({ "ms": 700 })));
    host.until("start of the long job", || (!worker.runner.events(Event::Started).is_empty()).then_some(())).await;
    for index in 0..6 {
        host.give(job(&format!("job-{index}"), json!({ "ms": 60 })));
    }
    let raised = Instant::now();
    worker.concurrency.send_replace(3);
    host.until("two more jobs", || (worker.runner.events(Event::Started).len() >= 3).then_some(())).await;
    assert!(raised.elapsed() < ms(200), "a higher number counts at once: {:?}", raised.elapsed());
    host.wait_for_results(6).await;
    assert_eq!(worker.runner.most_at_once.load(std::sync::atomic::Ordering::SeqCst), 3);

    host.wait_for_results(7).await;
    worker.concurrency.send_replace(1);
    sleep(ms(50)).await;
    worker.runner.most_at_once.store(0, std::sync::atomic::Ordering::SeqCst);
    // The pending take still asks for three; all it brings is ours, and runs one by one.
    for index in 6..12 {
        host.give(job(&format!("job-{index}"), json!({ "ms": 30 })));
    }
    host.wait_for_results(13).await;
    assert_eq!(worker.runner.most_at_once.load(std::sync::atomic::Ordering::SeqCst), 1);
    // A value that makes no sense is read as one job.
    worker.concurrency.send_replace(0);
    host.give(job("last", json!({})));
    host.wait_for_results(14).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fast_jobs_are_not_held_up_by_a_slow_one() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 2;
    let worker = start(settings);
    host.give(job("slow", json!({ "ms": 800 })));
    for index in 0..8 {
        host.give(job(&format!("fast-{index}"), json!({ "ms": 20 })));
    }
    let results = host.wait_for_results(9).await;
    assert_eq!(results.last().unwrap().job_id(), "slow");
    let started = worker.runner.when("fast-0", Event::Started);
    let ended = worker.runner.when("fast-7", Event::Ended);
    assert!(ended - started < ms(8 * (20 + 50)), "eight fast jobs took {:?}", ended - started);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_jobs_than_asked_for_are_kept_and_run_in_turn() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    let jobs: Vec<_> = (0..4).map(|index| job(&format!("job-{index}"), json!({ "ms": 20 }))).collect();
    host.answer(Call::Take, Answer::Json(json!(jobs)));
    host.wait_for_results(4).await;
    assert_eq!(worker.runner.most_at_once.load(std::sync::atomic::Ordering::SeqCst), 1);
}
