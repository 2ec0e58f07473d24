//! The denoising loop: step 8 of `StableDiffusionXLPipeline.__call__`.

use std::time::Instant;

use tch::{Kind, Tensor};

use super::control::Controls;
use super::latents::Start;
use super::prompt::Conditions;
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::models::{UNet, UNetInputs};
use crate::schedulers::{NoiseSource, Scheduler};

/// How the prompt is weighed against the negative prompt.
pub(super) struct Guidance {
    /// 1 or less: no guidance, and no second half of the batch.
    pub(super) scale: f64,
    /// How far the guided prediction is brought back to the spread of the plain one; arXiv 2305.08891, section 3.4.
    pub(super) rescale: f64,
}

impl Guidance {
    pub(super) fn is_on(&self) -> bool {
        self.scale > 1.0
    }
}

/// How the first image's latents are shown on the way.
pub(super) struct Previews<'a> {
    /// Steps from one to the next.
    pub(super) every: usize,
    /// From `[1, 4, h, w]` to a data URI.
    pub(super) show: &'a dyn Fn(&Tensor) -> String,
}

/// What leads the denoising.
pub(super) struct Lead<'a> {
    pub(super) conditions: &'a Conditions,
    pub(super) guidance: &'a Guidance,
    pub(super) controls: &'a Controls<'a>,
    pub(super) previews: Option<Previews<'a>>,
}

/// Runs the steps of `scheduler` from `start` on; gives the final latents, `[num_images, 4, h, w]`.
pub(super) fn denoise(
    unet: &UNet,
    lead: &Lead,
    scheduler: &mut dyn Scheduler,
    noise: &mut NoiseSource,
    start: Start,
    context: &JobContext,
) -> Result<Tensor> {
    let Lead { conditions, guidance, controls, previews } = lead;
    let Start { mut latents, step: first, inpaint } = start;
    let batch = conditions.encoder_hidden_states.size()[0];
    let timesteps = scheduler.timesteps()[first..].to_vec();
    let (steps, started) = (timesteps.len(), Instant::now());
    for (done, timestep) in timesteps.iter().enumerate() {
        let step = first + done;
        context.check_cancelled()?;
        let seconds_left = (done > 0).then(|| started.elapsed().as_secs_f64() / done as f64 * (steps - done) as f64);
        let shown = previews.as_ref().filter(|p| done > 0 && done % p.every == 0);
        let preview = shown.map(|p| (p.show)(&scheduler.scale_model_input(&latents.narrow(0, 0, 1), step)));
        context.report(Progress::Denoising { step: done, steps, seconds_left, preview });

        let sample = if guidance.is_on() { Tensor::cat(&[&latents, &latents], 0) } else { latents.shallow_clone() };
        let sample = scheduler.scale_model_input(&sample, step);
        let mut inputs = UNetInputs {
            sample: &sample,
            timestep: &Tensor::full([batch], *timestep, (Kind::Float, latents.device())),
            encoder_hidden_states: &conditions.encoder_hidden_states,
            text_embeds: &conditions.text_embeds,
            time_ids: &conditions.time_ids,
        };
        let residuals = controls.residuals(done, steps, &inputs, guidance.is_on())?;
        let shown = inpaint.as_ref().map(|inpaint| inpaint.model_input(&sample));
        inputs.sample = shown.as_ref().unwrap_or(&sample);
        let noise_pred = unet.forward(&inputs, residuals.as_ref())?;
        let noise_pred = if guidance.is_on() { guide(&noise_pred, guidance) } else { noise_pred };

        latents = scheduler.step(&noise_pred, step, &latents, noise)?;
        if let Some(inpaint) = &inpaint {
            latents = inpaint.after_step(latents, step, &*scheduler);
        }
    }
    context.check_cancelled()?;
    context.report(Progress::Denoising { step: steps, steps, seconds_left: Some(0.0), preview: None });
    if !is_finite(&latents) {
        let message = "the latents are not finite: this model overflows in this dtype, or its weights are damaged";
        return Err(Error::new(ErrorClass::Internal, "non_finite_latents", message)
            .remedy("try --dtype bfloat16 or float32, or a lower guidance_scale"));
    }
    Ok(latents)
}

/// Classifier-free guidance on a prediction whose first half is for the negative prompt.
fn guide(noise_pred: &Tensor, guidance: &Guidance) -> Tensor {
    let halves = noise_pred.chunk(2, 0);
    let (noise_pred_uncond, noise_pred_text) = (&halves[0], &halves[1]);
    let noise_cfg = noise_pred_uncond + (noise_pred_text - noise_pred_uncond) * guidance.scale;
    if guidance.rescale <= 0.0 {
        return noise_cfg;
    }
    let std = |t: &Tensor| t.std_dim(&[1i64, 2, 3][..], true, true);
    let rescaled = &noise_cfg * (std(noise_pred_text) / std(&noise_cfg));
    rescaled * guidance.rescale + noise_cfg * (1.0 - guidance.rescale)
}

pub(super) fn is_finite(tensor: &Tensor) -> bool {
    bool::try_from(tensor.isfinite().all()).unwrap_or(false)
}
