//! What ControlNets add to each step: `controlnet_keep`, scales, guess mode and the sum over several nets.

use std::cell::Cell;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::api::{ControlParams, ScaleMode, Timings};
use crate::error::Result;
use crate::models::{ControlNet, Residuals, UNetInputs, UnionInputs};

/// The controls of one job.
pub(super) struct Controls<'a> {
    calls: Vec<Call<'a>>,
    scale_mode: ScaleMode,
}

/// One net that runs at a step: a net of one type with its control, or a union net with all of its controls.
struct Call<'a> {
    net: &'a ControlNet,
    is_union: bool,
    guess_mode: bool,
    entries: Vec<Entry<'a>>,
    runs: Cell<u32>,
    skips: Cell<u32>,
    /// How long one run takes.
    run_time: Cell<Duration>,
}

struct Entry<'a> {
    params: &'a ControlParams,
    /// `[1, channels, h, w]`
    condition: Tensor,
}

/// How the weights of a call are spread: what goes into the net, and what its residuals are multiplied by.
#[derive(Debug, PartialEq)]
struct Scales {
    /// Entries that take part, each with its scale inside the net.
    inside: Vec<(usize, f64)>,
    outside: f64,
}

impl<'a> Controls<'a> {
    pub(super) fn none() -> Self {
        Controls { calls: Vec::new(), scale_mode: ScaleMode::Diffusers }
    }

    /// `maps` are the control maps, float32 `[1, 3, height, width]` in 0 to 1, one for each of `params`.
    pub(super) fn new(
        params: &'a [ControlParams],
        scale_mode: ScaleMode,
        maps: &[Tensor],
        net: impl Fn(&str) -> &'a ControlNet,
    ) -> Result<Self> {
        let mut calls: Vec<Call> = Vec::new();
        for (params, map) in params.iter().zip(maps) {
            let net = net(&params.model);
            let entry = Entry { params, condition: net.embed(map)? };
            let is_union = params.mode.is_some();
            match calls.iter_mut().find(|call| is_union && std::ptr::eq(call.net, net)) {
                Some(call) => call.entries.push(entry),
                None => calls.push(Call {
                    net,
                    is_union,
                    guess_mode: params.guess_mode || net.global_pool_conditions,
                    entries: vec![entry],
                    runs: Cell::new(0),
                    skips: Cell::new(0),
                    run_time: Cell::default(),
                }),
            }
        }
        Ok(Controls { calls, scale_mode })
    }

    /// The sum of what the nets add at this step of `steps`, for the UNet's whole batch; `None` where nothing is added.
    /// `guided`: the batch's first half is for the negative prompt.
    pub(super) fn residuals(
        &self,
        step: usize,
        steps: usize,
        inputs: &UNetInputs,
        guided: bool,
    ) -> Result<Option<Residuals>> {
        let mut sum: Option<Residuals> = None;
        for call in &self.calls {
            let scales: Vec<f64> = call.entries.iter().map(|entry| scale_at(entry.params, step, steps)).collect();
            let alone = self.calls.len() == 1;
            let Some(scales) = spread(&scales, call.is_union, alone && self.scale_mode == ScaleMode::Diffusers) else {
                call.skips.set(call.skips.get() + 1);
                continue;
            };
            let residuals = call.run(&scales, inputs, guided)?;
            sum = Some(match sum {
                None => residuals,
                Some(Residuals(sum)) => Residuals(sum.iter().zip(&residuals.0).map(|(a, b)| a + b).collect()),
            });
        }
        Ok(sum)
    }

    /// The time that was saved by not running nets that add nothing.
    pub(super) fn report(&self, timings: &mut Timings) {
        let saved: Duration = self.calls.iter().map(|call| call.run_time.get() * call.skips.get()).sum();
        if self.calls.iter().any(|call| call.skips.get() > 0) {
            timings.add("controlnet_saved", saved);
        }
    }
}

impl Call<'_> {
    fn run(&self, scales: &Scales, inputs: &UNetInputs, guided: bool) -> Result<Residuals> {
        // The second run is timed, since the first may also warm up; a net that runs once has only the first.
        self.runs.set(self.runs.get() + 1);
        let started = (self.runs.get() <= 2).then(|| synchronized(inputs.sample.device()));

        let conditions: Vec<&Tensor> = scales.inside.iter().map(|&(entry, _)| &self.entries[entry].condition).collect();
        let modes: Vec<i64> = scales.inside.iter().map(|&(entry, _)| self.entries[entry].mode()).collect();
        let inside: Vec<f64> = scales.inside.iter().map(|&(_, scale)| scale).collect();
        let union = UnionInputs { task_ids: &modes, scales: &inside };
        let only_prompt = self.guess_mode && guided;
        let residuals = if only_prompt {
            let half = |tensor: &Tensor| tensor.chunk(2, 0).pop().expect("two halves");
            self.net.forward(&inputs.map(half), &conditions, &union)?
        } else {
            self.net.forward(inputs, &conditions, &union)?
        };
        let residuals = self.scaled(residuals, scales.outside);
        let residuals = if only_prompt { behind_zeros(&residuals) } else { residuals };

        if let Some(started) = started {
            self.run_time.set(synchronized(inputs.sample.device()) - started);
        }
        Ok(residuals)
    }

    /// In guess mode the shallow residuals count less: from a tenth for the first to all for the last.
    fn scaled(&self, Residuals(residuals): Residuals, scale: f64) -> Residuals {
        if self.guess_mode && !self.net.global_pool_conditions {
            let count = residuals.len() as i64;
            let depth = Tensor::logspace(-1, 0, count, 10.0, (Kind::Float, Device::Cpu)) * scale;
            let depth = depth.to_device(residuals[0].device());
            return Residuals((0..).zip(residuals).map(|(i, residual)| residual * depth.get(i)).collect());
        }
        if scale == 1.0 {
            return Residuals(residuals);
        }
        Residuals(residuals.into_iter().map(|residual| residual * scale).collect())
    }
}

impl Entry<'_> {
    fn mode(&self) -> i64 {
        self.params.mode.unwrap_or(0).into()
    }
}

/// Residuals for the prompt's half of the batch, and none for the negative prompt's.
fn behind_zeros(Residuals(residuals): &Residuals) -> Residuals {
    Residuals(residuals.iter().map(|residual| Tensor::cat(&[&residual.zeros_like(), residual], 0)).collect())
}

fn synchronized(device: Device) -> Instant {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
    Instant::now()
}

/// `controlnet_conditioning_scale` times `controlnet_keep` at a step.
fn scale_at(params: &ControlParams, step: usize, steps: usize) -> f64 {
    let (from, to) = (step as f64 / steps as f64, (step + 1) as f64 / steps as f64);
    if from < params.start || to > params.end { 0.0 } else { params.scale }
}

/// `None` where the net need not run. `as_diffusers` is diffusers' rule for a union net that is the only net: with two
/// controls or more their scales go into the net, which then adds something even where all are 0.
///
/// Everywhere else a scale multiplies the residuals: the largest does, and the others count inside by what they are of
/// it. A control of scale 0 is as if it were not there.
fn spread(scales: &[f64], is_union: bool, as_diffusers: bool) -> Option<Scales> {
    if is_union && as_diffusers && scales.len() > 1 {
        return Some(Scales { inside: scales.iter().copied().enumerate().collect(), outside: 1.0 });
    }
    let outside = scales.iter().copied().fold(0.0, f64::max);
    let acting = scales.iter().enumerate().filter(|(_, scale)| **scale > 0.0);
    let inside: Vec<(usize, f64)> = acting.map(|(entry, scale)| (entry, scale / outside)).collect();
    (!inside.is_empty()).then_some(Scales { inside, outside })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scales(inside: &[(usize, f64)], outside: f64) -> Option<Scales> {
        Some(Scales { inside: inside.to_vec(), outside })
    }

    #[test]
    fn a_net_of_one_type_runs_only_where_it_adds_something() {
        for as_diffusers in [true, false] {
            assert_eq!(spread(&[0.5], false, as_diffusers), scales(&[(0, 1.0)], 0.5));
            assert_eq!(spread(&[0.0], false, as_diffusers), None);
        }
    }

    #[test]
    fn one_control_of_a_union_net_scales_the_residuals_and_several_the_inputs_as_in_diffusers() {
        assert_eq!(spread(&[0.5], true, true), scales(&[(0, 1.0)], 0.5));
        assert_eq!(spread(&[0.0], true, true), None);
        assert_eq!(spread(&[0.5, 0.0], true, true), scales(&[(0, 0.5), (1, 0.0)], 1.0));
        assert_eq!(spread(&[0.0, 0.0], true, true), scales(&[(0, 0.0), (1, 0.0)], 1.0));
    }

    #[test]
    fn elsewhere_a_scale_means_the_same_for_one_control_and_several() {
        assert_eq!(spread(&[0.5, 0.5], true, false), scales(&[(0, 1.0), (1, 1.0)], 0.5));
        assert_eq!(spread(&[0.5, 1.0, 0.0], true, false), scales(&[(0, 0.5), (1, 1.0)], 1.0));
        assert_eq!(spread(&[0.0, 0.0], true, false), None);
    }

    #[test]
    fn a_control_acts_within_its_window() {
        let params = ControlParams {
            model: "net".into(),
            mode: None,
            scale: 0.8,
            start: 0.2,
            end: 0.7,
            guess_mode: false,
            preprocess: None,
            image: String::new(),
        };
        let acting: Vec<usize> = (0..10).filter(|&step| scale_at(&params, step, 10) > 0.0).collect();
        assert_eq!(acting, [2, 3, 4, 5, 6]);
    }
}
