//! From the start to the first job, and the ways in which that fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sdxl_worker::error::Error;
use sdxl_worker::worker::{Check, Exit, GpuChecks, Hooks};
use serde_json::json;
use tokio::time::sleep;

use crate::fake_runner::{Event, FakeRunner};
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::posting::report;
use crate::start::{TestWorker, job, launch, ms, settings, start_with};

fn fails_to_load(settings: sdxl_worker::worker::Settings, after: Duration) -> TestWorker {
    let load = async move {
        sleep(after).await;
        Err(Error::setup("model_not_found", "there is no model"))
    };
    launch(settings, Hooks::default(), load, Arc::new(FakeRunner::default()))
}

#[tokio::test(flavor = "multi_thread")]
async fn by_default_the_first_take_goes_out_once_the_model_is_loaded() {
    let host = FakeRunpod::start().await;
    let begun = Instant::now();
    let _worker = start_with(settings(&host), Hooks::default(), sleep(ms(400)));
    let takes = host.wait_for(Call::Take, 1).await;
    assert!((ms(400)..ms(600)).contains(&(takes[0].at - begun)));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_take_while_loading_a_job_waits_for_the_model_and_can_be_stopped_meanwhile() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    (settings.take_while_loading, settings.concurrency) = (true, 2);
    host.give(job("a", json!({})));
    host.give(job("b", json!({})));
    let worker = start_with(settings, Hooks::default(), sleep(ms(500)));
    host.wait_for(Call::TakeBatch, 1).await;
    host.answer(Call::Stop, Answer::Json(json!({ "jobsToStop": ["b"] })));
    let results = host.wait_for_results(1).await;
    sleep(ms(100)).await;
    assert_eq!((results[0].job_id(), host.finals().len()), ("a", 1));
    assert_eq!(worker.runner.events(Event::Started), ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_take_while_loading_a_signal_lets_the_waiting_job_run_and_ends_an_idle_worker() {
    for with_job in [true, false] {
        let host = FakeRunpod::start().await;
        let mut settings = settings(&host);
        settings.take_while_loading = true;
        if with_job {
            host.give(job("a", json!({})));
        }
        let mut worker = start_with(settings, Hooks::default(), sleep(ms(if with_job { 500 } else { 60_000 })));
        host.wait_for(Call::Take, 1).await;
        sleep(ms(100)).await;
        worker.signal();
        assert_eq!(worker.exit().await, Exit::Drained);
        assert_eq!(host.finals().len(), usize::from(with_job));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_the_model_is_loaded_ends_the_worker_at_once() {
    let host = FakeRunpod::start().await;
    let worker = start_with(settings(&host), Hooks::default(), sleep(ms(60_000)));
    host.wait_for(Call::Ping, 1).await;
    let signalled = Instant::now();
    assert_eq!(worker.stop().await, Exit::Drained);
    assert!(signalled.elapsed() < ms(200));
    assert!(host.calls(Call::Take).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_fails_one_job_with_the_reason_and_ends_the_worker() {
    for take_while_loading in [false, true] {
        let host = FakeRunpod::start().await;
        let mut settings = settings(&host);
        (settings.take_while_loading, settings.concurrency) = (take_while_loading, 1);
        host.give(job("told", json!({})));
        host.give(job("left", json!({})));
        let mut worker = fails_to_load(settings, ms(200));
        assert_eq!(worker.exit().await, Exit::NotLoaded);
        assert_eq!(Exit::NotLoaded.code(), 1);
        let results = host.finals();
        assert_eq!((results.len(), results[0].job_id()), (1, "told"));
        assert_eq!(report(&results[0])["code"], "model_not_found");
        assert_eq!(host.waiting_jobs(), 1, "the other is left to a worker that can");
        let last = host.calls(Call::Ping).pop().unwrap();
        assert_eq!(last.request.parameter("check"), Some("model_load"));
        assert!(last.at > results[0].at);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_panics_is_a_load_that_fails() {
    let host = FakeRunpod::start().await;
    host.give(job("told", json!({})));
    let load = async { panic!("while loading") };
    let mut worker = launch(settings(&host), Hooks::default(), load, Arc::new(FakeRunner::default()));
    assert_eq!(worker.exit().await, Exit::NotLoaded);
    assert_eq!(report(&host.finals()[0])["code"], "internal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_load_and_gets_no_job_does_not_wait_for_ever() {
    let host = FakeRunpod::start().await;
    let mut worker = fails_to_load(settings(&host), Duration::ZERO);
    assert_eq!(worker.exit().await, Exit::NotLoaded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_up_check_is_reported_once_and_ends_the_worker_even_if_the_host_hangs() {
    for hangs in [false, true] {
        let host = FakeRunpod::start().await;
        if hangs {
            host.rule(|call| call.request.query().contains("unhealthy").then_some(Answer::Never));
        }
        let reason = format!("no luck & {}", "x".repeat(400));
        let check = Check { name: "luck".into(), run: Box::pin(async move { anyhow::bail!(reason) }) };
        let hooks = Hooks { checks: vec![check], ..Hooks::default() };
        let begun = Instant::now();
        let mut worker = start_with(settings(&host), hooks, sleep(ms(60_000)));
        assert_eq!(worker.exit().await, Exit::Unhealthy);
        assert_eq!(Exit::Unhealthy.code(), 1);
        assert!(begun.elapsed() < ms(1500));
        let reports = host.until("the report", || {
            let pings = host.calls(Call::Ping).into_iter();
            let reports: Vec<_> = pings.filter(|ping| ping.request.query().contains("unhealthy")).collect();
            (!reports.is_empty()).then_some(reports)
        });
        let reports = reports.await;
        assert_eq!(reports.len(), 1);
        let query = reports[0].request.query();
        let expected =
            "gpu=NVIDIA+GeForce+RTX+4090&status=unhealthy&check=luck&reason=CheckFailed%3A%20no%20luck%20%26";
        assert!(query.starts_with(expected) && query.ends_with("&runpod_version=1.12.0"), "{query}");
        assert_eq!(query.matches('x').count(), 256 - "CheckFailed: no luck & ".len());
        assert!(host.calls(Call::Take).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_check_also_answers_a_job_that_was_taken_while_loading() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.take_while_loading = true;
    settings.checks.skip_gpu = false;
    host.give(job("a", json!({})));
    let gpu_checks = GpuChecks {
        allocation: Box::new(|| {
            std::thread::sleep(ms(300));
            anyhow::bail!("no device")
        }),
        cuda_version: Box::new(|| None),
        initialisation: Box::new(|| Ok(())),
        benchmark: Box::new(|| Ok(Duration::ZERO)),
    };
    let hooks = Hooks { gpu_checks: Some(gpu_checks), ..Hooks::default() };
    let mut worker = start_with(settings, hooks, std::future::ready(()));
    assert_eq!(worker.exit().await, Exit::Unhealthy);
    assert_eq!(report(&host.finals()[0])["code"], "check_failed");
}
