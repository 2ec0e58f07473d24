//! Takes that go wrong: refusals, broken connections, answers that are no jobs.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod, Recorded};
use crate::start::{job, ms, quick, settings, settings_of, start};

fn gaps(calls: &[Recorded]) -> Vec<Duration> {
    calls.windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_broken_connections_are_met_with_growing_waits_and_end_with_the_next_job() {
    let tests = [
        Answer::Status(400),
        Answer::Status(401),
        Answer::Status(404),
        Answer::Status(500),
        Answer::Status(502),
        Answer::Status(302),
        Answer::Drop,
        Answer::Truncated(json!({ "id": "half", "input": {} })),
        Answer::text(200, "application/json", ""),
        Answer::text(200, "text/html", "<html>"),
    ];
    let tests = tests.map(|trouble| async move {
        let host = FakeRunpod::start().await;
        host.answers(Call::Take, std::iter::repeat_n(trouble.clone(), 6));
        host.give(job("a", json!({})));
        let _worker = start(settings(&host));
        host.wait_for_results(1).await;
        let gaps = gaps(&host.calls(Call::Take)[..7]);
        for (gap, full) in gaps.iter().zip([20, 40, 80, 160, 160, 160]) {
            // generous upwards: the machine may be busy with the other tests
            assert!(*gap >= ms(full / 2) && *gap < ms(full + 250), "{trouble:?}: {gaps:?}");
        }
    });
    let mut running = tokio::task::JoinSet::new();
    tests.into_iter().for_each(|test| drop(running.spawn(test)));
    while let Some(test) = running.join_next().await {
        test.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_429_is_waited_out_as_long_as_the_host_asks() {
    let host = FakeRunpod::start().await;
    host.answer(Call::Take, Answer::Status(429));
    host.answer(Call::Take, Answer::Full(429, vec![("Retry-After", "0.5".into())], vec![]));
    host.give(job("a", json!({})));
    let _worker = start(settings(&host));
    host.wait_for_results(1).await;
    let gaps = gaps(&host.calls(Call::Take)[..3]);
    assert!((ms(150)..ms(450)).contains(&gaps[0]), "without Retry-After, half to all of 300 ms: {gaps:?}");
    assert!((ms(500)..ms(750)).contains(&gaps[1]), "{gaps:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_be_reached_is_tried_until_it_can() {
    let host = FakeRunpod::start().await;
    let address = host.address;
    drop(host);
    let mut variables = FakeRunpod::start().await.variables();
    variables.insert("RUNPOD_WEBHOOK_GET_JOB".into(), format!("http://{address}/v2/e/job-take/$ID"));
    let worker = start(quick(settings_of(&variables)));
    sleep(ms(500)).await;
    assert!(!worker.has_ended());

    let listener = tokio::net::TcpListener::bind(address).await.expect("the port is still free");
    let (_connection, _) = tokio::time::timeout(ms(2000), listener.accept()).await.expect("tried again").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_speaks_no_tls_where_it_should_is_tried_with_waits() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut variables = FakeRunpod::start().await.variables();
    let take = format!("https://{}/take/$ID", listener.local_addr().unwrap());
    variables.insert("RUNPOD_WEBHOOK_GET_JOB".into(), take);
    let worker = start(quick(settings_of(&variables)));
    let (started, mut attempts) = (Instant::now(), 0);
    while started.elapsed() < ms(600) {
        if let Ok(Ok((mut stream, _))) = tokio::time::timeout(ms(200), listener.accept()).await {
            attempts += 1;
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        }
    }
    assert!((2..=15).contains(&attempts), "{attempts} attempts");
    assert!(!worker.has_ended());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_no_jobs_cost_nothing_but_a_pause() {
    let host = FakeRunpod::start().await;
    let json = |body: &str| Answer::text(200, "application/json", body);
    host.answers(
        Call::Take,
        [json("{"), json("null"), json("[]"), json("[null, 5]"), json(r#"{"input": {}}"#), json(r#""text""#)],
    );
    host.answer(Call::Take, Answer::Full(200, vec![("Content-Type", "application/json".into())], vec![0xff, 0xfe]));
    host.answer(Call::Take, json(r#"{"id": "nameless-input"}"#));
    let deep = format!(r#"{{"id": "deep", "input": {}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    host.answer(Call::Take, json(&deep));
    host.give(job("good", json!({})));
    let worker = start(settings(&host));
    let results = host.wait_for_results(3).await;
    for (post, id, code) in [(&results[0], "nameless-input", "missing_input"), (&results[1], "deep", "invalid_json")] {
        let report: Value = serde_json::from_str(post.json()["error"].as_str().unwrap()).unwrap();
        assert_eq!((post.job_id(), report["code"].as_str()), (id, Some(code)));
    }
    assert_eq!((results[2].job_id(), worker.runner.events(Event::Started)), ("good", vec!["good".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_ids_and_either_route_may_answer_with_either_shape() {
    let host = FakeRunpod::start().await;
    host.answer(Call::Take, Answer::Json(json!({ "id": 17, "input": {} })));
    host.answer(Call::Take, Answer::Json(json!([job("list", json!({})), { "no": "id" }, job("second", json!({}))])));
    let worker = start(settings(&host));
    host.wait_for_results(3).await;
    host.hold_polls(ms(100));
    worker.concurrency.send_replace(2);
    host.give(job("wakes", json!({})));
    host.answer(Call::TakeBatch, Answer::Json(job("object", json!({}))));
    let results = host.wait_for_results(5).await;
    let mut ids: Vec<&str> = results.iter().map(Recorded::job_id).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["17", "list", "object", "second", "wakes"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_comes_twice_while_it_is_in_progress_runs_once() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 3;
    host.give(job("a", json!({ "ms": 200 })));
    host.give(job("a", json!({ "ms": 200 })));
    let worker = start(settings);
    host.wait_for(Call::TakeBatch, 2).await;
    host.give(job("a", json!({ "ms": 200 })));
    host.wait_for_results(1).await;
    assert_eq!(worker.runner.events(Event::Started), ["a"]);
    // Afterwards the same id is a new job: a client may send it again.
    sleep(ms(50)).await;
    host.give(job("a", json!({})));
    host.wait_for_results(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_harness_with_its_odd_job_and_bare_templates_is_served() {
    let host = FakeRunpod::start().await;
    let mut variables = host.variables();
    let base = format!("http://0.0.0.0:{}/v2/IDE", host.address.port());
    variables.insert("RUNPOD_WEBHOOK_GET_JOB".into(), format!("{base}/job-take/$RUNPOD_POD_ID"));
    let done = format!("{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID");
    variables.insert("RUNPOD_WEBHOOK_POST_OUTPUT".into(), done);
    variables.retain(|name, _| name != "RUNPOD_WEBHOOK_PING" && name != "RUNPOD_WEBHOOK_POST_STREAM");
    host.always(Call::Stop, Answer::Status(404));
    host.give(json!({ "id": "0", "input": { "stream": true, "progress": 1 }, "delayTime": 0, "executionTime": 0,
        "error": "", "status": 200, "retries": 0, "webhook": null, "policy": "?" }));
    let worker = start(quick(settings_of(&variables)));
    host.wait_for_results(1).await;
    host.wait_for(Call::Stop, 1).await;
    assert_eq!(host.calls(Call::Take)[0].request.target, "/v2/IDE/job-take/pod1?job_in_progress=0");
    let target = &host.finals()[0].request.target;
    assert_eq!(target, "/v2/IDE/job-done/pod1/0?gpu=$RUNPOD_GPU_TYPE_ID&isStream=true");
    assert!(host.calls(Call::Ping).is_empty() && host.calls(Call::Stream).is_empty() && !worker.has_ended());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_url_without_the_segment_works_without_stop_channel_and_batches() {
    let host = FakeRunpod::start().await;
    let mut variables = host.variables();
    variables.insert("RUNPOD_WEBHOOK_GET_JOB".into(), format!("http://{}/mine/$ID", host.address));
    host.rule(|call| match call.request.path() {
        "/mine/pod1" => Some(Answer::Json(job(&format!("job-{}", next_id()), json!({ "ms": 30 })))),
        _ => None,
    });
    let mut settings = quick(settings_of(&variables));
    settings.concurrency = 3;
    let _worker = start(settings);
    host.wait_for_results(4).await;
    assert!(host.calls(Call::Stop).is_empty() && host.calls(Call::TakeBatch).is_empty());
}

fn next_id() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[test]
fn only_a_take_url_makes_a_worker() {
    use sdxl_worker::worker::Settings;
    assert!(Settings::from_variables(|_| None).is_none());
    assert!(Settings::from_variables(|_| Some(String::new())).is_none());
    let odd = Settings::from_variables(|name| match name {
        "RUNPOD_WEBHOOK_GET_JOB" => Some("http://h/job-take/$ID".into()),
        "RUNPOD_AI_API_KEY" => Some("very-secret".into()),
        "RUNPOD_LOG_LEVEL" => Some("WARNING".into()),
        _ => Some("nonsense".into()),
    });
    let odd = odd.expect("nonsense is no reason not to start");
    assert!(odd.warnings.iter().any(|warning| warning.contains("RUNPOD_PING_INTERVAL")));
    assert_eq!(odd.ping_interval, Duration::from_secs(10));
    assert!(!format!("{odd:?}").contains("very-secret"));
}
