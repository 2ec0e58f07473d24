//! Jobs that are denoised side by side: their rows share the UNet's calls, everything else is each job's own.

use std::sync::Arc;
use std::time::Instant;

use tch::Tensor;

use super::denoise::{Denoising, Forward};
use super::offload::Offload;
use super::rescue::Economy;
use super::{Generation, Run, StableDiffusionXlPipeline, Stepped, Task};
use crate::error::{ErrorClass, Result};
use crate::fault::catch;
use crate::models::UNetInputs;
use crate::torch;
use crate::weights::InUse;

const SEPARATED: &str =
    "memory was short: jobs that could have shared the UNet's calls were denoised one after the other";

/// A job between two of its steps.
pub struct Running<'a> {
    run: Run,
    denoising: Denoising,
    /// Of its next step.
    inputs: UNetInputs,
    started: Instant,
    /// A call that it shared failed: its calls are its own from then on.
    is_apart: bool,
    unet: InUse<'a>,
}

impl Running<'_> {
    fn num_images(&self) -> usize {
        self.run.task.params.num_images as usize
    }

    fn may_share(&self) -> bool {
        !self.is_apart && !self.run.economy.one_by_one.get()
    }
}

/// Whether a job's steps are calls of the base model's UNet and nothing else. Those with ControlNets, a refiner, a second
/// pass or a picture to start from run alone.
fn is_plain(task: &Task) -> bool {
    let params = &task.params;
    params.init.is_none() && params.controls.is_empty() && params.hires.is_none() && params.refiner.is_none()
}

/// Whether two jobs want the same UNet's calls: one size, the same LoRAs in the weights. Prompt, seed, steps, scheduler and
/// guidance are each row's own.
fn can_share(one: &Task, other: &Task) -> bool {
    let size = |task: &Task| (task.params.height, task.params.width);
    size(one) == size(other) && loras(one) == loras(other)
}

/// What a job's LoRAs make of the weights.
pub(super) fn loras(task: &Task) -> Vec<(String, u64)> {
    task.inputs.loras.iter().map(|lora| lora.key()).collect()
}

impl StableDiffusionXlPipeline {
    pub(super) fn may_join(&self, task: &Task, group: &[Running]) -> bool {
        // where everything leaves the device, a newcomer's text encoders would have to stand beside the UNet
        if !is_plain(task) || self.offload.get() == Offload::All {
            return false;
        }
        let fits = |running: &Running| running.may_share() && can_share(task, &running.run.task);
        let jobs = || group.iter().map(|running| &running.run.task.params).chain([&task.params]).collect::<Vec<_>>();
        group.is_empty() || group.iter().all(fits) && self.has_room(&jobs()).unwrap_or(false)
    }

    pub(super) fn begin_beside_others(&self, task: &Arc<Task>) -> Result<Running<'_>> {
        let economy = Economy::new(task.params.num_images);
        self.plan_memory(&task.params, &economy)?;
        let (pass, _) = self.passes(&task.params)?;
        let mut run = Run::new(task, economy, pass.steps.len())?;
        let denoising = self.prepare(&mut run, pass)?;
        let unet = self.bring(&run.economy, || self.base.unet_in_use(&task.context))?;
        let started = Instant::now();
        let inputs = self.next_inputs(&run, &denoising)?.expect("a pass has steps");
        Ok(Running { run, denoising, inputs, started, is_apart: false, unet })
    }

    pub(super) fn step_together(&self, group: &mut [Running]) -> Stepped {
        let mut calls = Vec::new();
        let mut outcomes: Vec<(usize, Result<bool>)> = Vec::new();
        for members in shared(group) {
            let predictions = self.predict_together(group, &members, &mut calls);
            for (member, prediction) in members.into_iter().zip(predictions) {
                outcomes.push((member, catch(|| self.advance(&mut group[member], &prediction?))));
            }
        }
        outcomes.sort_by_key(|(member, _)| *member);
        Stepped { outcomes: outcomes.into_iter().map(|(_, outcome)| outcome).collect(), calls }
    }

    /// The predictions for some of the group, by one call, or where that fails by one for each.
    fn predict_together(
        &self,
        group: &mut [Running],
        members: &[usize],
        calls: &mut Vec<usize>,
    ) -> Vec<Result<Tensor>> {
        let forward = |inputs: &UNetInputs| self.base.unet.forward(inputs, None);
        if members.len() > 1 {
            let inputs: Vec<&UNetInputs> = members.iter().map(|&member| &group[member].inputs).collect();
            match catch(|| call_once(&inputs, &forward)) {
                Ok(predictions) => {
                    calls.push(members.iter().map(|&member| group[member].num_images()).sum());
                    return predictions.into_iter().map(Ok).collect();
                }
                Err(error) if error.class == ErrorClass::DeviceLost => {
                    return members.iter().map(|_| Err(error.again())).collect();
                }
                Err(error) => {
                    tracing::warn!(jobs = members.len(), code = error.code, "a call for several jobs failed");
                    let is_memory = error.class == ErrorClass::OutOfMemory;
                    if is_memory {
                        torch::empty_cache().ok();
                    }
                    for &member in members {
                        group[member].is_apart = true;
                        group[member].run.warnings.extend(is_memory.then(|| SEPARATED.into()));
                    }
                }
            }
        }
        let mut predict = |&member: &usize| {
            let Running { run, inputs, .. } = &group[member];
            calls.push(group[member].num_images());
            catch(|| self.predict(&run.economy, inputs, &forward))
        };
        members.iter().map(&mut predict).collect()
    }

    /// Gives whether that was the last step.
    fn advance(&self, running: &mut Running, noise_pred: &Tensor) -> Result<bool> {
        let Running { run, denoising, inputs, .. } = running;
        denoising.advance(noise_pred, &mut run.noise)?;
        run.count.done += 1;
        let next = self.next_inputs(run, denoising)?;
        let is_last = next.is_none();
        if let Some(next) = next {
            *inputs = next;
        }
        Ok(is_last)
    }

    pub(super) fn finish_beside_others(&self, running: Running) -> Result<Generation> {
        let Running { mut run, denoising, started, unet, .. } = running;
        let latents = denoising.finish()?;
        run.timings.add("denoise", started.elapsed());
        drop(unet);
        self.conclude(run, &latents)
    }
}

/// Which of the group share a call: those whose inputs fit each other. Prompts of different lengths do not.
fn shared(group: &[Running]) -> Vec<Vec<usize>> {
    let mut calls: Vec<Vec<usize>> = Vec::new();
    for (index, running) in group.iter().enumerate() {
        let fits = |call: &&mut Vec<usize>| {
            let first = &group[call[0]];
            first.may_share() && first.inputs.fits(&running.inputs)
        };
        match calls.iter_mut().find(fits).filter(|_| running.may_share()) {
            Some(call) => call.push(index),
            None => calls.push(vec![index]),
        }
    }
    calls
}

/// The predictions for each of `inputs`, by one call.
fn call_once(inputs: &[&UNetInputs], forward: &Forward) -> Result<Vec<Tensor>> {
    let rows: Vec<i64> = inputs.iter().map(|inputs| inputs.rows()).collect();
    Ok(forward(&UNetInputs::cat(inputs))?.split_with_sizes(&rows, 0))
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
