//! Pings.

use std::time::Duration;

use serde_json::json;
use tokio::time::sleep;

use crate::fake_runpod::{Answer, Call, FakeRunpod, Recorded};
use crate::start::{job, ms, quick, settings, settings_of, start, start_with};
use sdxl_worker::worker::Hooks;

fn gaps(calls: &[Recorded]) -> Vec<Duration> {
    calls.windows(2).map(|pair| pair[1].at - pair[0].at).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_name_the_version_and_all_held_jobs() {
    let host = FakeRunpod::start().await;
    let mut settings = settings(&host);
    settings.concurrency = 2;
    let _worker = start(settings);
    host.wait_for(Call::Ping, 1).await;
    host.give(job("b/1", json!({ "ms": 400 })));
    host.give(job("a", json!({ "ms": 900 })));
    host.wait_for_results(2).await;
    sleep(ms(250)).await;
    let mut seen: Vec<String> = host.calls(Call::Ping).iter().map(|ping| ping.request.query().to_owned()).collect();
    seen.dedup();
    let ping = |ids: &str| format!("gpu=NVIDIA+GeForce+RTX+4090{ids}&runpod_version=1.12.0");
    let both = ping("&job_id=a%2Cb%2F1");
    let expected = [ping(""), both, ping("&job_id=a"), ping("")];
    // between two takes, one job alone may be seen for a moment
    seen.retain(|query| expected.contains(query));
    seen.dedup();
    assert!(seen.ends_with(&expected[1..]) && seen[0] == expected[0], "{seen:#?}");
    assert_eq!(host.calls(Call::Ping)[0].header("content-type"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_begin_before_the_model_is_loaded_and_keep_their_rhythm() {
    let host = FakeRunpod::start().await;
    let _worker = start_with(settings(&host), Hooks::default(), sleep(ms(1500)));
    let pings = host.wait_for(Call::Ping, 7).await;
    assert!(host.calls(Call::Take).is_empty());
    assert!(gaps(&pings).iter().all(|gap| *gap < ms(300) && *gap > ms(150)), "{:?}", gaps(&pings));
}

/// The worker's runtime has one thread here, and a job that blocks it: pings have a thread of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pings_keep_their_rhythm_while_everything_else_is_blocked() {
    let host = FakeRunpod::start().await;
    let (address, variables) = (host.address, host.variables());
    let blocked = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _worker = start(quick(settings_of(&variables)));
            sleep(ms(100)).await;
            std::thread::sleep(ms(1500));
        });
    });
    let pings = host.wait_for(Call::Ping, 7).await;
    assert!(gaps(&pings[1..]).iter().all(|gap| *gap < ms(300)), "{address}: {:?}", gaps(&pings));
    blocked.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_pings_do_not_end_the_heartbeat_nor_its_rhythm() {
    let host = FakeRunpod::start().await;
    host.answers(Call::Ping, [Answer::Status(500), Answer::Drop, Answer::Never, Answer::Status(404)]);
    host.answer(Call::Ping, Answer::after(ms(1000), Answer::Status(200)));
    let _worker = start(settings(&host));
    let pings = host.wait_for(Call::Ping, 9).await;
    assert!(gaps(&pings).iter().all(|gap| (ms(120)..ms(320)).contains(gap)), "{:?}", gaps(&pings));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interval_under_a_second_has_a_floor() {
    let host = FakeRunpod::start().await;
    for odd in ["0", "500", "-1", "fast"] {
        let mut variables = host.variables();
        variables.insert("RUNPOD_PING_INTERVAL".into(), odd.into());
        let settings = settings_of(&variables);
        assert!(settings.ping_interval.max(settings.ping_floor) >= Duration::from_secs(1));
    }
    let mut settings = settings(&host);
    (settings.ping_interval, settings.ping_floor) = (Duration::ZERO, ms(100));
    let _worker = start(settings);
    sleep(ms(1000)).await;
    let count = host.calls(Call::Ping).len();
    assert!((5..=11).contains(&count), "{count}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_key_or_pod_id_or_url_there_are_no_pings_and_jobs_are_done() {
    for missing in ["RUNPOD_AI_API_KEY", "RUNPOD_POD_ID", "RUNPOD_WEBHOOK_PING"] {
        let host = FakeRunpod::start().await;
        let mut variables = host.variables();
        variables.remove(missing);
        host.give(job("a", json!({ "ms": 100 })));
        let _worker = start(quick(settings_of(&variables)));
        let post = &host.wait_for_results(1).await[0];
        assert!(host.calls(Call::Ping).is_empty());
        match missing {
            "RUNPOD_AI_API_KEY" => assert_eq!(post.header("authorization"), Some("")),
            "RUNPOD_POD_ID" => assert!(!post.request.path().contains("pod1")),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_take_loop_stands_still_reports_itself_once_and_falls_silent() {
    let host = FakeRunpod::start().await;
    let variables = host.variables();
    let blocked = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut settings = quick(settings_of(&variables));
            (settings.ping_interval, settings.wedged_after) = (ms(100), ms(800));
            let _worker = start(settings);
            sleep(ms(300)).await;
            std::thread::sleep(ms(2500));
            sleep(ms(1200)).await;
        });
    });
    let reports = |host: &FakeRunpod| {
        let pings = host.calls(Call::Ping);
        pings.into_iter().filter(|ping| ping.request.query().contains("status=unhealthy")).collect::<Vec<_>>()
    };
    let report = host.until("the report", || reports(&host).pop()).await;
    assert_eq!(report.request.parameter("check"), Some("watchdog"));
    let count = host.calls(Call::Ping).len();
    sleep(ms(600)).await;
    assert!(host.calls(Call::Ping).len() <= count + 1, "silent until it moves again");
    host.wait_for(Call::Ping, count + 4).await;
    assert_eq!(reports(&host).len(), 1);
    blocked.join().unwrap();
}
