//! Jobs with `stream: true`: chunks while they run, and a result that does not depend on them.

use serde_json::{Value, json};

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::posting::report;
use crate::start::{job, ms, settings, start};

fn chunks(host: &FakeRunpod) -> Vec<Value> {
    let accepted = host.calls(Call::Stream).into_iter().filter(|post| post.status == 200);
    accepted.map(|post| post.json()["output"].clone()).collect()
}

fn steps(chunks: &[Value]) -> Vec<u64> {
    chunks.iter().filter_map(|chunk| chunk["step"].as_u64()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_come_in_order_before_the_result_which_is_marked_as_a_streams() {
    let host = FakeRunpod::start().await;
    host.give(job("a", json!({ "stream": true, "progress": 5, "every_ms": 30, "picture": 500 })));
    let _worker = start(settings(&host));
    let results = host.wait_for_results(1).await;
    assert_eq!(results[0].request.parameter("isStream"), Some("true"));
    assert_eq!(results[0].json()["output"].get("stream"), None, "nothing was lost, so nothing is repeated");
    let chunks = chunks(&host);
    assert_eq!(steps(&chunks), [1, 2, 3, 4, 5]);
    assert_eq!(chunks[5], results[0].json()["output"], "the last chunk is the result");
    for post in host.calls(Call::Stream) {
        assert_eq!(post.request.path(), "/v2/endpoint/job-stream/pod1/a");
        assert_eq!((post.request.parameter("isStream"), post.header("x-request-id")), (Some("false"), Some("a")));
        assert!(post.at < results[0].at);
    }
    assert_eq!(host.calls(Call::Done).len(), 1, "chunks take the place of progress updates");
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_wait_behind_a_slow_post_are_joined_but_previews_are_kept() {
    let host = FakeRunpod::start().await;
    host.rule(|call| (call.call == Call::Stream).then_some(Answer::after(ms(40), Answer::Status(200))));
    host.give(job("bare", json!({ "stream": true, "progress": 20, "every_ms": 5 })));
    let _worker = start(settings(&host));
    host.wait_for_results(1).await;
    let bare = steps(&chunks(&host));
    assert!(bare.is_sorted() && bare.len() < 12 && bare.last() == Some(&20), "{bare:?}");
    host.give(job("pictures", json!({ "stream": true, "progress": 4, "every_ms": 5, "preview": 10 })));
    host.wait_for_results(2).await;
    assert_eq!(steps(&chunks(&host))[bare.len()..], [1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_chunks_are_repeated_in_the_result_and_delay_it_only_so_long() {
    let host = FakeRunpod::start().await;
    host.always(Call::Stream, Answer::Status(500));
    host.give(job("a", json!({ "stream": true, "progress": 6, "every_ms": 10, "preview": 50 })));
    let worker = start(settings(&host));
    let results = host.wait_for_results(1).await;
    let repeated = results[0].json()["output"]["stream"].clone();
    assert_eq!(steps(repeated.as_array().unwrap()), [1, 2, 3, 4, 5, 6]);
    assert!(repeated.as_array().unwrap().iter().all(|chunk| chunk.get("preview").is_none()));
    let delay = results[0].at - worker.runner.when("a", Event::Ended);
    assert!(delay < ms(1000), "two budgets of 300 ms: {delay:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_fails_once_is_tried_again() {
    let host = FakeRunpod::start().await;
    host.answers(Call::Stream, [Answer::Status(500), Answer::Drop, Answer::Status(429)]);
    host.give(job("a", json!({ "stream": true, "progress": 2, "every_ms": 150 })));
    let _worker = start(settings(&host));
    let results = host.wait_for_results(1).await;
    assert_eq!(steps(&chunks(&host)), [1, 2]);
    assert_eq!(results[0].json()["output"].get("stream"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_aggregation_the_result_repeats_all_chunks() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.aggregate_stream = true;
    host.give(job("a", json!({ "stream": true, "progress": 3, "every_ms": 20 })));
    let _worker = start(settings);
    let results = host.wait_for_results(1).await;
    assert_eq!(steps(results[0].json()["output"]["stream"].as_array().unwrap()), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_job_that_fails_says_so_in_the_stream_and_in_the_result() {
    let host = FakeRunpod::start().await;
    host.give(job("a", json!({ "stream": true, "progress": 1, "every_ms": 30, "fail": "input" })));
    let _worker = start(settings(&host));
    let results = host.wait_for_results(1).await;
    assert_eq!(report(&results[0])["code"], "invalid_value");
    assert_eq!(results[0].request.parameter("isStream"), Some("true"));
    let last = chunks(&host).pop().unwrap();
    assert_eq!(last["error"], results[0].json()["error"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_chunk_is_larger_than_the_platform_takes() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.max_chunk_bytes = 1000;
    let input = json!({ "stream": true, "progress": 3, "every_ms": 20, "preview": 5000, "picture": 5000 });
    host.give(job("a", input));
    let _worker = start(settings);
    let results = host.wait_for_results(1).await;
    assert_eq!(steps(&chunks(&host)), [1, 2, 3], "a preview that is too large is left out, not its step");
    assert!(host.calls(Call::Stream).iter().all(|post| post.request.body.len() <= 1000));
    assert_eq!(results[0].json()["output"]["images"][0].as_str().unwrap().len(), 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_job_is_gone_stops_the_job() {
    let host = FakeRunpod::start().await;
    host.always(Call::Stream, Answer::Status(410));
    host.give(job("a", json!({ "stream": true, "progress": 500, "every_ms": 10 })));
    host.give(job("b", json!({})));
    let worker = start(settings(&host));
    let results = host.wait_for_results(1).await;
    assert_eq!((results[0].job_id(), worker.runner.events(Event::Cancelled)), ("b", vec!["a".to_owned()]));
    assert_eq!(host.finals().len(), 1);
}
