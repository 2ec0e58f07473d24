//! Every schedule, and a whole run through it with a stand-in for the UNet, against numbers that diffusers wrote
//! (`fixtures/schedulers.py`).

use sdxl_worker::api::{SchedulerKind, SigmaSchedule};
use sdxl_worker::error::Result;
use sdxl_worker::schedulers::{NoiseSource, SchedulerConfig, StepOptions, TimestepSpacing, build};
use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;
/// How many roundings of its inputs an ill-conditioned run may be off by.
const ROUNDINGS: f64 = 10.0;
const SHAPE: [i64; 3] = [4, 2, 2];
const SEED: u64 = 7;

#[derive(Deserialize)]
struct Case {
    scheduler: String,
    config: Map<String, Value>,
    options: Options,
    steps: usize,
    /// The first step that is run.
    start: usize,
    /// Why diffusers does not run it, or what comes of it.
    raises: Option<String>,
    #[serde(default)]
    count: usize,
    /// Not written for long runs.
    #[serde(default)]
    timesteps: Vec<f64>,
    #[serde(default)]
    init_noise_sigma: f64,
    #[serde(default)]
    sample: Vec<f32>,
    /// How far off the sample is when the inputs are off by a rounding, where that shows.
    #[serde(default)]
    spread: f64,
}

#[derive(Deserialize)]
struct Options {
    #[serde(default)]
    eta: f64,
    sigma_schedule: Option<String>,
    timesteps: Option<Vec<i64>>,
    sigmas: Option<Vec<f64>>,
}

struct Outcome {
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
    sample: Tensor,
}

fn cases() -> (Map<String, Value>, Vec<Case>) {
    let mut cases: Vec<Value> = serde_json::from_str(include_str!("fixtures/schedulers.json")).unwrap();
    let base = cases.remove(0)["base"].as_object().unwrap().clone();
    (base, cases.into_iter().map(|case| serde_json::from_value(case).unwrap()).collect())
}

impl Case {
    fn name(&self) -> String {
        let config = Value::Object(self.config.clone());
        let Options { eta, sigma_schedule, timesteps, sigmas } = &self.options;
        let options = format!("eta {eta} {sigma_schedule:?} {timesteps:?} {sigmas:?}");
        format!("{} {config} {options} in {} steps from {}", self.scheduler, self.steps, self.start)
    }

    fn run(&self, base: &Map<String, Value>) -> Result<Outcome> {
        let kind = SchedulerKind::from_name(&self.scheduler, "scheduler")?.kind;
        let mut json = base.clone();
        json.extend(self.config.clone());
        // keys that make the class another solver than the kind's stand for the model's own choice of it
        json.entry("_class_name").or_insert(kind.class_name().into());
        let config = SchedulerConfig::from_json(&Value::Object(json).to_string()).unwrap();
        let Options { eta, timesteps, sigmas, .. } = &self.options;
        let options = StepOptions {
            num_inference_steps: self.steps,
            eta: *eta,
            sigma_schedule: self.options.sigma_schedule.as_deref().map(|n| SigmaSchedule::from_name(n).unwrap()),
            timesteps: timesteps.clone(),
            sigmas: sigmas.clone(),
            timestep_spacing: None,
        };
        let mut scheduler = build(kind, &config, &options)?;
        let timesteps = scheduler.timesteps().to_vec();
        let init_noise_sigma = scheduler.init_noise_sigma();
        let mut noise = NoiseSource::new(SEED, 2)?;
        let mut sample = noise.randn(&SHAPE, Kind::Float)?;
        if self.start == 0 {
            sample *= init_noise_sigma;
        } else {
            let drawn = noise.randn(&SHAPE, Kind::Float)?;
            sample = scheduler.add_noise(&sample, &drawn, self.start);
        }
        for (step, t) in timesteps.iter().enumerate().skip(self.start) {
            let output = scheduler.scale_model_input(&sample, step) * 0.5 + t / 1000.0 - 0.25;
            sample = scheduler.step(&output, step, &sample, &mut noise)?;
        }
        Ok(Outcome { timesteps, init_noise_sigma, sample })
    }
}

fn relative_error(ours: &Tensor, expected: &Tensor) -> f64 {
    f64::try_from((ours - expected).norm() / expected.norm()).unwrap()
}

/// What is wrong with a run, if anything.
fn compare(case: &Case, outcome: Result<Outcome>) -> Option<String> {
    let name = case.name();
    let outcome = match (&case.raises, outcome) {
        (Some(_), Err(error)) => return error.message.is_empty().then(|| format!("{name}: an error without words")),
        (Some(raised), Ok(outcome)) => {
            let finite = bool::try_from(outcome.sample.isfinite().all()).unwrap();
            let may = raised == "not finite" && !finite;
            return (!may).then(|| format!("{name}: diffusers says {raised}, this runs"));
        }
        (None, Err(error)) => return Some(format!("{name}: {error}")),
        (None, Ok(outcome)) => outcome,
    };
    if outcome.timesteps.len() != case.count {
        return Some(format!("{name}: {} timesteps, not {}", outcome.timesteps.len(), case.count));
    }
    if let Some(i) = (0..case.timesteps.len()).find(|&i| (outcome.timesteps[i] - case.timesteps[i]).abs() > 1e-3) {
        return Some(format!("{name}: timestep {i} is {}, not {}", outcome.timesteps[i], case.timesteps[i]));
    }
    let sigma_error = (outcome.init_noise_sigma / case.init_noise_sigma - 1.0).abs();
    if sigma_error > TOLERANCE {
        return Some(format!("{name}: init_noise_sigma is off by {sigma_error:.1e}"));
    }
    let expected = Tensor::from_slice(&case.sample).view([2, SHAPE[0], SHAPE[1], SHAPE[2]]);
    let error = relative_error(&outcome.sample, &expected);
    // no run is nearer than its conditioning lets two processors be; written so that NaN is an error
    let close = error <= TOLERANCE.max(ROUNDINGS * case.spread);
    (!close).then(|| format!("{name}: the final sample is off by {error:.1e}"))
}

#[test]
fn every_schedule_and_a_whole_run_through_it_equal_diffusers() {
    let (base, cases) = cases();
    let wrong: Vec<String> = cases.iter().filter_map(|case| compare(case, case.run(&base))).collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn the_fixture_has_every_scheduler_at_every_number_of_steps() {
    let (_, cases) = cases();
    for kind in SchedulerKind::all() {
        for steps in [1, 4, 20, 50] {
            let runs = |case: &&Case| case.scheduler == kind.name() && case.steps == steps && case.raises.is_none();
            let runs = cases.iter().filter(runs).count();
            assert!(runs >= 4, "{} {steps}: {runs}", kind.name());
        }
    }
}

#[test]
fn an_epsilon_model_with_zero_terminal_snr_is_refused_where_the_first_alpha_is_divided_by() {
    let config = SchedulerConfig::from_json(r#"{"rescale_betas_zero_snr": true}"#).unwrap();
    let options = StepOptions { num_inference_steps: 4, ..StepOptions::default() };
    for kind in [SchedulerKind::Ddim, SchedulerKind::Ddpm, SchedulerKind::Lcm, SchedulerKind::Tcd] {
        assert_eq!(build(kind, &config, &options).err().unwrap().code, "unsupported_option", "{}", kind.name());
    }
    assert!(build(SchedulerKind::EulerDiscrete, &config, &options).is_ok());
}

#[test]
fn an_unknown_value_of_a_known_key_is_an_error() {
    let error = SchedulerConfig::from_json(r#"{"timestep_spacing": "sideways"}"#).err().unwrap();
    assert!(error.to_string().contains("sideways"));
}

#[test]
fn a_spacing_that_is_asked_for_takes_the_place_of_the_model_s_own() {
    let config = SchedulerConfig::from_json(r#"{"timestep_spacing": "leading"}"#).unwrap();
    let first = |options: StepOptions| build(SchedulerKind::EulerDiscrete, &config, &options).unwrap().timesteps()[0];
    let options = StepOptions { num_inference_steps: 4, ..StepOptions::default() };
    assert_eq!(first(options.clone()), 750.0);
    assert_eq!(first(StepOptions { timestep_spacing: Some(TimestepSpacing::Trailing), ..options.clone() }), 999.0);
    assert_eq!(first(StepOptions { sigma_schedule: Some(SigmaSchedule::SgmUniform), ..options }), 999.0);
}

#[test]
fn every_curve_that_a_scheduler_says_it_has_changes_its_run() {
    let (base, _) = cases();
    let config = SchedulerConfig::from_json(&Value::Object(base).to_string()).unwrap();
    for kind in SchedulerKind::all() {
        let mut seen: Vec<(&str, Vec<f64>)> = Vec::new();
        for schedule in kind.sigma_schedules() {
            let options =
                StepOptions { num_inference_steps: 6, sigma_schedule: Some(*schedule), ..StepOptions::default() };
            let timesteps = build(kind, &config, &options).unwrap().timesteps().to_vec();
            for (other, same) in &seen {
                assert_ne!(&timesteps, same, "{}: {} is {other}", kind.name(), schedule.name());
            }
            seen.push((schedule.name(), timesteps));
        }
    }
}
