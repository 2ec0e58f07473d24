//! Which attention kernels are the fastest on this device, found by trying them on the UNet's own sizes.

use std::time::{Duration, Instant};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::torch::{AttentionBackend, set_attention_backend};

/// libtorch's own order comes first: another must be faster by [`MARGIN`].
const CANDIDATES: [AttentionBackend; 4] =
    [AttentionBackend::Auto, AttentionBackend::Cudnn, AttentionBackend::Flash, AttentionBackend::Efficient];

/// Less is noise, and the next start would choose otherwise.
const MARGIN: f64 = 0.03;

const ROUNDS: usize = 5;

/// Tokens of a prompt that is not longer than CLIP's own length.
const TEXT_TOKENS: i64 = 77;

/// Attention as one level of the UNet asks for it, `count` times in a step.
#[derive(Debug, PartialEq, Eq)]
struct Calls {
    heads: i64,
    head_dim: i64,
    tokens: i64,
    count: i64,
}

/// Sets the fastest for the whole process. On a CPU there is nothing to choose from.
pub(super) fn choose_fastest(unet_config: &Value, (kind, device): (Kind, Device)) -> Result<()> {
    if !device.is_cuda() {
        return Ok(());
    }
    let levels = levels(unet_config);
    let backend = fastest(|backend| measure(&levels, backend, (kind, device)));
    tracing::info!(?backend, "attention");
    Ok(set_attention_backend(backend)?)
}

fn fastest(mut measure: impl FnMut(AttentionBackend) -> anyhow::Result<Duration>) -> AttentionBackend {
    let mut best = (AttentionBackend::Auto, f64::INFINITY);
    for backend in CANDIDATES {
        match measure(backend) {
            Ok(time) => {
                tracing::debug!(?backend, ms = time.as_secs_f64() * 1e3, "attention of one step");
                if time.as_secs_f64() < best.1 * (1.0 - MARGIN) {
                    best = (backend, time.as_secs_f64());
                }
            }
            Err(error) => tracing::debug!(?backend, error = format!("{error:#}"), "attention cannot use it"),
        }
    }
    best.0
}

/// The best of some rounds over all calls of a step with guidance.
fn measure(levels: &[Calls], backend: AttentionBackend, (kind, device): (Kind, Device)) -> anyhow::Result<Duration> {
    set_attention_backend(backend)?;
    let mut total = Duration::ZERO;
    for Calls { heads, head_dim, tokens, count } in levels {
        let inputs = |tokens: i64| Tensor::f_randn([2, *heads, tokens, *head_dim], (kind, device));
        let (query, own, text) = (inputs(*tokens)?, inputs(*tokens)?, inputs(TEXT_TOKENS)?);
        let attend = |keys: &Tensor| {
            Tensor::f_scaled_dot_product_attention(&query, keys, keys, None::<&Tensor>, 0.0, false, None, false)
        };
        let mut best = Duration::MAX;
        for _ in 0..ROUNDS {
            synchronize(device);
            let started = Instant::now();
            let _outputs = (attend(&own)?, attend(&text)?);
            synchronize(device);
            best = best.min(started.elapsed());
        }
        total += best * *count as u32;
    }
    Ok(total)
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// The levels that have attention. diffusers calls the number of heads `attention_head_dim`.
fn levels(config: &Value) -> Vec<Calls> {
    let integer = |value: &Value, default: i64| value.as_i64().unwrap_or(default);
    let at = |key: &str, level: usize, default: i64| match &config[key] {
        Value::Array(levels) => levels.get(level).map_or(default, |value| integer(value, default)),
        value => integer(value, default),
    };
    let (side, layers) = (integer(&config["sample_size"], 128), integer(&config["layers_per_block"], 2));
    let blocks = config["down_block_types"].as_array().map_or(&[][..], Vec::as_slice);
    let mut levels = Vec::new();
    for (level, _) in blocks.iter().enumerate().filter(|(_, block)| *block == "CrossAttnDownBlock2D") {
        let channels = at("block_out_channels", level, 0);
        let heads = match config["num_attention_heads"].is_null() {
            true => at("attention_head_dim", level, 8),
            false => at("num_attention_heads", level, 8),
        };
        // on the way down, and with one layer more on the way up; the middle has one of the last level
        let middle = i64::from(level + 1 == blocks.len());
        levels.push(Calls {
            heads,
            head_dim: channels / heads,
            tokens: (side >> level).pow(2),
            count: at("transformer_layers_per_block", level, 1) * (2 * layers + 1 + middle),
        });
    }
    levels
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_levels_of_sdxl() {
        let config = json!({
            "sample_size": 128,
            "layers_per_block": 2,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "num_attention_heads": null,
            "transformer_layers_per_block": [1, 2, 10],
        });
        let level = |heads, tokens, count| Calls { heads, head_dim: 64, tokens, count };
        assert_eq!(levels(&config), [level(10, 4096, 10), level(20, 1024, 60)]);
    }

    #[test]
    fn another_than_libtorchs_own_must_be_clearly_faster() {
        let chosen = |times: [Option<f64>; 4]| {
            let mut times = times.into_iter();
            fastest(|_| times.next().flatten().map(Duration::from_secs_f64).ok_or_else(|| anyhow::anyhow!("refused")))
        };
        assert_eq!(chosen([Some(1.0), Some(0.98), Some(1.2), Some(2.0)]), AttentionBackend::Auto);
        assert_eq!(chosen([Some(1.0), Some(0.98), Some(0.9), Some(0.95)]), AttentionBackend::Flash);
        assert_eq!(chosen([Some(1.0), None, None, Some(0.5)]), AttentionBackend::Efficient);
        assert_eq!(chosen([None; 4]), AttentionBackend::Auto);
    }

    #[test]
    fn calls_are_timed() {
        let levels = [Calls { heads: 2, head_dim: 8, tokens: 16, count: 3 }];
        let time = measure(&levels, AttentionBackend::Auto, (Kind::Float, Device::Cpu)).unwrap();
        assert!(time > Duration::ZERO);
    }
}
