//! Values and limits, from JSON on, as a caller meets them.

use serde_json::{Value, json};

use super::super::{RefinerBegin, SigmaSchedule, Upscaler, effective_request, parse};
use super::*;

fn limits() -> Limits {
    Limits { models: vec!["base".into(), "anime".into()], ..Limits::default() }
}

/// A request with a prompt and these fields.
fn with(fields: Value) -> Value {
    let mut input = json!({"prompt": "a cat"});
    input.as_object_mut().unwrap().extend(fields.as_object().expect("fields").clone());
    input
}

fn check(input: &Value, limits: &Limits) -> Result<GenerateParams> {
    validate(parse(input)?.0, limits, None)
}

#[track_caller]
fn accepted(fields: Value) -> GenerateParams {
    check(&with(fields.clone()), &limits()).unwrap_or_else(|error| panic!("{fields}: {error}"))
}

#[track_caller]
fn refused(fields: Value, code: &str, field: &str) -> Error {
    let error = check(&with(fields), &limits()).expect_err("the request should be refused");
    assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
    assert!(error.remedy.is_some(), "{error}");
    let class = if code == "too_large" { ErrorClass::TooLarge } else { ErrorClass::InvalidInput };
    assert_eq!(error.class, class);
    error
}

#[test]
fn a_prompt_alone_gets_the_contract_s_defaults() {
    let params = accepted(json!({}));
    let expected = GenerateParams {
        prompt: "a cat".into(),
        prompt_2: None,
        negative_prompt: None,
        negative_prompt_2: None,
        prompt_weighting: PromptWeighting::Off,
        textual_inversions: vec![],
        height: 1024,
        width: 1024,
        num_inference_steps: 30,
        guidance_scale: 5.0,
        guidance_start: 0.0,
        guidance_end: 1.0,
        guidance_rescale: 0.0,
        eta: 0.0,
        seed: params.seed,
        num_images: 1,
        scheduler: None,
        sigma_schedule: None,
        timesteps: None,
        sigmas: None,
        preset: None,
        clip_skip: None,
        original_size: None,
        crops_coords_top_left: None,
        target_size: None,
        negative_original_size: None,
        negative_crops_coords_top_left: None,
        negative_target_size: None,
        init: None,
        controls: vec![],
        scale_mode: ScaleMode::Diffusers,
        loras: vec![],
        denoising_end: None,
        hires: None,
        refiner: None,
        aesthetic_score: 6.0,
        negative_aesthetic_score: 2.5,
        output_format: OutputFormat::Png,
        output_quality: 95,
        embed_metadata: true,
        response_format: ResponseFormat::DataUri,
        preview_every: 0,
    };
    assert_eq!(params, expected);
}

#[test]
fn every_value_reaches_its_parameter() {
    let params = accepted(json!({
        "prompt_2": "b", "negative_prompt": "", "negative_prompt_2": "d", "prompt_weighting": "a1111",
        "textual_inversions": [{"path": "a/b.safetensors", "token": "<é>"}], "width": 64, "height": 128, "steps": 7,
        "guidance_scale": 2.5, "guidance_start": 0.1, "guidance_end": 0.9, "guidance_rescale": 0.25, "eta": 0.5,
        "seed": 9, "num_images": 2, "scheduler": "DDIM",
        "clip_skip": 2, "original_size": [1, 2], "crops_coords_top_left": [3, 4], "target_size": [5, 6],
        "negative_original_size": [7, 8], "negative_crops_coords_top_left": [9, 10], "negative_target_size": [11, 12],
        "output_format": "webp", "output_quality": 80, "embed_metadata": false, "response_format": "b64_json",
    }));
    let expected = GenerateParams {
        prompt: "a cat".into(),
        prompt_2: Some("b".into()),
        negative_prompt: Some("".into()),
        negative_prompt_2: Some("d".into()),
        prompt_weighting: PromptWeighting::A1111,
        textual_inversions: vec![TextualInversionParams {
            source: FileSource::Path("a/b.safetensors".into()),
            sha256: None,
            token: "<é>".into(),
        }],
        height: 128,
        width: 64,
        num_inference_steps: 7,
        guidance_scale: 2.5,
        guidance_start: 0.1,
        guidance_end: 0.9,
        guidance_rescale: 0.25,
        eta: 0.5,
        seed: 9,
        num_images: 2,
        scheduler: Some(SchedulerKind::Ddim),
        sigma_schedule: None,
        timesteps: None,
        sigmas: None,
        preset: None,
        clip_skip: Some(2),
        original_size: Some([1, 2]),
        crops_coords_top_left: Some([3, 4]),
        target_size: Some([5, 6]),
        negative_original_size: Some([7, 8]),
        negative_crops_coords_top_left: Some([9, 10]),
        negative_target_size: Some([11, 12]),
        init: None,
        controls: vec![],
        scale_mode: ScaleMode::Diffusers,
        loras: vec![],
        denoising_end: None,
        hires: None,
        refiner: None,
        aesthetic_score: 6.0,
        negative_aesthetic_score: 2.5,
        output_format: OutputFormat::Webp,
        output_quality: 80,
        embed_metadata: false,
        response_format: ResponseFormat::B64Json,
        preview_every: 0,
    };
    assert_eq!(params, expected);
    assert_eq!(accepted(json!({"sigma_schedule": "Karras"})).sigma_schedule, Some(SigmaSchedule::Karras));
    assert_eq!(accepted(json!({"output_format": "jpeg"})).output_format, OutputFormat::Jpeg);
    accepted(json!({"model": "anime"}));
}

#[test]
fn every_range_is_accepted_at_its_bounds_and_refused_beyond() {
    // (field, the bounds, what lies just beyond)
    let max = i64::MAX;
    let table = [
        ("width", json!([64, 2048]), json!([63, 56, 0, -8, 16_377, 1_000_001, max])),
        ("height", json!([64, 2048]), json!([63, 56, 0, -8, 16_377, 1_000_001, max])),
        ("num_inference_steps", json!([1, 200]), json!([0, -1, 201, max])),
        ("guidance_scale", json!([0, 0.5, 50, 50.0]), json!([-0.01, 50.01, 1e300])),
        ("guidance_start", json!([0, 1]), json!([-0.01, 1.01])),
        ("guidance_end", json!([0, 1]), json!([-0.01, 1.01])),
        ("guidance_rescale", json!([0, 1]), json!([-0.01, 1.01])),
        ("denoising_end", json!([0, 0.5, 1]), json!([-0.01, 1.01])),
        ("seed", json!([-1, 0, max]), json!([-2, i64::MIN])),
        ("eta", json!([0, 1]), json!([-0.01, 1.01])),
        ("num_images", json!([1, 8]), json!([0, -1, 9, max])),
        ("clip_skip", json!([0, 11]), json!([-1, 12])),
        ("output_quality", json!([0, 100]), json!([-1, 101])),
    ];
    for (field, inside, outside) in table {
        for value in inside.as_array().unwrap() {
            accepted(json!({"scheduler": "ddim", field: value}));
        }
        for value in outside.as_array().unwrap() {
            let error = refused(json!({"scheduler": "ddim", field: value}), "out_of_range", field);
            assert!(error.message.ends_with(&format!("got {value}")) || value.is_f64(), "{}", error.message);
        }
    }
    for field in [
        "original_size",
        "crops_coords_top_left",
        "target_size",
        "negative_original_size",
        "negative_crops_coords_top_left",
        "negative_target_size",
    ] {
        accepted(json!({field: [0, 65_536]}));
        refused(json!({field: [-1, 0]}), "out_of_range", &format!("{field}[0]"));
        refused(json!({field: [0, 65_537]}), "out_of_range", &format!("{field}[1]"));
    }
}

#[test]
fn a_range_error_says_bound_value_and_what_would_do() {
    let error = refused(json!({"width": 1_000_001}), "out_of_range", "width");
    assert_eq!(error.message, "`width` must be from 64 to 16376, got 1000001");
    assert_eq!(error.remedy.unwrap(), "the nearest accepted value is 16376");
    let error = refused(json!({"steps": 0}), "out_of_range", "num_inference_steps");
    assert_eq!(error.remedy.unwrap(), "the nearest accepted value is 1");
}

#[test]
fn no_number_that_json_cannot_hold_passes_either() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let request = |request| validate(GenerateRequest { prompt: Some("x".into()), ..request }, &limits(), None);
        for result in [
            request(GenerateRequest { guidance_scale: Some(value), ..Default::default() }),
            request(GenerateRequest { guidance_rescale: Some(value), ..Default::default() }),
            request(GenerateRequest { eta: Some(value), ..Default::default() }),
        ] {
            assert_eq!(result.unwrap_err().code, "out_of_range");
        }
    }
}

#[test]
fn a_side_is_a_multiple_of_eight() {
    for side in [72, 1000, 1016] {
        let params = accepted(json!({"width": side, "height": side}));
        assert_eq!((params.width, params.height), (side, side));
    }
    let error = refused(json!({"height": 1001}), "not_a_multiple", "height");
    assert_eq!(error.message, "`height` must be a multiple of 8, got 1001");
    assert_eq!(error.remedy.unwrap(), "the nearest ones are 1000 and 1008");
    refused(json!({"size": "100x64"}), "not_a_multiple", "width");
}

#[test]
fn the_pixel_budget_holds_for_any_shape() {
    accepted(json!({"width": 2048, "height": 2048}));
    accepted(json!({"width": 16_376, "height": 256}));
    let error = refused(json!({"width": 2056, "height": 2048}), "too_large", "width");
    assert_eq!(error.message, "`width` x `height` must be at most 4194304 pixels, got 2056 x 2048 = 4210688");
    assert_eq!(error.remedy.unwrap(), "the largest square is 2048 x 2048; ask for less");
    refused(json!({"width": 16_376, "height": 16_376}), "too_large", "width");

    let small = Limits { max_pixels: 128 * 128, default_width: 128, default_height: 128, ..limits() };
    assert!(check(&with(json!({"width": 128, "height": 128})), &small).is_ok());
    assert!(check(&with(json!({"height": 64})), &small).is_ok_and(|p| (p.height, p.width) == (64, 128)));
    assert_eq!(check(&with(json!({"width": 136})), &small).unwrap_err().code, "too_large");
}

#[test]
fn the_other_limits_are_the_worker_s() {
    let small = Limits { max_num_images: 2, max_num_inference_steps: 4, max_prompt_chars: 5, ..limits() };
    for (fields, code) in [
        (json!({"num_images": 2, "steps": 4}), None),
        (json!({"num_images": 3}), Some("out_of_range")),
        (json!({"steps": 5}), Some("out_of_range")),
        (json!({"prompt": "éééééé"}), Some("too_large")),
        (json!({"prompt": "ééééé"}), None),
        (json!({"negative_prompt": "123456"}), Some("too_large")),
    ] {
        assert_eq!(check(&with(fields.clone()), &small).err().map(|error| error.code), code, "{fields}");
    }
}

#[test]
fn a_prompt_is_required_and_not_empty() {
    let error = check(&json!({}), &limits()).unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("missing_field", Some("prompt")));
    refused(json!({"prompt": null}), "missing_field", "prompt");
    refused(json!({"prompt": ""}), "empty_prompt", "prompt");
    refused(json!({"prompt": " \n\t"}), "empty_prompt", "prompt");
    assert_eq!(accepted(json!({"prompt": " x "})).prompt, " x ");
    for field in ["prompt", "prompt_2", "negative_prompt", "negative_prompt_2"] {
        accepted(json!({field: "a".repeat(20_000)}));
        refused(json!({field: "a".repeat(20_001)}), "too_large", field);
    }
}

#[test]
fn an_absent_and_an_empty_negative_prompt_stay_two_things() {
    assert_eq!(accepted(json!({})).negative_prompt, None);
    assert_eq!(accepted(json!({"negative_prompt": null})).negative_prompt, None);
    assert_eq!(accepted(json!({"negative_prompt": ""})).negative_prompt.as_deref(), Some(""));
}

#[test]
fn a_random_seed_fits_32_bits_and_differs() {
    let seeds: std::collections::HashSet<u64> = (0..50).map(|_| accepted(json!({})).seed).collect();
    assert!(seeds.len() > 45 && seeds.iter().all(|seed| *seed < 1 << 32));
    assert!(accepted(json!({"seed": -1})).seed < 1 << 32);
    assert_eq!(accepted(json!({"seed": 0})).seed, 0);
    assert_eq!(accepted(json!({"seed": i64::MAX})).seed, i64::MAX as u64);
}

#[test]
fn the_last_image_s_seed_does_not_overflow() {
    accepted(json!({"seed": i64::MAX - 7, "num_images": 8}));
    let error = refused(json!({"seed": i64::MAX - 6, "num_images": 8}), "out_of_range", "seed");
    assert_eq!(error.remedy.unwrap(), format!("the nearest accepted value is {}", i64::MAX - 7));
}

#[test]
fn an_option_that_the_scheduler_has_not_is_refused() {
    let error =
        refused(json!({"scheduler": "ddim", "sigma_schedule": "karras"}), "unsupported_option", "sigma_schedule");
    assert_eq!(error.message, "the scheduler ddim has no `sigma_schedule` karras");
    let error = refused(json!({"scheduler": "K_EULER", "eta": 0.5}), "unsupported_option", "eta");
    assert_eq!(error.message, "the scheduler euler has no `eta`");
    accepted(json!({"scheduler": "euler", "sigma_schedule": "karras", "eta": 0}));
    accepted(json!({"scheduler": "ddim", "eta": 0.5}));

    // Without a scheduler, the model's own decides.
    refused(json!({"eta": 0.5}), "unsupported_option", "eta");
    let ddim = Limits { default_scheduler: SchedulerKind::Ddim, ..limits() };
    assert!(check(&with(json!({"eta": 0.5})), &ddim).is_ok());
    assert_eq!(check(&with(json!({"sigma_schedule": "karras"})), &ddim).unwrap_err().code, "unsupported_option");
    assert!(check(&with(json!({"scheduler": "euler", "sigma_schedule": "karras"})), &ddim).is_ok());
}

#[test]
fn a_word_that_is_none_of_the_accepted_ones_is_answered_with_them() {
    refused(json!({"scheduler": "nonsense"}), "unknown_scheduler", "scheduler");
    refused(json!({"scheduler": "DPM++ 2S a"}), "unsupported_feature", "scheduler");
    refused(json!({"sigma_schedule": "sqrt"}), "invalid_value", "sigma_schedule");
    refused(json!({"response_format": "file"}), "invalid_value", "response_format");
    let error = refused(json!({"output_format": "gif"}), "invalid_value", "output_format");
    assert_eq!(error.message, "`output_format` must be one of png, jpeg, webp, got \"gif\"");
    assert_eq!(error.remedy.unwrap(), "choose one of png, jpeg, webp");
}

#[test]
fn a_model_that_is_not_here_is_answered_with_those_that_are() {
    let error = check(&with(json!({"model": "other"})), &limits()).unwrap_err();
    assert_eq!(
        (error.code, error.class, error.field.as_deref()),
        ("unknown_model", ErrorClass::NotFound, Some("model"))
    );
    assert_eq!(error.remedy.unwrap(), "choose one of base, anime, or leave `model` out");
    let none = Limits { models: vec![], ..limits() };
    assert_eq!(check(&with(json!({"model": "base"})), &none).unwrap_err().code, "unknown_model");
}

#[test]
fn lora_tags_are_text_unless_prompts_are_weighted() {
    let tagged = json!({
        "prompt": "a <lora:ink:0.5>cat", "prompt_2": "<lora:wool> dog", "negative_prompt": "blurry<lora:x>",
        "negative_prompt_2": "<lora:y:2>",
    });
    let params = accepted(tagged.clone());
    assert_eq!(params.prompt, tagged["prompt"].as_str().unwrap());
    for weighting in ["a1111", "compel"] {
        let weighted = |fields: Value| {
            let mut fields = fields;
            fields["prompt_weighting"] = json!(weighting);
            fields
        };
        let with_list = weighted(tagged.clone());
        let params = accepted({
            let mut fields = with_list;
            fields["loras"] = json!([{"path": "a", "scale": 2}]);
            fields
        });
        assert_eq!((params.prompt.as_str(), params.prompt_2.as_deref()), ("a cat", Some(" dog")));
        let found: Vec<_> = params.loras.iter().map(|lora| (lora.source.text(), lora.scale)).collect();
        assert_eq!(found, [("a", 2.0), ("ink", 0.5), ("wool", 1.0)]);
        let params =
            accepted(weighted(json!({"negative_prompt": "blurry<lora:x>", "negative_prompt_2": "<lora:y:2>"})));
        assert_eq!(params.negative_prompt.as_deref(), Some("blurry"));
        assert_eq!(params.negative_prompt_2.as_deref(), Some(""));
    }
    refused(json!({"prompt_weighting": "A1111"}), "invalid_value", "prompt_weighting");
}

#[test]
fn a_textual_inversion_has_a_file_and_a_word() {
    let inversions = |list: Value| json!({"textual_inversions": list});
    for (list, code, field) in [
        (json!([{}]), "missing_field", "textual_inversions[0]"),
        (json!([{"path": "a"}]), "missing_field", "textual_inversions[0].token"),
        (json!([{"token": "a", "name": "x", "url": "x"}]), "conflicting_fields", "textual_inversions[0].url"),
        (json!([{"token": "a", "name": "x", "sha256": "x"}]), "invalid_value", "textual_inversions[0].sha256"),
        (json!([{"path": "a", "token": ""}]), "invalid_value", "textual_inversions[0].token"),
        (json!([{"path": "a", "token": "a b"}]), "invalid_value", "textual_inversions[0].token"),
        (json!([{"path": "a", "token": "x".repeat(65)}]), "invalid_value", "textual_inversions[0].token"),
        (
            json!([{"path": "a", "token": "<x>"}, {"path": "b", "token": "<X>"}]),
            "invalid_value",
            "textual_inversions[1].token",
        ),
        (json!(vec![json!({"path": "a", "token": "a"}); 17]), "too_large", "textual_inversions"),
    ] {
        refused(inversions(list), code, field);
    }
}

#[test]
fn a_value_that_asks_for_nothing_passes() {
    let params = accepted(json!({
        "seed": 1, "guidance_start": 0, "guidance_end": 1, "timesteps": [], "sigmas": [], "mask_blur": 0,
        "prompt_weighting": "off", "textual_inversions": [], "aesthetic_score": 6, "negative_aesthetic_score": 2.5,
        "scale_mode": "diffusers", "controlnets": [], "loras": [], "denoising_start": 0, "denoising_end": 1,
        "stream": false, "preview_every": 0, "enable_hr": false, "init_images": [],
    }));
    assert_eq!(params, accepted(json!({"seed": 1})));
}

#[test]
fn the_first_problem_in_the_contract_s_order_is_reported() {
    let mut fields = json!({
        "response_format": "x", "output_quality": 101, "loras": [{}], "scheduler": "x", "num_images": 0,
        "steps": 0, "height": 1, "width": 1, "prompt": "",
    });
    for (field, code) in [
        ("prompt", "empty_prompt"),
        ("width", "out_of_range"),
        ("height", "out_of_range"),
        ("num_inference_steps", "out_of_range"),
        ("num_images", "out_of_range"),
        ("scheduler", "unknown_scheduler"),
        ("loras[0]", "missing_field"),
        ("output_quality", "out_of_range"),
        ("response_format", "invalid_value"),
    ] {
        refused(fields.clone(), code, field);
        let given = match field {
            "num_inference_steps" => "steps",
            "loras[0]" => "loras",
            field => field,
        };
        fields.as_object_mut().unwrap().remove(given);
    }
    accepted(fields);
}

#[test]
fn the_effective_request_makes_the_same_parameters_without_a_warning() {
    for fields in [
        json!({}),
        json!({"seed": i64::MAX, "scheduler": "DDIM", "eta": 0.5, "negative_prompt": "", "model": "anime"}),
        json!({"sigma_schedule": "karras", "cfg_scale": 7.1, "guidance_rescale": 0.7, "size": "64x72", "n": 1}),
        json!({"scheduler": "DPM++ 2M SDE Karras", "steps": 12}),
        json!({"scheduler": "euler", "sigmas": [14.6, 3.7, 0.1, 0.0]}),
        json!({"scheduler": "heun", "timesteps": [999, 500, 10]}),
        json!({
            "prompt": "«emoji» 🦀 \"quotes\"\n\u{0}", "prompt_2": "b", "negative_prompt_2": "c", "clip_skip": 1,
            "original_size": [1, 2], "crops_coords_top_left": [3, 4], "target_size": [5, 6],
            "negative_original_size": [7, 8], "negative_crops_coords_top_left": [9, 10], "negative_target_size": [0, 1],
            "output_format": "webp", "output_quality": 3,
        }),
        json!({
            "prompt": "a (cat)", "prompt_weighting": "compel", "negative_prompt": "<lora:x>bad",
            "textual_inversions": [{"path": "a.safetensors", "token": "<x>"}, {"path": "b", "token": "y"}],
        }),
    ] {
        let params = accepted(fields);
        let scheduler = params.scheduler.unwrap_or(SchedulerKind::EulerDiscrete);
        let request = effective_request(&params, scheduler, "base");
        let (read, warnings) = parse(&serde_json::from_str(&request.to_string()).unwrap()).unwrap();
        assert_eq!(warnings, Vec::<String>::new());
        let again = validate(read, &limits(), None).unwrap();
        assert_eq!(again, GenerateParams { scheduler: Some(scheduler), ..params });
        assert_eq!(effective_request(&again, scheduler, "base"), request);
    }
}

#[test]
fn each_of_several_images_has_a_request_of_its_own() {
    let params = accepted(json!({"seed": 40, "num_images": 3}));
    for index in 0..3 {
        let request = effective_request(&params.for_image(index), SchedulerKind::EulerDiscrete, "base");
        assert_eq!(request["seed"], json!(40 + index));
        assert_eq!(request["num_images"], json!(1));
    }
}

/// Knuth's generator: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn value(&mut self, depth: usize) -> Value {
        let numbers = [0.0, 1.0, -1.0, 0.5, 8.0, 64.0, 1e30, -1e300, 1e-300, 2f64.powi(63), 2f64.powi(64)];
        let integers = [0, 1, -1, 8, 64, 200, 1024, i64::MAX, i64::MIN];
        let texts = ["", "x", "euler", "ddim", "karras", "png", "64x64", "x64", "é🦀\0", "url", "off", "\u{fffd}"];
        match self.below(if depth == 0 { 6 } else { 8 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(numbers[self.below(numbers.len())]),
            3 => json!(integers[self.below(integers.len())]),
            4 => json!(u64::MAX - self.below(2) as u64),
            5 => json!(texts[self.below(texts.len())]),
            6 => (0..self.below(4)).map(|_| self.value(depth - 1)).collect(),
            _ => self.object(depth - 1),
        }
    }

    fn object(&mut self, depth: usize) -> Value {
        let names: Vec<&str> =
            "prompt prompt negative_prompt width height steps num_inference_steps cfg_scale seed eta n \
            scheduler sampler sigma_schedule timesteps sigmas image init_images model hires enable_hr hr_scale \
            controlnets control_image control_mode loras clip_skip original_size target_size denoising_end refiner \
            refiner_inference_steps output_format output_quality embed_metadata stream response_format size scale mode \
            name path url token preprocess params start end weight strength upscaler"
                .split_whitespace()
                .collect();
        (0..self.below(6)).map(|_| (names[self.below(names.len())].to_owned(), self.value(depth))).collect()
    }
}

#[test]
fn whatever_arrives_is_answered() {
    let mut random = Random(1);
    let (mut codes, mut passed) = (std::collections::BTreeMap::<&str, usize>::new(), 0);
    for _ in 0..20_000 {
        let mut input = random.object(4);
        if random.below(2) == 0 {
            input["prompt"] = json!("a cat");
        }
        match check(&input, &limits()) {
            Ok(params) => {
                passed += 1;
                let pixels = u64::from(params.height) * u64::from(params.width);
                assert!(pixels <= limits().max_pixels && params.height % 8 == 0 && params.width % 8 == 0, "{input}");
            }
            Err(error) => {
                assert!(error.field.is_some() && error.remedy.is_some(), "{input}: {error}");
                *codes.entry(error.code).or_default() += 1;
            }
        }
    }
    assert!(passed > 200, "{passed}");
    assert!(codes.len() >= 10, "{codes:?}");
}

#[test]
fn a_picture_makes_it_image_to_image_and_a_mask_inpainting() {
    let init = |fields| accepted(fields).init.unwrap();
    let plain = init(json!({"image": "x"}));
    assert_eq!((plain.strength, plain.mask), (0.3, None));
    let masked = init(json!({"image": "x", "mask_image": "y", "mask_blur": 4, "padding_mask_crop": 32}));
    assert_eq!(masked.strength, 0.9999);
    assert_eq!(masked.mask, Some(MaskParams { image: String::new(), blur: 4.0, padding_crop: Some(32) }));
    assert_eq!(init(json!({"image": "x", "strength": 1})).strength, 1.0);
    let error = check(&with(json!({"image": "x", "controlnets": [{"image": "y"}]})), &controlled()).unwrap();
    assert_eq!(error.init.unwrap().strength, 0.8);
}

#[test]
fn what_acts_on_a_picture_needs_one() {
    refused(json!({"strength": 0.5}), "missing_field", "image");
    refused(json!({"mask_image": "x"}), "missing_field", "image");
    refused(json!({"image": "x", "mask_blur": 4}), "missing_field", "mask_image");
    refused(json!({"image": "x", "padding_mask_crop": 4}), "missing_field", "mask_image");
    refused(json!({"image": "x", "strength": 1.1}), "out_of_range", "strength");
    refused(json!({"image": "x", "strength": 0}), "out_of_range", "strength");
    let few = refused(json!({"image": "x", "strength": 0.2, "steps": 4}), "out_of_range", "strength");
    assert_eq!(few.remedy.unwrap(), "give `strength` at least 0.25, or more steps");
    refused(json!({"image": "x", "mask_image": "x", "mask_blur": -1}), "out_of_range", "mask_blur");
    let inpainting = Limits { needs_mask: true, ..limits() };
    for (fields, field) in [(json!({}), "image"), (json!({"image": "x"}), "mask_image")] {
        let error = check(&with(fields), &inpainting).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), ("missing_field", Some(field)));
    }
}

#[test]
fn a_picture_gives_the_size_that_the_request_leaves_out() {
    let size = |fields, size| {
        let facts = PictureFacts { size, image: "a".into(), mask_image: String::new(), controls: vec!["b".into()] };
        validate(parse(&with(fields)).unwrap().0, &controlled(), Some(&facts))
            .map(|params| (params.height, params.width))
    };
    assert_eq!(size(json!({"image": "x"}), (517, 771)).unwrap(), (512, 768));
    assert_eq!(size(json!({"image": "x", "width": 640}), (517, 771)).unwrap(), (512, 640));
    assert_eq!(size(json!({"control_image": "x"}), (517, 771)).unwrap(), (512, 768));
    assert_eq!(size(json!({"image": "x", "width": 64, "height": 64}), (9000, 9000)).unwrap(), (64, 64));
    for (fields, picture, code, field) in [
        (json!({"image": "x"}), (32, 512), "out_of_range", "image"),
        (json!({"image": "x"}), (9000, 9000), "too_large", "image"),
        (json!({"control_image": "x"}), (63, 512), "out_of_range", "controlnets[0].image"),
    ] {
        let error = size(fields, picture).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (code, Some(field)));
    }
}

/// A worker with a net of one type, and a union net of six.
fn controlled() -> Limits {
    let net = |name: &str, num_control_type| ControlNetFacts { name: name.into(), num_control_type };
    Limits { controlnets: vec![net("canny", None), net("union", Some(6)), net("promax", Some(8))], ..limits() }
}

#[test]
fn controls_are_read_with_their_net_and_mode() {
    let modes = |model: &str, mode: Value| {
        let fields = json!({"controlnets": [{"image": "x", "model": model, "mode": mode}]});
        check(&with(fields), &controlled()).map(|params| params.controls[0].mode)
    };
    for (mode, number) in [
        (json!(3), 3),
        (json!("canny"), 3),
        (json!("Anime-Lineart"), 3),
        (json!("pose"), 0),
        (json!("scribble"), 2),
        (json!("segmentation"), 5),
        (json!("4"), 4),
    ] {
        assert_eq!(modes("union", mode).unwrap(), Some(number));
    }
    assert_eq!(modes("promax", json!("tile")).unwrap(), Some(6));
    assert_eq!(modes("canny", Value::Null).unwrap(), None);
    assert_eq!(modes("canny", json!("canny")).unwrap(), None);
    for (model, mode, code) in [
        ("union", Value::Null, "missing_field"),
        ("union", json!(6), "unknown_mode"),
        ("union", json!("tile"), "unknown_mode"),
        ("union", json!(-1), "unknown_mode"),
        ("promax", json!(8), "unknown_mode"),
        ("canny", json!("cany"), "unknown_mode"),
    ] {
        let error = modes(model, mode).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (code, Some("controlnets[0].mode")), "{error}");
    }
    let error = modes("union", json!("cany")).unwrap_err();
    assert!(error.remedy.unwrap().ends_with("did you mean canny?"));

    let one = json!({"image": "x", "weight": 0.5, "start": 0.1, "end": 0.9, "guess_mode": true});
    let params = check(&with(json!({"controlnets": [one], "scale_mode": "residual"})), &controlled()).unwrap();
    let control = &params.controls[0];
    assert_eq!((control.model.as_str(), control.scale, control.start, control.end), ("canny", 0.5, 0.1, 0.9));
    assert!(control.guess_mode);
    assert_eq!(params.scale_mode, ScaleMode::Residual);
}

#[test]
fn a_control_that_makes_no_sense_is_refused_with_its_path() {
    for (controls, code, field) in [
        (json!([{"image": "x"}, {}]), "missing_field", "controlnets[1].image"),
        (json!([{"image": "x", "model": "depth"}]), "controlnet_not_available", "controlnets[0].model"),
        (json!([{"image": "x", "scale": -1}]), "out_of_range", "controlnets[0].scale"),
        (json!([{"image": "x", "start": 1.5}]), "out_of_range", "controlnets[0].start"),
        (json!([{"image": "x", "start": 0.5, "end": 0.5}]), "out_of_range", "controlnets[0].end"),
        (json!(vec![json!({"image": "x"}); 20]), "too_large", "controlnets"),
        (
            json!([
                {"image": "x", "model": "union", "mode": 0},
                {"image": "x", "model": "union", "mode": 1, "guess_mode": true},
            ]),
            "invalid_value",
            "controlnets[1].guess_mode",
        ),
    ] {
        let error = check(&with(json!({"controlnets": controls})), &controlled()).unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
        assert!(error.remedy.is_some());
    }
    let error = check(&with(json!({"control_image": "x"})), &limits()).unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("controlnet_not_available", Some("controlnets[0].model")));
    assert_eq!(error.remedy.unwrap(), "start the worker with --controlnet NAME=DIR (CONTROLNETS)");
}

fn with_refiner() -> Limits {
    Limits { refiners: vec!["refiner".into(), "other".into()], ..limits() }
}

#[test]
fn a_refiner_takes_over_where_the_base_model_ends_or_goes_over_its_result() {
    let begin = |fields: Value| check(&with(fields), &with_refiner()).unwrap().refiner.unwrap().begin;
    assert_eq!(begin(json!({"refiner": {}, "denoising_end": 0.8})), RefinerBegin::At(0.8));
    assert_eq!(begin(json!({"refiner": {}, "denoising_end": 0.8, "denoising_start": 0.7})), RefinerBegin::At(0.7));
    assert_eq!(begin(json!({"refiner": {}})), RefinerBegin::Strength(0.3));
    assert_eq!(begin(json!({"refiner": {}, "strength": 0.5})), RefinerBegin::Strength(0.5));
    let both = check(&with(json!({"refiner": {}, "image": "x", "strength": 0.5})), &with_refiner()).unwrap();
    assert_eq!((both.init.unwrap().strength, both.refiner.unwrap().begin), (0.5, RefinerBegin::Strength(0.3)));
    let flat = json!({"refiner_inference_steps": 50, "high_noise_frac": 0.8, "steps": 40});
    let params = check(&with(flat), &with_refiner()).unwrap();
    assert_eq!((params.denoising_end, params.refiner.unwrap().num_inference_steps), (Some(0.8), 50));
}

#[test]
fn a_refiner_that_is_not_there_is_named() {
    let code = |fields: Value, limits: &Limits| {
        let error = check(&with(fields), limits).unwrap_err();
        (error.code, error.field.unwrap(), error.remedy.is_some())
    };
    assert_eq!(code(json!({"refiner": {}}), &limits()), ("refiner_not_available", "refiner".into(), true));
    let unknown = json!({"refiner": {"model": "refine"}});
    assert_eq!(code(unknown, &with_refiner()), ("refiner_not_available", "refiner.model".into(), true));
    refused(json!({"aesthetic_score": 5}), "unsupported_option", "aesthetic_score");
    check(&with(json!({"refiner": {}, "aesthetic_score": 5})), &with_refiner()).unwrap();
    let inpainting = Limits { needs_mask: true, ..with_refiner() };
    let fields = json!({"refiner": {}, "image": "x", "mask_image": "x"});
    assert_eq!(code(fields, &inpainting), ("unsupported_option", "refiner".into(), true));
}

#[test]
fn a_part_of_the_run_needs_a_picture_to_begin_with() {
    refused(json!({"denoising_start": 0.8}), "missing_field", "image");
    refused(json!({"image": "x", "denoising_start": 0.8, "denoising_end": 0.8}), "out_of_range", "denoising_start");
    let init = accepted(json!({"image": "x", "denoising_start": 0.8, "strength": 0})).init.unwrap();
    assert_eq!(init.denoising_start, Some(0.8));
    let refiner = Limits { needs_image: true, ..limits() };
    let error = check(&with(json!({})), &refiner).unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("missing_field", Some("image")));
    check(&with(json!({"image": "x", "aesthetic_score": 5})), &refiner).unwrap();
}

#[test]
fn a_second_pass_is_as_large_as_the_limits_allow() {
    let hires = |fields: Value| accepted(json!({"width": 512, "height": 768, "hires": fields})).hires.unwrap();
    let default = hires(json!({}));
    assert_eq!((default.height, default.width, default.num_inference_steps), (1536, 1024, 30));
    assert_eq!((default.strength, default.upscaler), (0.7, Upscaler::Latent));
    let small = hires(json!({"scale": 1.26, "steps": 12, "strength": 0.5, "upscaler": "Latent (bicubic)"}));
    assert_eq!((small.height, small.width, small.num_inference_steps), (960, 640, 12));
    assert_eq!((small.strength, small.upscaler), (0.5, Upscaler::LatentBicubic));
    refused(json!({"hires": {"scale": 3}}), "too_large", "hires.scale");
    refused(json!({"hires": {"scale": 0.5}}), "out_of_range", "hires.scale");
    refused(json!({"hires": {"strength": 0.1, "steps": 5}}), "out_of_range", "hires.strength");
    refused(json!({"hires": {"upscaler": "esrgan"}}), "invalid_value", "hires.upscaler");
    refused(json!({"hires": {}, "image": "x"}), "unsupported_option", "hires");
}

#[test]
fn a_preset_fills_in_what_the_request_leaves_open() {
    let params = accepted(json!({"preset": "lightning"}));
    assert_eq!((params.num_inference_steps, params.guidance_scale), (4, 1.0));
    assert_eq!(params.scheduler, Some(SchedulerKind::EulerDiscrete));
    let own = accepted(json!({"preset": "Lightning", "steps": 8, "guidance_scale": 2, "scheduler": "ddim"}));
    assert_eq!((own.num_inference_steps, own.guidance_scale, own.scheduler), (8, 2.0, Some(SchedulerKind::Ddim)));
    let one = accepted(json!({"preset": "hyper", "steps": 1}));
    assert_eq!((one.scheduler, one.timesteps), (Some(SchedulerKind::Lcm), Some(vec![800])));
    refused(json!({"preset": "fast"}), "invalid_value", "preset");
}

#[test]
fn the_model_s_own_preset_acts_unless_the_request_says_none() {
    let lcm = Limits { preset: Some(Preset::Lcm), has_embedded_guidance: true, ..limits() };
    let params = check(&with(json!({})), &lcm).unwrap();
    assert_eq!((params.num_inference_steps, params.guidance_scale, params.scheduler), (4, 8.0, None));
    let params = check(&with(json!({"preset": "none"})), &lcm).unwrap();
    assert_eq!((params.num_inference_steps, params.guidance_scale, params.preset), (30, 5.0, None));
}

#[test]
fn what_runs_after_the_first_pass_is_in_the_record() {
    let fields = json!({"refiner": {"model": "other"}, "denoising_end": 0.8, "hires": {"scale": 1.5}, "preset": "turbo",
        "guidance_end": 0.5, "aesthetic_score": 7, "seed": 1, "steps": 4});
    let params = check(&with(fields), &with_refiner()).unwrap();
    let record = effective_request(&params, params.scheduler.unwrap(), "base");
    let mut again = check(&record, &with_refiner()).unwrap();
    again.scheduler = params.scheduler;
    assert_eq!(again, params);
}
