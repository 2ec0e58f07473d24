//! The curve that the noise levels of a run follow, by the names that tools give it.

use super::wording::invalid_value;
use crate::error::Result;

/// How the noise levels are spread over the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SigmaSchedule {
    Karras,
    Exponential,
    Beta,
    /// Even in the logarithm of the signal-to-noise ratio; arXiv 2206.00927.
    Lu,
    /// Align Your Steps, arXiv 2404.14507: levels found by search for SDXL.
    Ays,
    /// Timesteps spaced from the noisiest one down (`trailing`).
    SgmUniform,
    /// Timesteps as the scheduler spaces them, no curve: for a model whose own configuration has one.
    Uniform,
}

use SigmaSchedule::{Ays, Beta, Exponential, Karras, Lu, SgmUniform, Uniform};

impl SigmaSchedule {
    pub const ALL: [SigmaSchedule; 7] = [Karras, Exponential, Beta, Lu, Ays, SgmUniform, Uniform];

    /// Reads a name in any of the spellings tools use.
    ///
    /// # Errors
    ///
    /// `invalid_value`.
    pub fn from_name(name: &str) -> Result<SigmaSchedule> {
        let short: String = name.chars().take(40).collect();
        Self::find(&normalized(&short))
            .ok_or_else(|| invalid_value("sigma_schedule", &Self::ALL.map(SigmaSchedule::name), name))
    }

    /// Splits `dpmpp2mkarras` into `dpmpp2m` and Karras; the text is without spaces and underscores.
    pub(super) fn split_suffix(text: &str) -> Option<(&str, SigmaSchedule)> {
        let suffixes = [("karras", Karras), ("exponential", Exponential), ("beta", Beta), ("sgmuniform", SgmUniform)];
        let more = [("alignyoursteps", Ays), ("ays", Ays), ("lu", Lu)];
        suffixes.iter().chain(&more).find_map(|(suffix, schedule)| Some((text.strip_suffix(suffix)?, *schedule)))
    }

    fn find(name: &str) -> Option<SigmaSchedule> {
        Some(match name {
            "karras" => Karras,
            "exponential" => Exponential,
            "beta" => Beta,
            "lu" | "lulambdas" => Lu,
            "ays" | "alignyoursteps" => Ays,
            "sgmuniform" | "simple" | "trailing" => SgmUniform,
            "uniform" | "normal" => Uniform,
            _ => return None,
        })
    }

    /// The name in requests.
    pub fn name(self) -> &'static str {
        match self {
            Karras => "karras",
            Exponential => "exponential",
            Beta => "beta",
            Lu => "lu",
            Ays => "ays",
            SgmUniform => "sgm_uniform",
            Uniform => "uniform",
        }
    }

    /// What A1111 calls it.
    pub fn label(self) -> &'static str {
        match self {
            Karras => "Karras",
            Exponential => "Exponential",
            Beta => "Beta",
            Lu => "Lu",
            Ays => "Align Your Steps",
            SgmUniform => "SGM Uniform",
            Uniform => "Uniform",
        }
    }
}

fn normalized(name: &str) -> String {
    name.to_lowercase().replace([' ', '_', '-'], "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read() {
        for schedule in SigmaSchedule::ALL {
            assert_eq!(SigmaSchedule::from_name(schedule.name()).unwrap(), schedule);
            assert_eq!(SigmaSchedule::from_name(schedule.label()).unwrap(), schedule);
        }
        for name in ["ays", "AYS", "align_your_steps", "Align Your Steps"] {
            assert_eq!(SigmaSchedule::from_name(name).unwrap(), Ays, "{name}");
        }
        assert_eq!(SigmaSchedule::from_name("simple").unwrap(), SgmUniform);
        assert_eq!(SigmaSchedule::from_name("normal").unwrap(), Uniform);
    }

    #[test]
    fn any_other_is_answered_with_the_known_ones() {
        for name in ["", "sqrt", "karras karras", &"x".repeat(1_000_000)] {
            let error = SigmaSchedule::from_name(name).unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), ("invalid_value", Some("sigma_schedule")), "{name:.20}");
            assert!(error.message.contains("karras, exponential, beta"), "{}", error.message);
        }
    }
}
