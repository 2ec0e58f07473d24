use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use tch::Device;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use url::Url;

use super::{ColdStart, block_on, load_runner};
use crate::cli::{EngineArgs, ServeArgs};
use crate::config;
use crate::error::{Error, Result};
use crate::net::{self, Guard, Uploader};
use crate::server::{self, Encode, Finished, GpuMemory, Hooks, Listeners, PostWebhook, RunnerState};
use crate::{torch, worker};

/// Serves RunPod's endpoint API on this machine until a signal ends it.
pub fn serve(arguments: &EngineArgs, options: &ServeArgs) -> Result<()> {
    let start = ColdStart::begin();
    let settings = config::serve_settings(arguments, options)?;
    let (host, port) = config::serve_address(options);
    let health_port = config::health_port(port);
    if settings.api_key.is_none() && !matches!(host.as_str(), "127.0.0.1" | "::1") {
        tracing::warn!("serving {host} without an API key: everybody who reaches it can use it (--api-key)");
    }
    let hooks = Hooks {
        encode: Some(encode(config::uploader()?)),
        post_webhook: Some(post_webhook(config::guard())),
        gpu_memory: Some(Arc::new({
            let arguments = arguments.clone();
            move || gpu_memory(&arguments)
        })),
        engines: Some(Arc::new({
            let start = start.clone();
            move || start.engines()
        })),
        unet_calls: Some(Arc::new({
            let start = start.clone();
            move || start.calls()
        })),
        cold_start: Some(Arc::new({
            let start = start.clone();
            move || start.phases()
        })),
        model_sources: Some(Arc::new({
            let start = start.clone();
            move || start.model_sources()
        })),
        capabilities: Some(Arc::new({
            let start = start.clone();
            move || start.capabilities()
        })),
    };
    let load = load_runner(arguments.clone(), start);
    block_on(async move {
        let bind = async |port: u16| {
            TcpListener::bind((host.as_str(), port)).await.map_err(|e| {
                Error::setup("address_not_available", format!("{host}:{port} cannot be listened on"))
                    .source(e)
                    .remedy("choose another --host or --port")
            })
        };
        let api = bind(port).await?;
        let health = match health_port {
            Some(port) => Some(bind(port).await?),
            None => None,
        };
        let address = api.local_addr().map_err(anyhow::Error::from)?;
        // before anybody hears of us: as a container's first process, a signal that nobody waits for would be lost
        let signals = worker::signals().map_err(anyhow::Error::from)?;
        eprintln!("listening on http://{address}");
        let (state, runner) = watch::channel(RunnerState::Loading);
        tokio::spawn(async move {
            state.send_replace(match load.await {
                Ok(runner) => RunnerState::Ready(runner),
                Err(error) => RunnerState::Failed(error),
            });
            // the server reads the state as long as it lives
            state.closed().await;
        });
        server::serve(Listeners { api, health }, settings, runner, hooks, signals).await
    })
}

/// The sum over the GPUs that are used.
fn gpu_memory(arguments: &EngineArgs) -> Option<GpuMemory> {
    let devices = config::devices(arguments).ok()?;
    let distinct = devices.iter().enumerate().filter(|(index, device)| !devices[..*index].contains(device));
    let read = |(_, device): (usize, &Device)| torch::device_memory(*device).ok().flatten();
    let add = |(free, total), (more_free, more): (u64, u64)| (free + more_free, total + more);
    let (free, total_bytes) = distinct.filter_map(read).reduce(add)?;
    Some(GpuMemory { used_bytes: total_bytes - free, total_bytes })
}

/// The output that clients get: links where the job or the worker has a bucket, else the pictures themselves.
fn encode(uploader: Uploader) -> Encode {
    Arc::new(move |Finished { id, s3_config, reply }| {
        let uploader = uploader.clone();
        Box::pin(async move {
            if s3_config.is_some() || reply.wants_links() {
                let pictures = reply.pictures();
                if let Some(links) = uploader.upload_pictures(&id, s3_config.as_ref(), pictures).await? {
                    return Ok(reply.with_links(&links));
                }
            }
            Ok(spawn_blocking(move || reply.to_json()).await.map_err(anyhow::Error::from)?)
        })
    })
}

fn post_webhook(guard: Guard) -> PostWebhook {
    Arc::new(move |address, body| {
        let guard = guard.clone();
        Box::pin(async move {
            let url = Url::parse(&address)
                .map_err(|e| Error::invalid("invalid_url", "webhook", "the webhook is no URL").source(e))?;
            let request = guard.request(Method::POST, &url)?.header(CONTENT_TYPE, "application/json");
            match request.timeout(Duration::from_secs(30)).body(body).send().await {
                Ok(response) => Ok(response.status().as_u16()),
                // the URL is the client's and may hold a secret
                Err(error) => {
                    Err(net::refusal(&error).unwrap_or_else(|| anyhow::Error::from(error.without_url()).into()))
                }
            }
        })
    })
}
