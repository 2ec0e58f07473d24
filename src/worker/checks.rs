//! Whether this machine can do the work, asked once at the start: the SDK's checks, their names and variables, done
//! natively. What needs the accelerator comes in as closures, since nothing here knows torch.

use std::fs;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::settings::CheckSettings;

/// A check of the program's own; runs before all others, whatever the variables say.
pub struct Check {
    pub name: String,
    pub run: Pin<Box<dyn Future<Output = Result<()>> + Send>>,
}

/// The checks of the accelerator. Each may block.
pub struct GpuChecks {
    /// Allocates a little on every device.
    pub allocation: Box<dyn FnOnce() -> Result<()> + Send>,
    /// Of the driver; `None` where it cannot be told, which passes.
    pub cuda_version: Box<dyn FnOnce() -> Option<(u32, u32)> + Send>,
    /// The real compute path, compute capability, free memory against what the model needs.
    pub initialisation: Box<dyn FnOnce() -> Result<()> + Send>,
    /// How long a 1024 x 1024 matrix product takes once the device is warm.
    pub benchmark: Box<dyn FnOnce() -> Result<Duration> + Send>,
}

/// The check that failed, and why.
#[derive(Debug)]
pub struct Failed {
    pub check: String,
    pub reason: anyhow::Error,
}

/// Runs all checks, one after the other, up to the first that fails.
pub async fn run(
    settings: &CheckSettings,
    own: Vec<Check>,
    gpu: Option<GpuChecks>,
    take_url: &str,
) -> Result<(), Failed> {
    for check in own {
        named(&check.name, check.run).await?;
    }
    let gpu = gpu.map(|gpu| (gpu.allocation, (gpu.cuda_version, gpu.initialisation, gpu.benchmark)));
    let (allocation, rest) = gpu.unzip();
    if let Some(allocation) = allocation.filter(|_| !settings.skip_gpu) {
        let limit = settings.gpu_test_timeout;
        let work =
            async { within(limit, allocation).await?.map_err(|error| first_lines(&error, settings.max_error_lines)) };
        named("gpu_allocation", work).await?;
    }
    if settings.skip_auto {
        return Ok(());
    }
    named("memory", async { memory(settings, Path::new("/")) }).await?;
    named("disk", async { disk(settings, Path::new("/")) }).await?;
    named("network", network(settings, take_url)).await?;
    let Some((cuda_version, initialisation, benchmark)) = rest else { return Ok(()) };
    named("cuda_version", async {
        let (found, least) = (within(settings.gpu_test_timeout, cuda_version).await?, settings.min_cuda_version);
        match found {
            None => tracing::warn!("the CUDA version cannot be told"),
            Some(found) => {
                ensure!(found >= least, "CUDA {}.{} is below {}.{}", found.0, found.1, least.0, least.1);
            }
        }
        Ok(())
    })
    .await?;
    named("cuda_initialization", async { within(settings.gpu_test_timeout, initialisation).await? }).await?;
    named("gpu_benchmark", async {
        let (limit, patience) = (settings.benchmark_timeout, settings.benchmark_timeout + settings.gpu_test_timeout);
        let took = within(patience, benchmark).await??;
        ensure!(took <= limit, "a matrix product took {} ms, the limit is {} ms", took.as_millis(), limit.as_millis());
        Ok(())
    })
    .await
}

async fn named(check: &str, work: impl Future<Output = Result<()>>) -> Result<(), Failed> {
    work.await.map_err(|reason| Failed { check: check.into(), reason })?;
    tracing::debug!(check, "the check passes");
    Ok(())
}

/// Runs what blocks on a thread of its own; one that hangs is left behind.
async fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match timeout(limit, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(_)) => bail!("the check panicked"),
        Err(_) => bail!("no answer within {} s", limit.as_secs_f64()),
    }
}

fn first_lines(error: &anyhow::Error, lines: usize) -> anyhow::Error {
    anyhow!(format!("{error:#}").lines().take(lines.max(1)).collect::<Vec<_>>().join("\n"))
}

const GIB: f64 = (1_u64 << 30) as f64;

fn memory(settings: &CheckSettings, root: &Path) -> Result<()> {
    let available = available_memory(root)? as f64 / GIB;
    let least = settings.min_memory_gib;
    ensure!(available >= least, "{available:.2} GiB of memory are available, {least:.2} GiB are needed");
    Ok(())
}

/// What this container may still use: the host's figure or what its own limit leaves, whichever is less.
fn available_memory(root: &Path) -> Result<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).context("/proc/meminfo")?;
    let host = field(&meminfo, "MemAvailable:").context("/proc/meminfo has no MemAvailable")? * 1024;
    let v2 = root.join("sys/fs/cgroup");
    let v1 = root.join("sys/fs/cgroup/memory");
    let left = cgroup_left(&v2, "memory.max", "memory.current", "inactive_file")
        .or_else(|| cgroup_left(&v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"));
    Ok(left.map_or(host, |left| left.min(host)))
}

/// `None` without a limit. Cached files count as usage but give way.
fn cgroup_left(folder: &Path, limit: &str, usage: &str, cached: &str) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let used = number(usage)?.saturating_sub(field(&stat, cached).unwrap_or(0));
    Some(number(limit)?.saturating_sub(used))
}

/// The number behind a name, in a file of lines `name number`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok()).flatten()
    })
}

fn disk(settings: &CheckSettings, path: &Path) -> Result<()> {
    let stat = rustix::fs::statvfs(path).context("the disk cannot be asked")?;
    // As `df` has it: of what is not reserved for root.
    let usable = stat.f_blocks.saturating_sub(stat.f_bfree).saturating_add(stat.f_bavail).max(1);
    let free = 100.0 * stat.f_bavail as f64 / usable as f64;
    let least = settings.min_disk_percent;
    ensure!(free >= least, "{free:.1} % of the disk are free, {least:.1} % are needed");
    Ok(())
}

const NETWORK_TRIES: u32 = 3;

/// Reaches the host that jobs come from: what the worker needs, and nothing else. A late network gets a few tries.
async fn network(settings: &CheckSettings, take_url: &str) -> Result<()> {
    let url = reqwest::Url::parse(take_url).context("RUNPOD_WEBHOOK_GET_JOB is no URL")?;
    let host = url.host_str().context("RUNPOD_WEBHOOK_GET_JOB names no host")?.trim_matches(['[', ']']).to_owned();
    let port = url.port_or_known_default().context("RUNPOD_WEBHOOK_GET_JOB names no port")?;
    let mut failure = anyhow!("not tried");
    for attempt in 0..NETWORK_TRIES {
        if attempt > 0 {
            sleep(settings.network_timeout.min(Duration::from_secs(1))).await;
        }
        failure = match timeout(settings.network_timeout, TcpStream::connect((host.as_str(), port))).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.into(),
            Err(_) => anyhow!("no answer within {} s", settings.network_timeout.as_secs_f64()),
        };
    }
    Err(failure.context(format!("{host}:{port} cannot be reached")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::Settings;

    fn settings(variables: &'static [(&'static str, &'static str)]) -> CheckSettings {
        let get = |name: &str| match name {
            "RUNPOD_WEBHOOK_GET_JOB" => Some("http://127.0.0.1/job-take".to_owned()),
            _ => variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()),
        };
        Settings::from_variables(get).unwrap().checks
    }

    /// Where a test looks instead of `/`.
    fn fake_root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    const MEMINFO: &str = "MemTotal:       67108864 kB\nMemAvailable:   33554432 kB\n"; // 32 GiB

    #[test]
    fn memory_is_what_the_containers_limit_leaves() {
        let gib = |count: u64| (count << 30).to_string();
        let cases: [(&[(&str, String)], u64); 5] = [
            (&[], 32),
            (&[("memory.max", "max\n".into()), ("memory.current", gib(1))], 32),
            (&[("memory.max", gib(8)), ("memory.current", gib(3))], 5),
            (
                &[
                    ("memory.max", gib(8)),
                    ("memory.current", gib(7)),
                    ("memory.stat", format!("anon 1\ninactive_file {}", gib(4))),
                ],
                5,
            ),
            (&[("memory/memory.limit_in_bytes", gib(4)), ("memory/memory.usage_in_bytes", gib(3))], 1),
        ];
        for (files, expected) in cases {
            let paths: Vec<(String, &str)> =
                files.iter().map(|(name, text)| (format!("sys/fs/cgroup/{name}"), text.as_str())).collect();
            let mut files: Vec<(&str, &str)> = paths.iter().map(|(path, text)| (path.as_str(), *text)).collect();
            files.push(("proc/meminfo", MEMINFO));
            let folder = fake_root(&files);
            let root = folder.path();
            assert_eq!(available_memory(root).unwrap(), expected << 30, "{files:?}");
            assert_eq!(memory(&settings(&[]), root).is_ok(), expected >= 4);
            assert_eq!(memory(&settings(&[("RUNPOD_MIN_MEMORY_GB", "31.5")]), root).is_ok(), expected == 32);
        }
    }

    #[test]
    fn the_disk_passes_by_its_free_share() {
        let root = Path::new("/");
        disk(&settings(&[("RUNPOD_MIN_DISK_PERCENT", "0")]), root).unwrap();
        assert!(disk(&settings(&[("RUNPOD_MIN_DISK_PERCENT", "101")]), root).is_err());
    }

    #[tokio::test]
    async fn the_network_passes_when_the_host_of_the_takes_answers() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v2/x/job-take/$ID", listener.local_addr().unwrap());
        let quick = settings(&[("RUNPOD_NETWORK_CHECK_TIMEOUT", "0.05")]);
        network(&quick, &url).await.unwrap();
        drop(listener);
        let error = network(&quick, &url).await.unwrap_err();
        assert!(format!("{error:#}").contains("cannot be reached"), "{error:#}");
        assert!(network(&quick, "no URL").await.is_err());
    }

    fn gpu(version: Option<(u32, u32)>, took: u64, works: bool) -> GpuChecks {
        let outcome = move || if works { Ok(()) } else { Err(anyhow!("no device\nsecond line\nthird line")) };
        GpuChecks {
            allocation: Box::new(outcome),
            cuda_version: Box::new(move || version),
            initialisation: Box::new(|| Ok(())),
            benchmark: Box::new(move || Ok(Duration::from_millis(took))),
        }
    }

    async fn outcome(variables: &'static [(&'static str, &'static str)], gpu: GpuChecks) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let mut settings = settings(variables);
        (settings.min_memory_gib, settings.min_disk_percent) = (0.0, 0.0);
        match run(&settings, vec![], Some(gpu), &url).await {
            Ok(()) => "passed".into(),
            Err(failed) => format!("{}: {:#}", failed.check, failed.reason),
        }
    }

    #[tokio::test]
    async fn each_gpu_check_and_its_variable() {
        assert_eq!(outcome(&[], gpu(Some((12, 8)), 10, true)).await, "passed");
        assert_eq!(outcome(&[], gpu(None, 10, true)).await, "passed");
        assert_eq!(
            outcome(&[("RUNPOD_GPU_MAX_ERROR_MESSAGES", "2")], gpu(None, 10, false)).await,
            "gpu_allocation: no device\nsecond line"
        );
        assert_eq!(outcome(&[("RUNPOD_SKIP_GPU_CHECK", "True")], gpu(None, 10, false)).await, "passed");
        assert_eq!(outcome(&[], gpu(Some((11, 7)), 10, true)).await, "cuda_version: CUDA 11.7 is below 11.8");
        assert_eq!(
            outcome(&[("RUNPOD_MIN_CUDA_VERSION", "12.9")], gpu(Some((12, 8)), 10, true)).await,
            "cuda_version: CUDA 12.8 is below 12.9"
        );
        let slow = "gpu_benchmark: a matrix product took 50 ms, the limit is 40 ms";
        assert_eq!(outcome(&[("RUNPOD_GPU_BENCHMARK_TIMEOUT", "0.04")], gpu(None, 50, true)).await, slow);
        assert_eq!(
            outcome(&[("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true")], gpu(Some((1, 0)), 9000, true)).await,
            "passed"
        );

        let mut hanging = gpu(None, 10, true);
        hanging.allocation = Box::new(|| {
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        });
        let hangs = "gpu_allocation: no answer within 0.05 s";
        assert_eq!(outcome(&[("RUNPOD_GPU_TEST_TIMEOUT", "0.05")], hanging).await, hangs);
    }

    #[tokio::test]
    async fn a_check_of_the_programs_own_runs_whatever_the_variables_say() {
        let skip = settings(&[("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "true"), ("RUNPOD_SKIP_GPU_CHECK", "true")]);
        let own = Check { name: "licence".into(), run: Box::pin(async { bail!("expired") }) };
        let failed = run(&skip, vec![own], None, "http://127.0.0.1:1/").await.unwrap_err();
        assert_eq!((failed.check.as_str(), failed.reason.to_string().as_str()), ("licence", "expired"));
    }
}
