//! The stop channel.

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::fake_runner::Event;
use crate::fake_runpod::{Answer, Call, FakeRunpod};
use crate::start::{job, ms, settings, start};

fn stop(ids: Value) -> Answer {
    Answer::Json(json!({ "jobsToStop": ids }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_job_leaves_within_a_step_posts_nothing_and_frees_its_slot() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 2;
    let worker = start(settings);
    host.give(job("stopped", json!({ "ms": 5000 })));
    host.give(job("other", json!({ "ms": 300 })));
    host.give(job("next", json!({})));
    host.until("two started jobs", || (worker.runner.events(Event::Started).len() == 2).then_some(())).await;
    let at = std::time::Instant::now();
    host.answer(Call::Stop, stop(json!(["stopped", "unknown", 5, null])));
    host.wait_for_results(2).await;
    assert!(worker.runner.when("stopped", Event::Cancelled) - at < ms(100));
    let mut ids: Vec<String> = host.calls(Call::Done).iter().map(|post| post.job_id().to_owned()).collect();
    ids.sort();
    assert_eq!(ids, ["next", "other"], "others are unharmed");
    let pings = host.wait_for(Call::Ping, host.calls(Call::Ping).len() + 1).await;
    assert!(!pings.last().unwrap().request.target.contains("stopped"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_job_can_be_stopped_before_it_runs() {
    let host = FakeRunpod::start().await;
    host.answer(Call::Take, Answer::Json(json!([job("a", json!({ "ms": 300 })), job("b", json!({ "ms": 300 }))])));
    let worker = start(settings(&host));
    host.until("start", || (!worker.runner.events(Event::Started).is_empty()).then_some(())).await;
    let waiting = if worker.runner.events(Event::Started) == ["a"] { "b" } else { "a" };
    host.answer(Call::Stop, stop(json!([waiting])));
    assert_ne!(host.wait_for_results(1).await[0].job_id(), waiting);
    sleep(ms(100)).await;
    assert_eq!((worker.runner.events(Event::Started).len(), host.finals().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_overtakes_its_take_still_works() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    host.wait_for(Call::Stop, 1).await;
    host.answer(Call::Stop, stop(json!(["early"])));
    host.wait_for(Call::Stop, 2).await;
    host.give(job("early", json!({})));
    host.give(job("next", json!({})));
    host.wait_for_results(1).await;
    assert_eq!(worker.runner.events(Event::Started), ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_the_retries_of_a_finished_job() {
    let host = FakeRunpod::start().await;
    host.rule(|call| (call.call == Call::Done && call.job_id() == "a").then_some(Answer::Status(500)));
    host.give(job("a", json!({})));
    host.give(job("b", json!({})));
    let _worker = start(settings(&host));
    host.wait_for(Call::Done, 2).await;
    host.answer(Call::Stop, stop(json!(["a"])));
    assert_eq!(host.wait_for_results(1).await[0].job_id(), "b");
    let posts = host.calls(Call::Done).len();
    // known and finished: means nothing to a later job of that id
    host.answer(Call::Stop, stop(json!(["b"])));
    sleep(ms(300)).await;
    assert_eq!(host.calls(Call::Done).len(), posts);
    host.give(job("b", json!({})));
    host.wait_for_results(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_deaf_to_its_stop_keeps_the_slot_until_the_device_is_free() {
    let host = FakeRunpod::start().await;
    let worker = start(settings(&host));
    host.give(job("deaf", json!({ "ms": 300, "deaf": true })));
    host.give(job("next", json!({})));
    host.until("start", || (!worker.runner.events(Event::Started).is_empty()).then_some(())).await;
    host.answer(Call::Stop, stop(json!(["deaf"])));
    host.wait_for_results(1).await;
    assert!(worker.runner.when("next", Event::Started) >= worker.runner.when("deaf", Event::Ended));
    assert_eq!(host.finals().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poor_stop_channel_is_asked_rarely_and_jobs_are_still_taken() {
    let garbage = [
        (Answer::Status(204), 15),
        (Answer::Status(404), 1),
        (Answer::Status(405), 1),
        (Answer::Status(429), 8),
        (Answer::Status(500), 8),
        (Answer::text(200, "application/json", "[1, 2"), 15),
        (Answer::Json(json!({ "jobsToStop": "all" })), 15),
        (Answer::Json(json!([1, 2])), 15),
        (Answer::Drop, 8),
    ];
    for (answer, most) in garbage {
        let host = FakeRunpod::start().await;
        host.always(Call::Stop, answer.clone());
        host.give(job("a", json!({ "ms": 400 })));
        host.give(job("b", json!({ "ms": 300 })));
        let _worker = start(settings(&host));
        host.wait_for_results(2).await;
        let polls = host.calls(Call::Stop).len();
        assert!((1..=most).contains(&polls), "{answer:?}: {polls} polls in 700 ms");
    }
}
