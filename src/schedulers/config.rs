use serde::Deserialize;

/// `scheduler_config.json`. Keys keep diffusers' names; one that is absent takes the default of the class that reads it,
/// so it stays an option here where the classes differ.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    pub class_name: Option<String>,
    num_train_timesteps: Option<usize>,
    pub(super) beta_start: Option<f64>,
    pub(super) beta_end: Option<f64>,
    pub(super) beta_schedule: Option<BetaSchedule>,
    pub(super) trained_betas: Option<Vec<f64>>,
    prediction_type: Option<PredictionType>,
    interpolation_type: Option<InterpolationType>,
    pub(super) use_karras_sigmas: Option<bool>,
    pub(super) use_exponential_sigmas: Option<bool>,
    pub(super) use_beta_sigmas: Option<bool>,
    pub(super) use_lu_lambdas: Option<bool>,
    use_flow_sigmas: Option<bool>,
    pub(super) sigma_min: Option<f64>,
    pub(super) sigma_max: Option<f64>,
    pub(super) timestep_spacing: Option<TimestepSpacing>,
    timestep_type: Option<TimestepType>,
    steps_offset: Option<i64>,
    rescale_betas_zero_snr: Option<bool>,
    final_sigmas_type: Option<FinalSigmasType>,
    pub(super) clip_sample: Option<bool>,
    clip_sample_range: Option<f64>,
    pub(super) set_alpha_to_one: Option<bool>,
    thresholding: Option<bool>,
    dynamic_thresholding_ratio: Option<f64>,
    sample_max_value: Option<f64>,
    // the solvers
    pub(super) algorithm_type: Option<AlgorithmType>,
    pub(super) solver_order: Option<usize>,
    pub(super) solver_type: Option<SolverType>,
    pub(super) lower_order_final: Option<bool>,
    pub(super) euler_at_final: Option<bool>,
    pub(super) lambda_min_clipped: Option<f64>,
    pub(super) predict_x0: Option<bool>,
    pub(super) disable_corrector: Option<Vec<usize>>,
    // DDPM, PNDM, LCM and TCD
    pub(super) variance_type: Option<String>,
    pub(super) skip_prk_steps: Option<bool>,
    pub(super) original_inference_steps: Option<usize>,
    pub(super) timestep_scaling: Option<f64>,
    // EDM
    pub(super) sigma_data: Option<f64>,
    pub(super) sigma_schedule: Option<EdmSigmaSchedule>,
    pub(super) rho: Option<f64>,
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
pub enum TimestepSpacing {
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

/// Which equation a DPM solver integrates, and whether it adds noise on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum AlgorithmType {
    #[serde(rename = "dpmsolver")]
    DpmSolver,
    #[serde(rename = "dpmsolver++")]
    DpmSolverPlusPlus,
    #[serde(rename = "sde-dpmsolver")]
    SdeDpmSolver,
    #[serde(rename = "sde-dpmsolver++")]
    SdeDpmSolverPlusPlus,
    /// What DEIS calls itself; a DPM solver reads it as its own default.
    #[serde(rename = "deis")]
    Deis,
}

/// How a solver of second order weighs its two predictions. A value that is another class's means the class's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum SolverType {
    Midpoint,
    Heun,
    Logrho,
    Bh1,
    Bh2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum EdmSigmaSchedule {
    Karras,
    Exponential,
}

/// The defaults that all classes share.
impl SchedulerConfig {
    /// Reads the file's text; an unknown value of a known key is an error, since guessing would change the picture.
    pub fn from_json(text: &str) -> anyhow::Result<Self> {
        // Python writes `lambda_min_clipped`'s default as no JSON can
        let config: Self = serde_json::from_str(&text.replace("-Infinity", "null"))?;
        anyhow::ensure!(config.num_train_timesteps() > 0, "num_train_timesteps must be above 0");
        anyhow::ensure!(config.use_flow_sigmas != Some(true), "use_flow_sigmas is not for this kind of model");
        Ok(config)
    }

    pub fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps.unwrap_or(1000)
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

    /// Range that the predicted clean sample is cut to; `None` cuts nothing.
    pub(super) fn clip_sample_range(&self, clip_by_default: bool) -> Option<f64> {
        self.clip_sample.unwrap_or(clip_by_default).then(|| self.clip_sample_range.unwrap_or(1.0))
    }

    /// Quantile and cap of dynamic thresholding, if it is on.
    pub(super) fn thresholding(&self) -> Option<(f64, f64)> {
        self.thresholding
            .unwrap_or(false)
            .then(|| (self.dynamic_thresholding_ratio.unwrap_or(0.995), self.sample_max_value.unwrap_or(1.0)))
    }

    /// Whether the steps end at the last training timestep.
    pub fn is_trailing(&self) -> bool {
        self.timestep_spacing == Some(TimestepSpacing::Trailing)
    }
}
