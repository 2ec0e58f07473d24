//! What a job's outcome looks like to the host.

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::posting::report;
use crate::start::{job, ms, settings, start};
use sdxl_worker::worker::Exit;

#[tokio::test(flavor = "multi_thread")]
async fn values_reach_the_host_in_the_sdks_bodies() {
    let cases = [
        (json!({ "return": { "a": [1, null], "output": "x" } }), r#"{"output":{"a":[1,null],"output":"x"}}"#),
        (json!({ "return": "grüße" }), r#"{"output":"grüße"}"#),
        (json!({ "return": null }), r#"{"output":null}"#),
        (json!({ "return": {} }), "{}"),
        (json!({ "return": { "error": { "code": 7 } } }), r#"{"error":"{\"code\":7}"}"#),
        (json!({ "return": { "error": "bad", "rest": 1 } }), r#"{"output":{"rest":1},"error":"bad"}"#),
    ];
    let host = FakeRunpod::start().await;
    for (index, (input, _)) in cases.iter().enumerate() {
        host.give(job(&format!("job-{index}"), input.clone()));
    }
    let _worker = start(settings(&host));
    let results = host.wait_for_results(cases.len()).await;
    for (post, (_, body)) in results.iter().zip(&cases) {
        assert_eq!(String::from_utf8_lossy(&post.request.body), *body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_in_a_job_is_reported_and_the_next_one_runs() {
    let cases = [
        ("input", "invalid_value"),
        ("memory", "out_of_memory"),
        ("panic", "internal"),
        ("encoding", "internal"),
        ("long", "internal"),
    ];
    let host = FakeRunpod::start().await;
    for (fail, _) in cases {
        host.give(job(fail, json!({ "fail": fail })));
    }
    host.give(job("good", json!({})));
    let _worker = start(settings(&host));
    let results = host.wait_for_results(cases.len() + 1).await;
    for (post, (fail, code)) in results.iter().zip(cases) {
        let report = report(post);
        assert_eq!((post.job_id(), report["code"].as_str()), (fail, Some(code)));
        assert_eq!((&report["worker_id"], &report["runpod_version"]), (&json!("pod1"), &json!("1.12.0")));
        assert_eq!(post.json().get("stopPod"), None, "only a lost device asks for a new worker");
        assert!(post.request.body.len() < 50_000);
    }
    assert_eq!(results.last().unwrap().json(), json!({ "output": { "done": "good" } }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_asks_for_a_new_worker_and_nothing_is_taken_afterwards() {
    for input in [json!({ "fail": "device" }), json!({ "return": { "refresh_worker": true, "seed": 1 } })] {
        let host = FakeRunpod::start().await;
        let mut settings = settings(&host);
        settings.concurrency = 2;
        host.give(job("other", json!({ "ms": 200 })));
        host.give(job("lost", input));
        let mut worker = start(settings);
        host.wait_for_results(1).await;
        let takes = host.calls(Call::Take).len() + host.calls(Call::TakeBatch).len();
        assert_eq!(worker.exit().await, Exit::Drained);
        let posts = host.finals();
        assert_eq!((posts[0].job_id(), &posts[0].json()["stopPod"]), ("lost", &Value::Bool(true)));
        assert_eq!(posts[1].json(), json!({ "output": { "done": "other" } }), "other jobs are finished");
        assert_eq!(host.calls(Call::Take).len() + host.calls(Call::TakeBatch).len(), takes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_comes_in_order_with_the_latest_first_to_go_and_never_after_the_result() {
    let host = FakeRunpod::start().await;
    // A slow host: updates have to be dropped, and the last is still on its way when the job ends.
    host.rule(|call| match call.call {
        Call::Done if !call.is_final() => Some(Answer::after(ms(60), Answer::Status(200))),
        _ => None,
    });
    for id in ["a", "b", "c"] {
        host.give(job(id, json!({ "progress": 40, "every_ms": 5 })));
    }
    let worker = start(settings(&host));
    host.wait_for_results(3).await;
    sleep(ms(200)).await;
    for id in ["a", "b", "c"] {
        let posts: Vec<Value> = host.calls(Call::Done).iter().filter(|p| p.job_id() == id).map(|p| p.json()).collect();
        let (last, updates) = posts.split_last().unwrap();
        assert_eq!(last, &json!({ "output": { "done": id } }));
        let steps: Vec<u64> = updates.iter().map(|update| update["output"]["step"].as_u64().unwrap()).collect();
        assert!(steps.is_sorted() && (2..=8).contains(&steps.len()), "{steps:?}");
        assert!(updates.iter().all(|update| update["status"] == "IN_PROGRESS"));
    }
    let ended = worker.runner.when("a", Event::Ended);
    assert!(host.finals()[0].at - ended < ms(160), "an update in flight does not hold up the result");
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_that_the_host_never_answers_does_not_delay_the_result() {
    let host = FakeRunpod::start().await;
    host.rule(|call| (call.call == Call::Done && !call.is_final()).then_some(Answer::Never));
    host.give(job("a", json!({ "progress": 5, "every_ms": 10 })));
    let worker = start(settings(&host));
    let posts = host.wait_for_results(1).await;
    assert!(posts[0].at - worker.runner.when("a", Event::Ended) < ms(250));
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_progress_is_not_repeated_and_a_job_that_is_gone_stops() {
    let host = FakeRunpod::start().await;
    host.rule(|call| match (call.call, call.job_id()) {
        (Call::Done, "refused") if !call.is_final() => Some(Answer::Status(500)),
        (Call::Done, "gone") => Some(Answer::Status(404)),
        _ => None,
    });
    host.give(job("refused", json!({ "progress": 3, "every_ms": 50 })));
    host.give(job("gone", json!({ "progress": 400, "every_ms": 10 })));
    host.give(job("next", json!({})));
    let worker = start(settings(&host));
    host.wait_for_results(2).await;
    let posts = |id: &str| host.calls(Call::Done).iter().filter(|post| post.job_id() == id).count();
    assert_eq!((posts("refused"), posts("gone")), (4, 1));
    assert_eq!(worker.runner.events(Event::Cancelled), ["gone"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_can_be_switched_off() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.progress_interval = None;
    host.give(job("a", json!({ "progress": 5, "every_ms": 10 })));
    let _worker = start(settings);
    host.wait_for_results(1).await;
    assert_eq!(host.calls(Call::Done).len(), 1);
}
