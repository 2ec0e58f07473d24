//! The command line as declared: what is accepted and what it becomes.

use clap::CommandFactory;
use sdxl_worker::cli::{
    Attention, ByteSize, Cli, Command, DeviceName, DtypeName, GenerateArgs, LogLevel, Offload, VaeTiling,
};
use serde_json::json;

fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
    Cli::parse_arguments(std::iter::once("sdxl-worker").chain(arguments.iter().copied()).map(Into::into))
}

fn generate(arguments: &[&str]) -> GenerateArgs {
    let cli = parse(&[&["generate"], arguments].concat()).unwrap_or_else(|error| panic!("{error}"));
    match cli.command {
        Some(Command::Generate(arguments)) => *arguments,
        other => panic!("parsed as {other:?}"),
    }
}

#[test]
fn the_declaration_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn engine_options_mean_the_same_before_and_after_a_command() {
    for arguments in [["--device", "cuda:1", "generate"], ["generate", "--device", "cuda:1"]] {
        assert_eq!(parse(&arguments).unwrap().engine.device, [DeviceName::Cuda(1)]);
    }
}

#[test]
fn nothing_typed_leaves_every_choice_open() {
    let cli = parse(&[]).unwrap();
    assert!(cli.command.is_none() && cli.sdk.test_input.is_none());
    assert!(cli.engine.device.is_empty() && cli.engine.dtype.is_none() && cli.engine.memory_limit.is_none());
    assert_eq!(cli.engine.vae_tiling, VaeTiling::Auto);
    assert_eq!(cli.engine.attention, Attention::Auto);
    assert_eq!(cli.engine.offload, Offload::None);
    assert!(generate(&[]).request_fields().is_empty());
    assert_eq!(generate(&[]).output.to_str(), Some("out"));
}

#[test]
fn typed_options_become_request_fields_by_their_canonical_names() {
    let arguments = generate(&[
        "--prompt=a fox",
        "--negative-prompt=",
        "--width=832",
        "--height=1216",
        "--steps=25",
        "--guidance-scale=5.5",
        "--seed=-1",
        "--num-images=2",
        "--scheduler=ddim",
        "--output-format=webp",
        "--set=clip_skip=1",
        "--set=original_size=[1024, 1024]",
        "--set=sigma_schedule=karras",
    ]);
    let expected = json!({
        "prompt": "a fox",
        "negative_prompt": "",
        "width": 832,
        "height": 1216,
        "num_inference_steps": 25,
        "guidance_scale": 5.5,
        "seed": -1,
        "num_images": 2,
        "scheduler": "ddim",
        "output_format": "webp",
        "clip_skip": 1,
        "original_size": [1024, 1024],
        "sigma_schedule": "karras",
    });
    assert_eq!(serde_json::Value::from(arguments.request_fields()), expected);
}

#[test]
fn a_seed_keeps_all_its_digits() {
    assert_eq!(generate(&["--seed", "9223372036854775807"]).request_fields()["seed"], json!(i64::MAX));
}

#[test]
fn set_takes_json_or_a_bare_word_but_no_broken_json() {
    assert_eq!(generate(&["--set", "prompt_2=\"1\""]).request_fields()["prompt_2"], json!("1"));
    assert_eq!(generate(&["--set", "prompt_2=a=b"]).request_fields()["prompt_2"], json!("a=b"));
    assert_eq!(generate(&["--set", "eta=null"]).request_fields()["eta"], json!(null));
    for wrong in ["loras=[{", "=1", "clip_skip", "image=\"open"] {
        let error = parse(&["generate", "--set", wrong]).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{wrong}");
    }
}

#[test]
fn devices_and_number_formats_have_their_usual_names() {
    let device = |name: &str| parse(&["--device", name]).map(|cli| cli.engine.device);
    assert_eq!(device("cuda").unwrap(), [DeviceName::Cuda(0)]);
    assert_eq!(device("MPS").unwrap(), [DeviceName::Mps]);
    assert_eq!(device("cpu").unwrap(), [DeviceName::Cpu]);
    assert_eq!(device("cuda:0,cuda:1").unwrap(), [DeviceName::Cuda(0), DeviceName::Cuda(1)]);
    assert!(device("cpu,").is_err());
    for wrong in ["gpu", "cuda:", "cuda:x", "cuda:-1"] {
        assert!(device(wrong).is_err(), "{wrong}");
    }
    for (name, dtype) in [("fp16", DtypeName::Float16), ("bfloat16", DtypeName::Bfloat16), ("fp32", DtypeName::Float32)]
    {
        assert_eq!(parse(&["--dtype", name]).unwrap().engine.dtype, Some(dtype));
    }
}

#[test]
fn sizes_in_bytes_take_a_suffix() {
    let size = |text: &str| parse(&["--memory-limit", text]).map(|cli| cli.engine.memory_limit.unwrap());
    for text in ["6G", "6g", "6GB", "6 GiB", "6144M", "6442450944"] {
        assert_eq!(size(text).unwrap(), ByteSize(6 << 30), "{text}");
    }
    assert_eq!(size("1.5K").unwrap(), ByteSize(1536));
    for wrong in ["", "G", "6X", "-1G", "0", "inf", "nan", "1e999"] {
        assert!(size(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_log_level_it_does_not_know_does_not_stop_a_worker() {
    let level = |name: &str| parse(&["--log-level", name]).unwrap().engine.log_level;
    assert_eq!(level("DEBUG"), LogLevel::Debug);
    assert_eq!(level("warning"), LogLevel::Warn);
    assert_eq!(level("chatty"), LogLevel::Info);
}

#[test]
fn the_flags_of_runpods_sdk_are_accepted() {
    let cli = parse(&[
        "--sdxl_model_path=/models/sdxl",
        "--rp_log_level=ERROR",
        "--test_input={\"input\": {}}",
        "--rp_serve_api",
        "--rp_api_port=8001",
        "--rp_api_host=0.0.0.0",
        "--rp_api_concurrency=1",
        "--rp_debugger",
    ]);
    let cli = cli.unwrap();
    assert_eq!(cli.engine.model.as_deref(), Some("/models/sdxl"));
    assert_eq!(cli.engine.log_level, LogLevel::Error);
    assert_eq!(cli.sdk.test_input.as_deref(), Some("{\"input\": {}}"));
}

#[test]
fn a_request_comes_from_one_place() {
    let error = parse(&["generate", "--input", "request.json", "--from", "picture.png"]).unwrap_err();
    assert!(error.to_string().contains("cannot be used with"), "{error}");
}
