use serde::Deserialize;

/// `scheduler_config.json`. Keys keep diffusers' names; one that is absent takes the default of the class that reads it.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    num_train_timesteps: Option<usize>,
    pub(super) beta_start: Option<f64>,
    pub(super) beta_end: Option<f64>,
    beta_schedule: Option<BetaSchedule>,
    pub(super) trained_betas: Option<Vec<f64>>,
    prediction_type: Option<PredictionType>,
    interpolation_type: Option<InterpolationType>,
    pub(super) use_karras_sigmas: Option<bool>,
    pub(super) use_exponential_sigmas: Option<bool>,
    pub(super) use_beta_sigmas: Option<bool>,
    pub(super) sigma_min: Option<f64>,
    pub(super) sigma_max: Option<f64>,
    pub(super) timestep_spacing: Option<TimestepSpacing>,
    timestep_type: Option<TimestepType>,
    steps_offset: Option<i64>,
    rescale_betas_zero_snr: Option<bool>,
    final_sigmas_type: Option<FinalSigmasType>,
    clip_sample: Option<bool>,
    clip_sample_range: Option<f64>,
    set_alpha_to_one: Option<bool>,
    thresholding: Option<bool>,
    dynamic_thresholding_ratio: Option<f64>,
    sample_max_value: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum BetaSchedule {
    Linear,
    ScaledLinear,
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredcosCapV2,
}

/// What the UNet's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PredictionType {
    Epsilon,
    #[serde(alias = "original_sample")]
    Sample,
    VPrediction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum InterpolationType {
    Linear,
    LogLinear,
}

/// How the steps are spread over the training timesteps; table 2 of arXiv 2305.08891.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepSpacing {
    Linspace,
    Leading,
    Trailing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimestepType {
    Discrete,
    Continuous,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinalSigmasType {
    Zero,
    SigmaMin,
}

/// The defaults that all classes share.
impl SchedulerConfig {
    /// Reads the file's text; an unknown value of a known key is an error, since guessing would change the picture.
    pub fn from_json(text: &str) -> anyhow::Result<Self> {
        let config: Self = serde_json::from_str(text)?;
        anyhow::ensure!(config.num_train_timesteps() > 0, "num_train_timesteps must be above 0");
        Ok(config)
    }

    pub(super) fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps.unwrap_or(1000)
    }

    pub(super) fn beta_schedule(&self) -> BetaSchedule {
        self.beta_schedule.unwrap_or(BetaSchedule::Linear)
    }

    pub(super) fn prediction_type(&self) -> PredictionType {
        self.prediction_type.unwrap_or(PredictionType::Epsilon)
    }

    pub(super) fn interpolation_type(&self) -> InterpolationType {
        self.interpolation_type.unwrap_or(InterpolationType::Linear)
    }

    pub(super) fn timestep_type(&self) -> TimestepType {
        self.timestep_type.unwrap_or(TimestepType::Discrete)
    }

    pub(super) fn steps_offset(&self) -> i64 {
        self.steps_offset.unwrap_or(0)
    }

    pub(super) fn rescale_betas_zero_snr(&self) -> bool {
        self.rescale_betas_zero_snr.unwrap_or(false)
    }

    pub(super) fn final_sigmas_type(&self) -> FinalSigmasType {
        self.final_sigmas_type.unwrap_or(FinalSigmasType::Zero)
    }

    pub(super) fn set_alpha_to_one(&self) -> bool {
        self.set_alpha_to_one.unwrap_or(true)
    }

    /// Range that the predicted clean sample is cut to; `None` cuts nothing.
    pub(super) fn clip_sample_range(&self) -> Option<f64> {
        self.clip_sample.unwrap_or(true).then(|| self.clip_sample_range.unwrap_or(1.0))
    }

    /// Quantile and cap of dynamic thresholding, if it is on.
    pub(super) fn thresholding(&self) -> Option<(f64, f64)> {
        self.thresholding
            .unwrap_or(false)
            .then(|| (self.dynamic_thresholding_ratio.unwrap_or(0.995), self.sample_max_value.unwrap_or(1.0)))
    }

    /// The same schedule with Karras sigmas, as a request may ask.
    pub fn with_karras_sigmas(mut self) -> Self {
        self.use_karras_sigmas = Some(true);
        self.use_exponential_sigmas = None;
        self.use_beta_sigmas = None;
        self
    }
}
