//! Every schedule, and a whole run through it with a stand-in for the UNet, against numbers that diffusers wrote
//! (`fixtures/schedulers.py`).

use sdxl_worker::api::SchedulerKind;
use sdxl_worker::schedulers::{NoiseSource, SchedulerConfig, StepOptions, build};
use serde::Deserialize;
use tch::{Kind, Tensor};

const TOLERANCE: f64 = 1e-5;
const SHAPE: [i64; 3] = [4, 3, 3];
const SEED: u64 = 7;

#[derive(Deserialize)]
struct Case {
    scheduler: String,
    config: serde_json::Value,
    eta: f64,
    steps: usize,
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
    sample: Vec<f32>,
}

fn relative_error(ours: &Tensor, expected: &Tensor) -> f64 {
    f64::try_from((ours - expected).norm() / expected.norm()).unwrap()
}

#[test]
fn every_schedule_and_a_whole_run_through_it_equal_diffusers() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("fixtures/schedulers.json")).unwrap();
    for case in &cases {
        let name = format!("{} {} eta {} in {} steps", case.scheduler, case.config, case.eta, case.steps);
        let config = SchedulerConfig::from_json(&case.config.to_string()).unwrap();
        let kind = SchedulerKind::from_name(&case.scheduler, "scheduler").unwrap();
        let options = StepOptions { num_inference_steps: case.steps, eta: case.eta };
        let mut scheduler = build(kind, &config, options).unwrap();

        let timesteps = scheduler.timesteps().to_vec();
        assert_eq!(timesteps.len(), case.timesteps.len(), "{name}: number of timesteps");
        for (i, (ours, expected)) in timesteps.iter().zip(&case.timesteps).enumerate() {
            assert!((ours - expected).abs() <= 1e-3, "{name}: timestep {i} is {ours}, not {expected}");
        }
        let sigma_error = (scheduler.init_noise_sigma() / case.init_noise_sigma - 1.0).abs();
        assert!(sigma_error <= TOLERANCE, "{name}: init_noise_sigma is off by {sigma_error}");

        let mut noise = NoiseSource::new(SEED, 2).unwrap();
        let mut sample = noise.randn(&SHAPE, Kind::Float).unwrap() * scheduler.init_noise_sigma();
        for (step, t) in timesteps.iter().enumerate() {
            let output = scheduler.scale_model_input(&sample, step) * 0.5 + t / 1000.0 - 0.25;
            sample = scheduler.step(&output, step, &sample, &mut noise).unwrap();
        }
        let expected = Tensor::from_slice(&case.sample).view([2, 4, 3, 3]);
        let error = relative_error(&sample, &expected);
        assert!(error <= TOLERANCE, "{name}: the final sample is off by {error}");
    }
}

#[test]
fn ddim_refuses_epsilon_prediction_with_zero_terminal_snr() {
    let config = SchedulerConfig::from_json(r#"{"rescale_betas_zero_snr": true}"#).unwrap();
    let options = StepOptions { num_inference_steps: 4, eta: 0.0 };
    assert_eq!(build(SchedulerKind::Ddim, &config, options).err().unwrap().code, "unsupported_option");
    assert!(build(SchedulerKind::EulerDiscrete, &config, options).is_ok());
}

#[test]
fn an_unknown_value_of_a_known_key_is_an_error() {
    let error = SchedulerConfig::from_json(r#"{"timestep_spacing": "sideways"}"#).err().unwrap();
    assert!(error.to_string().contains("sideways"));
}
