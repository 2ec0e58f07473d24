use super::SchedulerKind::*;
use super::*;

fn read(name: &str) -> NamedScheduler {
    SchedulerKind::from_name(name, "scheduler").unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn every_spelling_is_read() {
    let spellings: &[(SchedulerKind, &[&str])] = &[
        (EulerDiscrete, &["euler", "Euler", "EULER", "K_EULER", "k-euler", "EulerDiscrete", "EulerDiscreteScheduler"]),
        (EulerAncestralDiscrete, &["Euler a", "euler_a", "K_EULER_ANCESTRAL", "euler_ancestral"]),
        (HeunDiscrete, &["Heun", "HeunDiscrete", "heun", "K_HEUN"]),
        (Kdpm2Discrete, &["DPM2", "dpm_2", "KDPM2DiscreteScheduler", "K_DPM_2", "kdpm2"]),
        (
            Kdpm2AncestralDiscrete,
            &["DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler", "K_DPM_2_ANCESTRAL"],
        ),
        (LmsDiscrete, &["LMS", "KLMS", "K_LMS", "lms", "LMSDiscreteScheduler"]),
        (Ddim, &["DDIM", "ddim", "DDIMScheduler", "DdimScheduler", " ddim "]),
        (Ddpm, &["DDPM", "ddpm"]),
        (Pndm, &["PNDM", "PLMS", "PNDMScheduler"]),
        (Dpmpp2m, &["DPM++ 2M", "dpmpp_2m", "DPMSolverMultistep", "DPMSolverMultistepScheduler", "DPMSolver++"]),
        (Dpmpp2mSde, &["DPM++ 2M SDE", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu"]),
        (Dpmpp2mSdeHeun, &["DPM++ 2M SDE Heun"]),
        (Dpmpp3mSde, &["DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu"]),
        (Dpmpp2s, &["DPMSolverSinglestep", "DPMSolverSinglestepScheduler", "dpmpp_2s"]),
        (DpmppSde, &["DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"]),
        (DeisMultistep, &["DEIS", "deis", "DEISMultistepScheduler"]),
        (UniPcMultistep, &["UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"]),
        (Lcm, &["LCM", "lcm"]),
        (Tcd, &["TCD", "TCDScheduler"]),
        (EdmEuler, &["EDMEulerScheduler", "edm_euler"]),
        (EdmDpmpp2m, &["EDMDPMSolverMultistepScheduler", "edm_dpmpp_2m"]),
    ];
    assert_eq!(spellings.len(), SchedulerKind::all().count());
    for (kind, names) in spellings {
        for name in *names {
            assert_eq!(read(name), NamedScheduler { kind: *kind, sigma_schedule: None }, "{name}");
        }
    }
}

#[test]
fn a_name_may_imply_a_noise_curve() {
    let spellings = [
        ("DPM++ 2M Karras", Dpmpp2m, Karras),
        ("dpmpp_2m_karras", Dpmpp2m, Karras),
        ("KarrasDPM", Dpmpp2m, Karras),
        ("lms karras", LmsDiscrete, Karras),
        ("DPM2 a Karras", Kdpm2AncestralDiscrete, Karras),
        ("DPM++ 2M SDE Karras", Dpmpp2mSde, Karras),
        ("DPM++ 2M SDE Exponential", Dpmpp2mSde, Exponential),
        ("DPM++ 3M SDE Exponential", Dpmpp3mSde, Exponential),
        ("DPM++ 2M SDE Heun Karras", Dpmpp2mSdeHeun, Karras),
        ("DPM++ SDE Karras", DpmppSde, Karras),
        ("DPM++ 2M AYS", Dpmpp2m, Ays),
        ("Euler SGM Uniform", EulerDiscrete, SgmUniform),
    ];
    for (name, kind, curve) in spellings {
        assert_eq!(read(name), NamedScheduler { kind, sigma_schedule: Some(curve) }, "{name}");
    }
    assert_eq!(SchedulerKind::from_name("ddim karras", "scheduler").unwrap_err().code, "unknown_scheduler");
}

#[test]
fn a_sampler_that_diffusers_does_not_have_is_not_unknown() {
    for name in
        ["DPM++ 2S a", "DPM++ 2S a Karras", "dpmpp_2s_ancestral", "DPM fast", "dpm_adaptive", "Restart", "ipndm"]
    {
        let error = SchedulerKind::from_name(name, "scheduler").unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), ("unsupported_feature", Some("scheduler")), "{name}");
        assert!(error.remedy.unwrap().starts_with("the nearest"), "{name}");
    }
}

#[test]
fn an_unknown_scheduler_is_answered_with_the_known_ones_and_the_nearest() {
    let error = SchedulerKind::from_name("eulr", "scheduler").unwrap_err();
    assert_eq!(error.code, "unknown_scheduler");
    assert!(error.message.starts_with("`scheduler` must be one of euler, euler_ancestral, "), "{}", error.message);
    assert!(error.remedy.unwrap().ends_with("the nearest known name is euler"));
    for name in ["", "k", "scheduler", "karras", &"x".repeat(1_000_000)] {
        assert_eq!(SchedulerKind::from_name(name, "scheduler").unwrap_err().code, "unknown_scheduler");
    }
}

#[test]
fn no_two_schedulers_share_a_name() {
    let mut seen = std::collections::HashMap::new();
    let rows = SCHEDULERS.iter().flat_map(|row| {
        // One class is several algorithms in diffusers; the first row has it.
        row.all_names().filter(|name| *name != row.class_name).map(|name| (name, row.name))
    });
    for (name, owner) in rows.chain(NOT_IN_DIFFUSERS.iter().copied()) {
        let other = seen.insert(normalized(name), owner);
        assert!(other.is_none_or(|other| other == owner), "{name} is {other:?} and {owner}");
    }
}

#[test]
fn a_class_that_is_several_kinds_gives_its_default() {
    assert_eq!(SchedulerKind::from_class_name("DPMSolverMultistepScheduler"), Some(Dpmpp2m));
    assert_eq!(SchedulerKind::from_class_name("FlowMatchEulerDiscreteScheduler"), None);
    for kind in SchedulerKind::all() {
        assert!(SchedulerKind::from_class_name(kind.class_name()).is_some(), "{}", kind.name());
    }
}
