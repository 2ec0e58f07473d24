//! The update rules of DPM-Solver and DPM-Solver++, as ODE and as SDE: arXiv 2206.00927, 2211.01095. One table of factors
//! serves the multistep, the singlestep and the EDM class; source: their `..._order_update` methods in diffusers.

use tch::Tensor;

use super::config::{AlgorithmType, FinalSigmasType, SchedulerConfig, SolverType};
use super::scalar::{exp, sqrt, weighted_sum};
use super::solver::Point;
use crate::error::{Error, Result};

/// What a DPM solver of any class is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Solver {
    pub(super) algorithm: AlgorithmType,
    pub(super) order: usize,
    pub(super) solver_type: SolverType,
}

impl Solver {
    pub(super) fn new(config: &SchedulerConfig) -> Result<Self> {
        let algorithm = match config.algorithm_type {
            None | Some(AlgorithmType::Deis) => AlgorithmType::DpmSolverPlusPlus,
            Some(algorithm) => algorithm,
        };
        let solver_type = match config.solver_type {
            Some(SolverType::Heun) => SolverType::Heun,
            _ => SolverType::Midpoint,
        };
        let solver = Solver { algorithm, order: config.solver_order.unwrap_or(2), solver_type };
        let unsupported = |message: &str| Err(Error::setup("unsupported_model", message));
        if !(1..=3).contains(&solver.order) {
            return unsupported("scheduler_config.json: `solver_order` must be from 1 to 3");
        }
        let reaches_zero = solver.predicts_original() && config.algorithm_type != Some(AlgorithmType::Deis);
        if !reaches_zero && config.final_sigmas_type() == FinalSigmasType::Zero {
            return unsupported("scheduler_config.json: this `algorithm_type` needs `final_sigmas_type` sigma_min");
        }
        Ok(solver)
    }

    /// Whether it works with the predicted clean sample; else with the predicted noise.
    pub(super) fn predicts_original(&self) -> bool {
        matches!(self.algorithm, AlgorithmType::DpmSolverPlusPlus | AlgorithmType::SdeDpmSolverPlusPlus)
    }

    pub(super) fn adds_noise(&self) -> bool {
        matches!(self.algorithm, AlgorithmType::SdeDpmSolver | AlgorithmType::SdeDpmSolverPlusPlus)
    }

    /// From `s` to `t` by one prediction.
    pub(super) fn first_order(
        &self,
        t: Point,
        s: Point,
        sample: &Tensor,
        m: &Tensor,
        noise: Option<&Tensor>,
    ) -> Tensor {
        let factors = self.factors(t, s);
        factors.sum(sample, &[(factors.d0, m)], noise)
    }

    /// From `s` to `t` by a prediction and a difference of two.
    pub(super) fn second_order(
        &self,
        (t, s): (Point, Point),
        sample: &Tensor,
        (d0, d1): (&Tensor, &Tensor),
        noise: Option<&Tensor>,
    ) -> Tensor {
        let factors = self.factors(t, s);
        let factor = if self.solver_type == SolverType::Heun { factors.d1 } else { factors.d1_midpoint };
        factors.sum(sample, &[(factors.d0, d0), (factor, d1)], noise)
    }

    /// From `s` to `t` by a prediction and differences; without the second one it is the singlestep's midpoint form.
    pub(super) fn third_order(
        &self,
        (t, s): (Point, Point),
        sample: &Tensor,
        (d0, d1, d2): (&Tensor, &Tensor, Option<&Tensor>),
        noise: Option<&Tensor>,
    ) -> Tensor {
        let factors = self.factors(t, s);
        let mut terms = vec![(factors.d0, d0), (factors.d1, d1)];
        terms.extend(d2.map(|d2| (factors.d2, d2)));
        factors.sum(sample, &terms, noise)
    }

    fn factors(&self, t: Point, s: Point) -> Factors {
        let h = t.lambda - s.lambda;
        match self.algorithm {
            AlgorithmType::DpmSolverPlusPlus | AlgorithmType::Deis => {
                let e = exp(-h) - 1.0;
                Factors {
                    sample: t.sigma / s.sigma,
                    d0: -(t.alpha * e),
                    d1_midpoint: -(0.5 * (t.alpha * e)),
                    d1: t.alpha * (e / h + 1.0),
                    d2: -(t.alpha * ((e + h) / (h * h) - 0.5)),
                    noise: 0.0,
                }
            }
            AlgorithmType::DpmSolver => {
                let e = exp(h) - 1.0;
                Factors {
                    sample: t.alpha / s.alpha,
                    d0: -(t.sigma * e),
                    d1_midpoint: -(0.5 * (t.sigma * e)),
                    d1: -(t.sigma * (e / h - 1.0)),
                    d2: -(t.sigma * ((e - h) / (h * h) - 0.5)),
                    noise: 0.0,
                }
            }
            AlgorithmType::SdeDpmSolverPlusPlus => {
                let (h2, e) = (2.0 * h, 1.0 - exp(-2.0 * h));
                Factors {
                    sample: t.sigma / s.sigma * exp(-h),
                    d0: t.alpha * e,
                    d1_midpoint: 0.5 * (t.alpha * e),
                    d1: t.alpha * (e / -h2 + 1.0),
                    d2: t.alpha * ((e - h2) / (h2 * h2) - 0.5),
                    noise: t.sigma * sqrt(e),
                }
            }
            AlgorithmType::SdeDpmSolver => {
                let e = exp(h) - 1.0;
                Factors {
                    sample: t.alpha / s.alpha,
                    d0: -(2.0 * (t.sigma * e)),
                    d1_midpoint: -(t.sigma * e),
                    d1: -(2.0 * (t.sigma * (e / h - 1.0))),
                    d2: f32::NAN, // not defined; refused where it would be used
                    noise: t.sigma * sqrt(exp(2.0 * h) - 1.0),
                }
            }
        }
    }
}

/// What sample, predictions and noise are multiplied with.
struct Factors {
    sample: f32,
    d0: f32,
    d1_midpoint: f32,
    d1: f32,
    d2: f32,
    noise: f32,
}

impl Factors {
    fn sum(&self, sample: &Tensor, terms: &[(f32, &Tensor)], noise: Option<&Tensor>) -> Tensor {
        let mut all = vec![(self.sample, sample)];
        all.extend_from_slice(terms);
        all.extend(noise.map(|noise| (self.noise, noise)));
        weighted_sum(&all)
    }
}
