//! The denoising loop: step 8 of `StableDiffusionXLPipeline.__call__`.

use std::rc::Rc;
use std::time::Instant;

use image::RgbImage;
use tch::{Device, Kind, Tensor};

use super::control::Controls;
use super::latents::{Inpaint, Start};
use super::parts::ModelParts;
use super::passes::Pass;
use super::prompt::Conditions;
use super::{Run, StableDiffusionXlPipeline, Task};
use crate::api::OutputFormat;
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::media;
use crate::models::{UNet, UNetInputs};
use crate::schedulers::NoiseSource;
use crate::torch::Mark;

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

/// A prediction for a batch, ControlNets included.
pub(super) type Forward<'a> = dyn Fn(&UNetInputs) -> Result<Tensor> + 'a;

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

/// A pass on its way: what the UNet is asked next, and what its answer makes of the latents.
pub(super) struct Denoising {
    pass: Pass,
    guidance: Guidance,
    conditions: Conditions,
    /// For the steps at which guidance does not act, where there may be some.
    prompt_alone: Option<Conditions>,
    /// `[1, time_cond_proj_dim]`, for a UNet that takes its guidance as an input.
    timestep_cond: Option<Tensor>,
    /// `[num_images, 4, h, w]`
    latents: Tensor,
    pub(super) inpaint: Option<Rc<Inpaint>>,
    /// Steps of the pass that are done, or under way on the device.
    done: usize,
    /// The end of the last of them there.
    mark: Option<Mark>,
}

impl Denoising {
    fn step(&self) -> usize {
        self.pass.steps.start + self.done
    }

    fn is_guided(&self) -> bool {
        self.guidance.acts_at(self.done, self.pass.all_steps)
    }

    /// What the UNet is asked at the next step; `None` at the end of the pass.
    fn next(&self) -> Option<UNetInputs> {
        let (step, latents, scheduler) = (self.step(), &self.latents, &self.pass.scheduler);
        if step == self.pass.steps.end {
            return None;
        }
        let guided = self.is_guided();
        let conditions = self.prompt_alone.as_ref().filter(|_| !guided).unwrap_or(&self.conditions);
        let batch = conditions.encoder_hidden_states.size()[0];
        let sample = if guided { Tensor::cat(&[latents, latents], 0) } else { latents.shallow_clone() };
        Some(UNetInputs {
            sample: scheduler.scale_model_input(&sample, step),
            timestep: Tensor::full([batch], scheduler.timesteps()[step], (Kind::Float, latents.device())),
            encoder_hidden_states: conditions.encoder_hidden_states.shallow_clone(),
            text_embeds: conditions.text_embeds.shallow_clone(),
            time_ids: conditions.time_ids.shallow_clone(),
            timestep_cond: self.timestep_cond.as_ref().map(|cond| cond.expand([batch, -1], false)),
        })
    }

    /// The prediction for those inputs, or for some of their rows.
    fn predict(&self, unet: &UNet, controls: &Controls, inputs: &UNetInputs) -> Result<Tensor> {
        let residuals = controls.residuals(self.done, self.pass.all_steps, inputs, self.is_guided())?;
        let shown = self.inpaint.as_ref().map(|inpaint| {
            let sample = inpaint.model_input(&inputs.sample);
            UNetInputs { sample, ..inputs.map(Tensor::shallow_clone) }
        });
        unet.forward(shown.as_ref().unwrap_or(inputs), residuals.as_ref())
    }

    /// Takes the step for which this was predicted.
    pub(super) fn advance(&mut self, noise_pred: &Tensor, noise: &mut NoiseSource) -> Result<()> {
        let step = self.step();
        let guided = self.is_guided().then(|| guide(noise_pred, &self.guidance));
        let noise_pred = guided.as_ref().unwrap_or(noise_pred);
        let latents = self.pass.scheduler.step(noise_pred, step, &self.latents, noise)?;
        self.latents = match &self.inpaint {
            Some(inpaint) => inpaint.after_step(latents, step, &*self.pass.scheduler),
            None => latents,
        };
        self.done += 1;
        // The device has this step to do, so nothing is lost by waiting for the one before. Else progress would tell, and
        // a cancelled job would end, when the last step has been asked for.
        let mark = Mark::set(self.latents.device())?;
        if let Some(before) = std::mem::replace(&mut self.mark, mark) {
            before.wait()?;
        }
        Ok(())
    }

    /// The first image's latents where a preview is due that comes every so many steps: `[1, 4, h, w]`, unit noise.
    fn shown(&self, every: usize) -> Option<Tensor> {
        let is_due = every > 0 && self.done > 0 && self.done.is_multiple_of(every);
        is_due.then(|| self.pass.scheduler.scale_model_input(&self.latents.narrow(0, 0, 1), self.step()))
    }

    /// The latents at the end, `[num_images, 4, h, w]`.
    pub(super) fn finish(self) -> Result<Tensor> {
        if let Some(mark) = &self.mark {
            mark.wait()?;
        }
        if !is_finite(&self.latents) {
            let message = "the latents are not finite: this model overflows in this dtype, or its weights are damaged";
            return Err(Error::new(ErrorClass::Internal, "non_finite_latents", message)
                .remedy("try --dtype bfloat16 or float32, or a lower guidance_scale"));
        }
        Ok(self.latents)
    }
}

impl StableDiffusionXlPipeline {
    /// A pass with the UNet of `parts`, before its first step.
    pub(super) fn denoising(
        &self,
        run: &Run,
        parts: &ModelParts,
        pass: Pass,
        conditions: Conditions,
        start: Start,
    ) -> Denoising {
        let params = &run.task.params;
        let guidance = parts.guidance(params);
        let target = (self.settings.kind, self.settings.device);
        let width = parts.unet.time_cond_proj_dim;
        Denoising {
            pass,
            prompt_alone: guidance.is_on().then(|| conditions.without_negative()),
            guidance,
            conditions,
            timestep_cond: width.map(|width| guidance_scale_embedding(params.guidance_scale, width, target)),
            latents: start.latents,
            inpaint: start.inpaint,
            done: 0,
            mark: None,
        }
    }

    /// Runs the steps of a pass; gives the latents at its end.
    pub(super) fn denoise(
        &self,
        run: &mut Run,
        parts: &ModelParts,
        controls: &Controls,
        mut denoising: Denoising,
    ) -> Result<Tensor> {
        while let Some(inputs) = self.next_inputs(run, &denoising)? {
            let forward = |inputs: &UNetInputs| denoising.predict(&parts.unet, controls, inputs);
            let noise_pred = self.predict(&run.economy, &inputs, &forward)?;
            denoising.advance(&noise_pred, &mut run.noise)?;
            run.count.done += 1;
        }
        controls.report(&mut run.timings);
        self.encode_ahead(run);
        denoising.finish()
    }

    /// What the UNet is asked at the next step; `None` at the end. Tells how far the job is.
    ///
    /// # Errors
    /// `cancelled`
    pub(super) fn next_inputs(&self, run: &Run, denoising: &Denoising) -> Result<Option<UNetInputs>> {
        let Task { params, context, .. } = &*run.task;
        context.check_cancelled()?;
        let inputs = denoising.next();
        let shown = inputs.as_ref().and_then(|_| denoising.shown(params.preview_every));
        let preview = match shown {
            Some(latents) => Some(preview_data_uri(&self.preview_map()?.picture(&latents))),
            None => None,
        };
        run.count.report(context, preview);
        Ok(inputs)
    }
}

/// A JPEG: a preview is small and soon gone.
fn preview_data_uri(picture: &RgbImage) -> String {
    let bytes = media::encode(picture, OutputFormat::Jpeg, 80, None);
    bytes.map(|bytes| media::to_data_uri(OutputFormat::Jpeg, &bytes)).unwrap_or_default()
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
