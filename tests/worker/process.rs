//! What only a process of its own can show: real signals, pauses, and a sudden end. The child is this test program again.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sdxl_worker::job::Runner;
use sdxl_worker::worker::{self, Hooks, Settings};
use serde_json::json;
use tokio::time::sleep;

use crate::fake_runner::{FakeRunner, Shared};
use crate::fake_runpod::{Call, FakeRunpod};
use crate::start::{job, ms};

/// The child's whole life; does nothing in an ordinary run of the tests.
#[test]
#[ignore = "started by the tests beside it"]
fn child() {
    let Some(settings) = Settings::from_variables(|name| std::env::var(name).ok()) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let exit = runtime.block_on(async {
        let load = async { Ok(Arc::new(Shared(Arc::new(FakeRunner::default()))) as Arc<dyn Runner>) };
        worker::run(settings, load, worker::signals().unwrap(), Hooks::default()).await
    });
    std::process::exit(exit.code().into());
}

struct Process(Child);

impl Process {
    fn start(host: &FakeRunpod) -> Process {
        let mut variables = host.variables();
        variables.insert("RUNPOD_PING_INTERVAL".into(), "1000".into());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["process::child", "--exact", "--ignored", "--nocapture"])
            .envs(variables)
            .stdout(Stdio::null())
            .spawn();
        Process(child.unwrap())
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.0.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    async fn exit(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            sleep(ms(10)).await;
        }
        panic!("the process goes on");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_pings_and_takes_soon_after_it_starts_and_ends_idle_within_two_seconds_of_a_signal() {
    for signal in ["TERM", "INT"] {
        let host = FakeRunpod::start().await;
        let begun = Instant::now();
        let mut process = Process::start(&host);
        let (ping, take) = (host.wait_for(Call::Ping, 1).await, host.wait_for(Call::Take, 1).await);
        assert!(ping[0].at - begun < ms(1000), "first ping after {:?}", ping[0].at - begun);
        assert!(take[0].at - begun < ms(1000), "first take after {:?}", take[0].at - begun);
        let signalled = Instant::now();
        process.signal(signal);
        assert_eq!(process.exit().await, Some(0));
        assert!(signalled.elapsed() < ms(2500), "{:?}", signalled.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_paused_takes_the_next_job() {
    let host = FakeRunpod::start().await;
    let process = Process::start(&host);
    host.give(job("before", json!({})));
    host.wait_for_results(1).await;
    host.wait_for(Call::Take, 2).await;
    process.signal("STOP");
    host.hold_polls(ms(100));
    sleep(ms(3000)).await;
    host.give(job("after", json!({})));
    process.signal("CONT");
    host.wait_for_results(2).await;
    let unhealthy = host.calls(Call::Ping).iter().any(|ping| ping.request.query().contains("unhealthy"));
    assert!(!unhealthy, "a pause is no fault");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_pings_after_the_process_was_killed() {
    let host = FakeRunpod::start().await;
    let process = Process::start(&host);
    host.give(job("a", json!({ "ms": 60_000 })));
    host.until("a ping with the job", || {
        host.calls(Call::Ping).iter().any(|ping| ping.request.parameter("job_id") == Some("a")).then_some(())
    })
    .await;
    process.signal("KILL");
    sleep(ms(200)).await;
    let pings = host.calls(Call::Ping).len();
    sleep(ms(2500)).await;
    assert_eq!(host.calls(Call::Ping).len(), pings);
    assert_eq!(host.connections(), 0, "no process of ours holds a connection");
}
