//! The denoising loop: step 8 of `StableDiffusionXLPipeline.__call__`.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::control::Controls;
use super::latents::Start;
use super::passes::Pass;
use super::prompt::Conditions;
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::models::{UNet, UNetInputs};
use crate::schedulers::NoiseSource;

/// How the prompt is weighed against the negative prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guidance {
    /// 1 or less: no guidance, and no second half of the batch.
    pub(super) scale: f64,
    /// How far the guided prediction is brought back to the spread of the plain one; arXiv 2305.08891, section 3.4.
    pub(super) rescale: f64,
    /// The part of the run in which it acts.
    pub(super) start: f64,
    pub(super) end: f64,
}

impl Guidance {
    pub(super) fn is_on(&self) -> bool {
        self.scale > 1.0
    }

    /// Whether it acts at a step of `steps`: the rule of diffusers' guiders.
    fn acts_at(&self, step: usize, steps: usize) -> bool {
        let first = |part: f64| (part * steps as f64) as usize;
        self.is_on() && (first(self.start)..first(self.end)).contains(&step)
    }
}

/// How the first image's latents are shown on the way.
pub(super) struct Previews<'a> {
    /// Steps from one to the next.
    pub(super) every: usize,
    /// From `[1, 4, h, w]` to a data URI.
    pub(super) show: &'a dyn Fn(&Tensor) -> String,
}

/// A prediction for a batch, ControlNets included.
pub(super) type Forward<'a> = dyn Fn(&UNetInputs) -> Result<Tensor> + 'a;

/// What leads the denoising.
pub(super) struct Lead<'a> {
    pub(super) conditions: &'a Conditions,
    pub(super) guidance: &'a Guidance,
    /// `[1, time_cond_proj_dim]`, for a UNet that takes its guidance as an input.
    pub(super) timestep_cond: Option<Tensor>,
    pub(super) controls: &'a Controls<'a>,
    pub(super) previews: Option<Previews<'a>>,
    /// Runs what it is given, the prediction for a batch, on these inputs, or on parts of them where memory is short.
    pub(super) predict: &'a dyn Fn(&UNetInputs, &Forward) -> Result<Tensor>,
}

/// How far a job is that may have several passes.
pub(super) struct StepCount {
    pub(super) done: usize,
    pub(super) steps: usize,
    pub(super) started: Instant,
}

impl StepCount {
    fn report(&self, context: &JobContext, preview: Option<String>) {
        let &StepCount { done, steps, started } = self;
        let seconds_left = (done > 0).then(|| started.elapsed().as_secs_f64() / done as f64 * (steps - done) as f64);
        context.report(Progress::Denoising { step: done, steps, seconds_left, preview });
    }
}

/// Runs the steps of `pass` from `start` on; gives the latents at its end, `[num_images, 4, h, w]`.
pub(super) fn denoise(
    unet: &UNet,
    lead: &Lead,
    pass: &mut Pass,
    noise: &mut NoiseSource,
    start: &Start,
    count: &mut StepCount,
    context: &JobContext,
) -> Result<Tensor> {
    let Lead { guidance, controls, previews, .. } = lead;
    let (mut latents, inpaint) = (start.latents.shallow_clone(), start.inpaint.as_ref());
    let scheduler = pass.scheduler.as_mut();
    let prompt_alone = guidance.is_on().then(|| lead.conditions.without_negative());
    for (done, step) in pass.steps.clone().enumerate() {
        context.check_cancelled()?;
        let shown = previews.as_ref().filter(|p| done > 0 && done % p.every == 0);
        let preview = shown.map(|p| (p.show)(&scheduler.scale_model_input(&latents.narrow(0, 0, 1), step)));
        count.report(context, preview);

        let guided = guidance.acts_at(done, pass.all_steps);
        let conditions = prompt_alone.as_ref().filter(|_| !guided).unwrap_or(lead.conditions);
        let batch = conditions.encoder_hidden_states.size()[0];
        let sample = if guided { Tensor::cat(&[&latents, &latents], 0) } else { latents.shallow_clone() };
        let sample = scheduler.scale_model_input(&sample, step);
        let timestep_cond = lead.timestep_cond.as_ref().map(|cond| cond.expand([batch, -1], false));
        let inputs = UNetInputs {
            sample: &sample,
            timestep: &Tensor::full([batch], scheduler.timesteps()[step], (Kind::Float, latents.device())),
            encoder_hidden_states: &conditions.encoder_hidden_states,
            text_embeds: &conditions.text_embeds,
            time_ids: &conditions.time_ids,
            timestep_cond: timestep_cond.as_ref(),
        };
        let noise_pred = (lead.predict)(&inputs, &|inputs| {
            let residuals = controls.residuals(done, pass.all_steps, inputs, guided)?;
            let shown = inpaint.map(|inpaint| inpaint.model_input(inputs.sample));
            let sample = shown.as_ref().unwrap_or(inputs.sample);
            unet.forward(&UNetInputs { sample, ..*inputs }, residuals.as_ref())
        })?;
        let noise_pred = if guided { guide(&noise_pred, guidance) } else { noise_pred };

        latents = scheduler.step(&noise_pred, step, &latents, noise)?;
        if let Some(inpaint) = inpaint {
            latents = inpaint.after_step(latents, step, &*scheduler);
        }
        count.done += 1;
    }
    context.check_cancelled()?;
    count.report(context, None);
    if !is_finite(&latents) {
        let message = "the latents are not finite: this model overflows in this dtype, or its weights are damaged";
        return Err(Error::new(ErrorClass::Internal, "non_finite_latents", message)
            .remedy("try --dtype bfloat16 or float32, or a lower guidance_scale"));
    }
    Ok(latents)
}

/// The guidance scale as a UNet takes it that was distilled to: `get_guidance_scale_embedding`, `[1, width]`.
pub(super) fn guidance_scale_embedding(scale: f64, width: i64, (kind, device): (Kind, Device)) -> Tensor {
    let half = width / 2;
    let decay = Tensor::from(10_000f32).log() / (half - 1);
    let frequencies = (Tensor::arange(half, (Kind::Float, Device::Cpu)) * -decay).exp();
    let angles = Tensor::from((scale - 1.0) as f32) * 1000.0 * frequencies;
    let embedding = Tensor::cat(&[angles.sin(), angles.cos()], 0);
    embedding.constant_pad_nd([0, width % 2]).unsqueeze(0).to_kind(kind).to_device(device)
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
