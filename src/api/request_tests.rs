//! Names and JSON types, over the tables of `schema` themselves, so that a new field is tested by being there.

use serde_json::json;

use super::schema::{Field, Kind};
use super::*;

fn read(input: Value) -> GenerateRequest {
    parse(&input).unwrap_or_else(|error| panic!("{input}: {error}")).0
}

#[track_caller]
fn refused(input: Value, code: &str, field: &str) -> Error {
    let error = parse(&input).expect_err("the request should be refused");
    assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
    assert!(error.remedy.is_some(), "{error}");
    error
}

/// A value of the right type.
fn example(kind: &Kind) -> Value {
    match kind {
        Kind::Text => json!("x"),
        Kind::Integer | Kind::IntegerOrText => json!(8),
        Kind::Number => json!(0.5),
        Kind::Boolean => json!(true),
        Kind::IntegerPair => json!([1, 2]),
        Kind::Integers => json!([3]),
        Kind::Numbers => json!([1.5]),
        Kind::AnyObject => json!({"any": ["thing"]}),
        Kind::Object(fields) => every_field(fields),
        Kind::Objects(fields) => json!([every_field(fields)]),
    }
}

fn every_field(fields: &[Field]) -> Value {
    fields.iter().map(|field| (field.name.to_owned(), example(&field.kind))).collect::<Map<_, _>>().into()
}

#[test]
fn every_field_of_the_tables_is_a_field_of_the_request() {
    let input = every_field(REQUEST);
    let (request, warnings) = parse(&input).unwrap();
    assert!(warnings.is_empty());
    // Nothing got lost: no field of the struct is still at its default.
    let shown = format!("{request:?}");
    assert!(!shown.contains("None") && !shown.contains("[]"), "{shown}");
    assert_eq!(shown.matches("Some(").count(), count_values(&input) - 3, "{shown}"); // three lists without `Some`
}

fn count_values(value: &Value) -> usize {
    let fields = value.as_object().expect("an object");
    let nested = |value: &Value| match value {
        Value::Array(items) => items.iter().filter(|item| item.is_object()).map(count_values).sum(),
        Value::Object(object) if object.contains_key("any") => 0,
        Value::Object(_) => count_values(value),
        _ => 0,
    };
    fields.len() + fields.values().map(nested).sum::<usize>()
}

#[test]
fn an_alias_is_read_as_its_field_with_one_warning() {
    for field in REQUEST {
        for alias in field.aliases {
            let (request, warnings) = parse(&json!({*alias: example(&field.kind)})).unwrap();
            assert_eq!(request, read(json!({field.name: example(&field.kind)})), "{alias}");
            assert_eq!(warnings, [format!("`{alias}` was read as `{}`", field.name)]);
        }
    }
    for field in REQUEST {
        let (Kind::Objects(inner), name) = (&field.kind, field.name) else {
            continue;
        };
        for inner in *inner {
            for alias in inner.aliases {
                let (request, warnings) = parse(&json!({name: [{}, {*alias: example(&inner.kind)}]})).unwrap();
                assert_eq!(request, read(json!({name: [{}, {inner.name: example(&inner.kind)}]})), "{alias}");
                assert_eq!(warnings, [format!("`{name}[1].{alias}` was read as `{name}[1].{}`", inner.name)]);
            }
        }
    }
}

#[test]
fn the_contract_s_aliases_are_all_there() {
    let pairs = [
        ("steps", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("num_images_per_prompt", "num_images"),
        ("num_outputs", "num_images"),
        ("n", "num_images"),
        ("batch_size", "num_images"),
        ("sampler", "scheduler"),
        ("sampler_name", "scheduler"),
        ("image_url", "image"),
        ("init_image", "image"),
        ("mask", "mask_image"),
        ("prompt_strength", "strength"),
        ("denoising_strength", "strength"),
        ("high_noise_frac", "denoising_end"),
        ("output_compression", "output_quality"),
        ("stream_progress", "stream"),
    ];
    let listed: Vec<_> = REQUEST.iter().flat_map(|f| f.aliases.iter().map(|alias| (*alias, f.name))).collect();
    assert_eq!(listed.len(), pairs.len());
    for pair in pairs {
        assert!(listed.contains(&pair), "{pair:?}");
    }
    assert_eq!(read(json!({"loras": [{"weight": 0.5}, {"multiplier": 0.5}, {"strength": 0.5}]})).loras.len(), 3);
}

#[test]
fn the_flat_control_form_is_one_entry_of_controlnets() {
    let (request, warnings) = parse(&json!({
        "control_image": "map", "control_mode": "canny", "controlnet_conditioning_scale": 0.7,
        "control_guidance_start": 0.1, "control_guidance_end": 0.9,
    }))
    .unwrap();
    let entry = json!({"image": "map", "mode": "canny", "scale": 0.7, "start": 0.1, "end": 0.9});
    assert_eq!(request, read(json!({"controlnets": [entry]})));
    assert_eq!(warnings.len(), 5);
    assert_eq!(warnings[0], "`control_image` was read as `controlnets[0].image`");
    assert_eq!(read(json!({"control_mode": 3})).controlnets[0].mode, Some(NumberOrName::Number(3)));

    refused(json!({"controlnets": [], "control_image": "map"}), "conflicting_fields", "control_image");
    refused(json!({"control_image": ["a", "b"]}), "invalid_type", "control_image");
    let (request, warnings) = parse(&json!({"control_image": null, "control_mode": null})).unwrap();
    assert!(request.controlnets.is_empty() && warnings.is_empty());
}

#[test]
fn worker_sdxl_s_refiner_steps_are_a_refiner() {
    let (request, warnings) = parse(&json!({"refiner_inference_steps": 50, "high_noise_frac": 0.8})).unwrap();
    assert_eq!(request, read(json!({"refiner": {"num_inference_steps": 50}, "denoising_end": 0.8})));
    assert_eq!(warnings[1], "`refiner_inference_steps` was read as `refiner.num_inference_steps`");
    refused(json!({"refiner": {}, "refiner_inference_steps": 5}), "conflicting_fields", "refiner_inference_steps");
}

#[test]
fn a1111_s_hires_fields_act_only_when_enabled() {
    let fields = json!({"hr_scale": 2, "hr_strength": 0.5, "hr_upscaler": "Latent", "hr_second_pass_steps": 9});
    let mut enabled = fields.clone();
    enabled["enable_hr"] = json!(true);
    let (request, warnings) = parse(&enabled).unwrap();
    let hires = json!({"scale": 2, "strength": 0.5, "upscaler": "Latent", "steps": 9});
    assert_eq!(request, read(json!({"hires": hires})));
    assert_eq!(warnings[0], "`enable_hr` was read as `hires`");
    assert_eq!(warnings.len(), 5);

    let mut disabled = fields.clone();
    disabled["enable_hr"] = json!(false);
    for input in [fields, disabled] {
        let (request, warnings) = parse(&input).unwrap();
        assert_eq!(request.hires, None);
        assert_eq!(warnings, ["`hr_...` fields do nothing without `enable_hr: true`"]);
    }
    assert_eq!(read(json!({"enable_hr": true})).hires, Some(HiresRequest::default()));
    assert_eq!(parse(&json!({"enable_hr": false})).unwrap(), Default::default());
    refused(json!({"enable_hr": 1}), "invalid_type", "enable_hr");
    refused(json!({"enable_hr": true, "hires": {}}), "conflicting_fields", "enable_hr");
    refused(json!({"enable_hr": true, "hr_scale": "2"}), "invalid_type", "hr_scale");
}

#[test]
fn size_is_width_times_height() {
    for size in ["1024x768", "1024X768", " 1024 x 768 "] {
        let (request, warnings) = parse(&json!({"size": size})).unwrap();
        assert_eq!((request.width, request.height), (Some(1024), Some(768)), "{size}");
        assert_eq!(warnings, ["`size` was read as `width` and `height`"]);
    }
    for size in ["", "x", "1024", "1024x", "x768", "1024x768x3", "-8x8", "auto", "8.5x8", "99999999999x8"] {
        refused(json!({"size": size}), "invalid_value", "size");
    }
    refused(json!({"size": 1024}), "invalid_type", "size");
    refused(json!({"size": "64x64", "width": 64}), "conflicting_fields", "size");
    refused(json!({"size": "64x64", "height": 64}), "conflicting_fields", "size");
}

#[test]
fn init_images_holds_one_image() {
    let (request, warnings) = parse(&json!({"init_images": ["a"]})).unwrap();
    assert_eq!(request.image.as_deref(), Some("a"));
    assert_eq!(warnings, ["`init_images[0]` was read as `image`"]);
    assert_eq!(parse(&json!({"init_images": []})).unwrap(), Default::default());
    refused(json!({"init_images": ["a", "b"]}), "invalid_value", "init_images");
    refused(json!({"init_images": "a"}), "invalid_type", "init_images");
    refused(json!({"init_images": [1]}), "invalid_type", "init_images[0]");
    refused(json!({"init_images": ["a"], "image": "b"}), "conflicting_fields", "init_images");
}

#[test]
fn two_names_for_one_field_conflict() {
    let error = refused(json!({"steps": 3, "num_inference_steps": 3}), "conflicting_fields", "steps");
    assert_eq!(error.message, "`num_inference_steps` and `steps` mean the same field and are both given");
    assert_eq!(error.remedy.as_deref(), Some("leave out `steps`"));
    refused(json!({"n": 1, "batch_size": 1}), "conflicting_fields", "batch_size");
    refused(json!({"loras": [{"scale": 1, "weight": 1}]}), "conflicting_fields", "loras[0].weight");
    assert_eq!(read(json!({"steps": 3, "num_inference_steps": null})).num_inference_steps, Some(3));
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_name() {
    for (key, nearest) in [
        ("promt", "prompt"),
        ("guidence_scale", "guidance_scale"),
        ("guidanceScale", "guidance_scale"),
        ("sede", "seed"),
        ("WIDTH", "width"),
        ("widht", "width"),
        ("num_inference_step", "num_inference_steps"),
        ("lora", "loras"),
        ("contolnets", "controlnets"),
        ("control_images", "control_image"),
        ("negativeprompt", "negative_prompt"),
        ("enable_hires", "enable_hr"),
    ] {
        let error = refused(json!({"prompt": "x", key: 1}), "unknown_field", key);
        assert_eq!(error.message, format!("`{key}` is not a field of the request"));
        assert_eq!(error.remedy, Some(format!("the nearest known field is `{nearest}`")));
    }
    // Unknown with `null` too: a name that does not exist is a mistake whatever its value.
    refused(json!({"promt": null}), "unknown_field", "promt");
    refused(json!({"": 1}), "unknown_field", "");
}

#[test]
fn an_unknown_key_in_a_nested_object_is_named_with_its_path() {
    for (input, path, nearest) in [
        (json!({"controlnets": [{"sclae": 1}]}), "controlnets[0].sclae", "scale"),
        (json!({"controlnets": [{}, {"preprocess": {"nam": 1}}]}), "controlnets[1].preprocess.nam", "name"),
        (json!({"loras": [{"wieght": 1}]}), "loras[0].wieght", "weight"),
        (json!({"hires": {"upscaller": 1}}), "hires.upscaller", "upscaler"),
        (json!({"refiner": {"modl": 1}}), "refiner.modl", "model"),
        (json!({"textual_inversions": [{"tokn": 1}]}), "textual_inversions[0].tokn", "token"),
    ] {
        let error = refused(input, "unknown_field", path);
        assert_eq!(error.remedy, Some(format!("the nearest known field is `{nearest}`")));
    }
    // What a preprocessor takes is its own matter.
    read(json!({"controlnets": [{"preprocess": {"name": "canny", "params": {"low": 1}}}]}));
}

#[test]
fn null_equals_absent() {
    let nulls: Map<_, _> = schema::names(REQUEST)
        .chain(FLAT.iter().map(|flat| flat.name))
        .chain(SPECIAL.iter().copied())
        .map(|name| (name.to_owned(), Value::Null))
        .collect();
    assert_eq!(parse(&nulls.into()).unwrap(), Default::default());
    assert_eq!(read(json!({"loras": [{"scale": null}]})).loras, [LoraRequest::default()]);
}

#[test]
fn a_value_of_another_type_is_refused_with_both_types() {
    let values = [json!("x"), json!(8), json!(0.5), json!(true), json!([[]]), json!({"any": 1})];
    for field in REQUEST {
        for value in &values {
            let fits = match (&field.kind, value) {
                (Kind::Text, Value::String(_)) | (Kind::Number, Value::Number(_)) | (Kind::Boolean, Value::Bool(_)) => {
                    true
                }
                (Kind::Integer, Value::Number(number)) => number.is_i64(),
                _ => false,
            };
            let Err(error) = parse(&json!({field.name: value})) else {
                assert!(fits, "{} took {value}", field.name);
                continue;
            };
            assert!(!fits, "{error}");
            let inside =
                ["unknown_field", "invalid_type"].contains(&error.code) && (value.is_array() || value.is_object());
            assert!(error.code == "invalid_type" || inside, "{error}");
            assert!(error.field.as_deref().unwrap().starts_with(field.name), "{error}");
        }
    }
    let error = refused(json!({"steps": "30"}), "invalid_type", "steps");
    assert_eq!(error.message, "`steps` must be an integer, got the string \"30\"");
    let error = refused(json!({"prompt": ["a"]}), "invalid_type", "prompt");
    assert_eq!(error.message, "`prompt` must be a string, got a list of 1");
    refused(json!({"loras": {"name": "x"}}), "invalid_type", "loras");
    refused(json!({"loras": ["x"]}), "invalid_type", "loras[0]");
    refused(json!({"loras": [null]}), "invalid_type", "loras[0]");
    refused(json!({"loras": [{"scale": "1"}]}), "invalid_type", "loras[0].scale");
    refused(json!({"original_size": [1, 2, 3]}), "invalid_type", "original_size");
    refused(json!({"original_size": [1, 2.5]}), "invalid_type", "original_size[1]");
    refused(json!({"timesteps": [1, "2"]}), "invalid_type", "timesteps[1]");
    refused(json!({"sigmas": [null]}), "invalid_type", "sigmas[0]");
    refused(json!({"controlnets": [{"mode": true}]}), "invalid_type", "controlnets[0].mode");
    for input in [json!(null), json!([]), json!("x"), json!(1)] {
        refused(input, "invalid_type", "input");
    }
}

#[test]
fn an_integer_may_be_written_as_a_float_without_a_fraction() {
    assert_eq!(read(json!({"steps": 30.0})).num_inference_steps, Some(30));
    assert_eq!(read(json!({"seed": -1.0})).seed, Some(-1));
    assert_eq!(read(json!({"seed": i64::MAX})).seed, Some(i64::MAX));
    refused(json!({"steps": 30.5}), "invalid_type", "steps");
    refused(json!({"seed": u64::MAX}), "out_of_range", "seed");
    refused(json!({"seed": 9_223_372_036_854_775_808_u64}), "out_of_range", "seed");
    refused(json!({"width": 1e30}), "out_of_range", "width");
    refused(json!({"width": -1e30}), "out_of_range", "width");
}

#[test]
fn what_a_caller_sent_is_repeated_in_part_only() {
    let long = "é".repeat(1_000_000);
    for input in [json!({"steps": long}), json!({long.as_str(): 1}), json!({"size": long})] {
        let error = parse(&input).unwrap_err();
        assert!(error.to_string().len() < 1000, "{}", error.to_string().len());
    }
}

#[test]
fn deep_json_is_an_answer_and_not_a_stack_overflow() {
    let deep = |depth| format!("{}1{}", "[".repeat(depth), "]".repeat(depth));
    assert!(serde_json::from_str::<Value>(&deep(100_000)).is_err());
    let deepest: Value = serde_json::from_str(&deep(120)).unwrap();
    refused(json!({"loras": deepest}), "invalid_type", "loras[0]");
    read(json!({"controlnets": [{"preprocess": {"params": {"any": deepest}}}]}));
}
