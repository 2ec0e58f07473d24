//! Posting results: headers, retries, and what the host may answer.

use serde_json::{Value, json};

use crate::fake_runpod::{Answer, Call, FakeRunpod, Recorded};
use crate::start::{job, ms, settings, start};
use sdxl_worker::worker::Exit;

pub fn report(post: &Recorded) -> Value {
    serde_json::from_str(post.json()["error"].as_str().expect("the error is a string")).expect("of JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn posts_have_the_sdks_headers_and_name_their_own_job_under_concurrency() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 4;
    // Retries are where the SDK mixes ids up.
    host.answers(Call::Done, std::iter::repeat_n(Answer::Status(500), 8));
    for index in 0..12 {
        host.give(job(&format!("job-{index}"), json!({ "ms": 10 })));
    }
    let _worker = start(settings);
    host.wait_for_results(12).await;
    for post in host.calls(Call::Done) {
        assert_eq!(post.header("x-request-id"), Some(post.job_id()));
        assert_eq!(post.header("content-type"), Some("application/x-www-form-urlencoded"));
        assert_eq!(post.header("charset"), Some("utf-8"));
        assert_eq!(post.header("authorization"), Some("raw-api-key"));
        let path = format!("/v2/endpoint/job-done/pod1/{}", post.job_id());
        assert_eq!(post.request.target, format!("{path}?gpu=NVIDIA+GeForce+RTX+4090&isStream=false"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_survives_errors_resets_timeouts_and_429_with_the_same_body_each_time() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.post_timeout = ms(200);
    let troubles = [
        Answer::Status(500),
        Answer::Status(503),
        Answer::Drop,
        Answer::Never,
        Answer::Full(429, vec![("Retry-After", "0.4".into())], vec![]),
        Answer::Status(408),
        Answer::Status(425),
        Answer::Status(401),
    ];
    let count = troubles.len();
    host.answers(Call::Done, troubles);
    host.give(job("a", json!({ "return": { "picture": "ü" } })));
    let _worker = start(settings);
    host.wait_for_results(1).await;
    let posts = host.calls(Call::Done);
    assert_eq!(posts.len(), count + 1);
    assert!(posts.iter().all(|post| post.request.body == r#"{"output":{"picture":"ü"}}"#.as_bytes()));
    assert!(posts[5].at - posts[4].at >= ms(400), "Retry-After is honoured");
    // Taken, answered, and only then the next.
    assert_eq!(host.wait_for(Call::Take, 2).await[1].request.parameter("job_in_progress"), Some("0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_answer_to_a_post_counts_by_its_status() {
    let host = FakeRunpod::start().await;
    host.answer(Call::Done, Answer::Truncated(json!({ "status": "ok" })));
    host.give(job("a", json!({})));
    host.give(job("b", json!({})));
    let _worker = start(settings(&host));
    host.wait_for_results(1).await;
    assert_eq!(host.calls(Call::Done).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsent_result_keeps_its_slot_and_its_place_in_the_heartbeat() {
    let host = FakeRunpod::start().await;
    host.answers(Call::Done, std::iter::repeat_n(Answer::Status(503), 6));
    host.give(job("a", json!({})));
    host.give(job("b", json!({})));
    let _worker = start(settings(&host));
    host.wait_for(Call::Done, 6).await;
    assert_eq!(host.waiting_jobs(), 1, "no new job while a result waits");
    let pings = host.calls(Call::Ping);
    assert_eq!(pings.last().unwrap().request.parameter("job_id"), Some("a"));
    host.wait_for_results(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_the_host_rejects_becomes_one_small_error_and_the_next_job_is_taken() {
    for status in [400, 413] {
        let host = FakeRunpod::start().await;
        host.answer(Call::Done, Answer::Status(status));
        host.give(job("a", json!({ "return": "r".repeat(5000) })));
        host.give(job("b", json!({})));
        let worker = start(settings(&host));
        host.wait_for_results(2).await;
        let posts = host.finals();
        assert_eq!((posts.len(), posts[1].job_id()), (3, "a"));
        let report = report(&posts[1]);
        assert_eq!(report["code"], "result_rejected");
        let message = report["message"].as_str().unwrap();
        assert!(message.contains("5013 bytes") && message.contains(&status.to_string()), "{message}");
        assert_eq!(worker.stop().await, Exit::Drained);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_the_host_does_not_know_any_more_is_dropped() {
    for status in [404, 410] {
        let host = FakeRunpod::start().await;
        host.answer(Call::Done, Answer::Status(status));
        host.give(job("a", json!({})));
        host.give(job("b", json!({})));
        let worker = start(settings(&host));
        host.wait_for_results(1).await;
        let ids: Vec<String> = host.calls(Call::Done).iter().map(|post| post.job_id().to_owned()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(worker.stop().await, Exit::Drained);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_given_up_after_the_budget_and_the_exit_says_so() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.result_retry_budget = ms(300);
    host.rule(|call| (call.call == Call::Done && call.job_id() == "a").then_some(Answer::Status(500)));
    host.give(job("a", json!({})));
    host.give(job("b", json!({})));
    let worker = start(settings);
    host.wait_for_results(1).await;
    assert!(host.calls(Call::Done).len() >= 3);
    assert_eq!(worker.stop().await, Exit::Lost(1));
    assert_eq!(Exit::Lost(1).code(), 1);
}
