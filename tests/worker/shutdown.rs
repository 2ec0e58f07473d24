//! Signals: nothing that was taken is lost, and nothing is waited for in vain.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::sleep;

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::posting::report;
use crate::start::{TestWorker, job, ms, settings, start};
use sdxl_worker::worker::Exit;

async fn started(host: &FakeRunpod, worker: &TestWorker, count: usize) {
    host.until("started jobs", || (worker.runner.events(Event::Started).len() >= count).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_ends_within_the_grace_although_its_polls_are_held() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    host.wait_for(Call::Take, 1).await;
    let signalled = Instant::now();
    assert_eq!(worker.stop().await, Exit::Drained);
    assert!((ms(150)..ms(400)).contains(&signalled.elapsed()), "{:?}", signalled.elapsed());
    assert_eq!(Exit::Drained.code(), 0);
    // and the default grace keeps it within about two seconds
    assert_eq!(crate::start::settings_of(&host.variables()).take_close_grace, Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_finished_and_posted_with_pings_until_then_and_no_new_take() {
    let host = FakeRunpod::start().await;
    let mut worker = start(settings(&host));
    host.give(job("a", json!({ "ms": 900 })));
    host.give(job("b", json!({})));
    started(&host, &worker, 1).await;
    worker.signal();
    let pings = host.calls(Call::Ping).len();
    assert_eq!(worker.exit().await, Exit::Drained);
    assert_eq!((host.finals().len(), host.waiting_jobs()), (1, 1));
    assert!(host.calls(Call::Ping).len() >= pings + 3);
    let after = host.calls(Call::Ping).len();
    sleep(ms(500)).await;
    assert!(host.calls(Call::Ping).len() <= after + 1, "and none afterwards");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_in_the_pending_take_after_the_signal_is_run() {
    let host = FakeRunpod::start().await;
    let mut worker = start(settings(&host));
    host.wait_for(Call::Take, 1).await;
    worker.signal();
    sleep(ms(70)).await;
    host.give(job("late", json!({ "ms": 300 })));
    assert_eq!(worker.exit().await, Exit::Drained);
    assert_eq!(host.finals()[0].json(), json!({ "output": { "done": "late" } }));
    assert_eq!(host.calls(Call::Take).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_when_the_drain_budget_is_spent_is_failed_at_once() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.drain_budget = Some(ms(100));
    let mut worker = start(settings);
    host.give(job("running", json!({ "ms": 5000 })));
    started(&host, &worker, 1).await;
    worker.signal();
    assert_eq!(worker.exit().await, Exit::Drained, "its fate is known");
    let report = report(&host.finals()[0]);
    assert_eq!(report["code"], "worker_stopped");
    assert!(report["message"].as_str().unwrap().contains("no more time"));
    host.until("the cancel", || worker.runner.events(Event::Cancelled).pop()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsent_result_is_retried_during_the_drain() {
    let host = FakeRunpod::start().await;
    host.answers(Call::Done, std::iter::repeat_n(Answer::Status(503), 5));
    let mut worker = start(settings(&host));
    host.give(job("a", json!({})));
    host.wait_for(Call::Done, 1).await;
    worker.signal();
    assert_eq!(worker.exit().await, Exit::Drained);
    assert_eq!(host.calls(Call::Done).len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_cannot_be_sent_before_the_budget_ends_makes_the_exit_status_fail() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.drain_budget = Some(ms(300));
    host.always(Call::Done, Answer::Status(503));
    let mut worker = start(settings);
    host.give(job("a", json!({})));
    host.wait_for(Call::Done, 1).await;
    let signalled = Instant::now();
    worker.signal();
    assert_eq!(worker.exit().await, Exit::Lost(1));
    assert!(signalled.elapsed() < ms(1200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_cancels_posts_errors_with_one_short_try_and_ends() {
    for hangs in [false, true] {
        let host = FakeRunpod::start().await;
        if hangs {
            host.always(Call::Done, Answer::Never);
        }
        let mut settings = settings(&host);
        settings.concurrency = 2;
        let mut worker = start(settings);
        host.give(job("deaf", json!({ "ms": 5000, "deaf": true })));
        host.give(job("b", json!({ "ms": 5000 })));
        started(&host, &worker, 2).await;
        worker.signal();
        sleep(ms(50)).await;
        let second = Instant::now();
        worker.signal();
        assert_eq!(worker.exit().await, if hangs { Exit::Lost(2) } else { Exit::Drained });
        assert!(second.elapsed() < ms(700), "{:?}", second.elapsed());
        let posts = host.finals();
        assert_eq!(posts.len(), 2, "one try for each");
        assert!(posts.iter().all(|post| report(post)["code"] == "worker_stopped"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_result_gets_its_last_try_when_everything_has_to_end() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.backoff = ms(2000);
    settings.backoff_cap = ms(2000);
    host.answer(Call::Done, Answer::Status(503));
    let mut worker = start(settings);
    host.give(job("a", json!({})));
    host.wait_for(Call::Done, 1).await;
    worker.signal();
    worker.signal();
    assert_eq!(worker.exit().await, Exit::Drained);
    assert_eq!(host.finals()[1].json(), json!({ "output": { "done": "a" } }), "the result, not an error");
}
