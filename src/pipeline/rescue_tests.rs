use tch::{Device, Kind};

use super::*;
use crate::error::Error;

/// Fails as torch does: no machine has that much.
fn run_out_of_memory() {
    let _ = Tensor::zeros([1 << 45], (Kind::Float, Device::Cpu));
}

/// Runs out of memory until so many measures are taken; the measures that were, and the result.
fn rescued(possible: &[Measure], needed: usize, passed_over: Option<Measure>) -> (Vec<Measure>, Result<usize>) {
    let mut taken = Vec::new();
    let take = |taken: &mut Vec<Measure>, measure| {
        let is_one = passed_over != Some(measure);
        if is_one {
            taken.push(measure);
        }
        is_one
    };
    let result = with_less(&mut taken, possible, take, |taken| {
        if taken.len() < needed {
            run_out_of_memory();
        }
        Ok(taken.len())
    });
    (taken, result)
}

#[test]
fn measures_are_taken_in_order_and_only_as_many_as_are_needed() {
    let [text_encoders, all] = OFFLOADS;
    assert_eq!(rescued(&WITH_TILES, 0, None).0, []);
    assert_eq!(rescued(&WITH_TILES, 1, None).0, [Measure::Tiles]);
    let (taken, result) = rescued(&WITH_TILES, 3, None);
    assert_eq!((taken, result.unwrap()), (vec![Measure::Tiles, text_encoders, all], 3));
    // what is in force already is no measure
    assert_eq!(rescued(&WITH_ONE_BY_ONE, 1, Some(Measure::OneByOne)).0, [text_encoders]);
}

#[test]
fn when_no_measure_is_left_memory_has_run_out() {
    let (taken, result) = rescued(&WITH_ONE_BY_ONE, 4, None);
    let error = result.unwrap_err();
    assert_eq!((taken.len(), error.code, error.class), (3, "out_of_memory", ErrorClass::OutOfMemory));
}

#[test]
fn other_errors_are_not_tried_again() {
    let mut runs = 0;
    let result: Result<()> = with_less(
        &mut runs,
        &WITH_TILES,
        |_, _| true,
        |runs| {
            *runs += 1;
            Err(Error::invalid("out_of_range", "width", "too wide"))
        },
    );
    assert_eq!((result.unwrap_err().code, runs), ("out_of_range", 1));
}

#[test]
fn image_by_image_each_row_meets_its_own_conditions() {
    let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
    for (batch, cond) in [(6, None), (3, None), (3, Some(random(&[3, 4])))] {
        let inputs = UNetInputs {
            sample: random(&[batch, 4, 2, 2]),
            timestep: random(&[batch]),
            encoder_hidden_states: random(&[batch, 7, 4]),
            text_embeds: random(&[batch, 4]),
            time_ids: random(&[batch, 6]),
            timestep_cond: cond,
        };
        let rows = Cell::new(0);
        let forward = |inputs: &UNetInputs| {
            rows.set(inputs.sample.size()[0]);
            let mut row = &inputs.text_embeds + inputs.time_ids.narrow(1, 0, 4) * inputs.timestep.unsqueeze(1);
            row += inputs.encoder_hidden_states.select(1, 2);
            if let Some(cond) = &inputs.timestep_cond {
                row += cond;
            }
            Ok(&inputs.sample * row.unsqueeze(2).unsqueeze(3))
        };
        let whole = forward(&inputs).unwrap();
        let parts = one_by_one(&inputs, 3, &forward).unwrap();
        assert_eq!((parts.size(), rows.get()), (whole.size(), batch / 3));
        assert!(parts.equal(&whole));
    }
}
