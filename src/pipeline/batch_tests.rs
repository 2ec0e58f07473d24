use tch::{Device, Kind};

use super::*;

fn inputs(rows: i64, tokens: i64, with_cond: bool) -> UNetInputs {
    let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
    UNetInputs {
        sample: random(&[rows, 4, 2, 2]),
        timestep: random(&[rows]),
        encoder_hidden_states: random(&[rows, tokens, 4]),
        text_embeds: random(&[rows, 4]),
        time_ids: random(&[rows, 6]),
        timestep_cond: with_cond.then(|| random(&[rows, 4])),
    }
}

/// Depends on every input of a row, and on no other row.
fn forward(inputs: &UNetInputs) -> Result<Tensor> {
    let mut row = &inputs.text_embeds + inputs.time_ids.narrow(1, 0, 4) * inputs.timestep.unsqueeze(1);
    row += inputs.encoder_hidden_states.select(1, 2);
    if let Some(cond) = &inputs.timestep_cond {
        row += cond;
    }
    Ok(&inputs.sample * row.unsqueeze(2).unsqueeze(3))
}

#[test]
fn each_job_of_a_call_gets_what_it_would_have_got_alone() {
    for with_cond in [false, true] {
        let jobs = [inputs(2, 7, with_cond), inputs(1, 7, with_cond), inputs(6, 7, with_cond)];
        let together = call_once(&jobs.each_ref(), &forward).unwrap();
        let alone = jobs.iter().map(|job| forward(job).unwrap());
        assert!(together.iter().zip(alone).all(|(one, other)| one.equal(&other)));
    }
}

#[test]
fn inputs_fit_that_differ_in_their_rows_alone() {
    assert!(inputs(2, 77, false).fits(&inputs(1, 77, false)));
    assert!(!inputs(2, 77, false).fits(&inputs(2, 154, false)));
    let wide = UNetInputs { sample: Tensor::zeros([2, 4, 2, 3], (Kind::Float, Device::Cpu)), ..inputs(2, 77, false) };
    assert!(!wide.fits(&inputs(2, 77, false)));
}
