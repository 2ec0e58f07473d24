//! The command line, declared once: flag, environment variable and help text of each option stand together.
//!
//! Declaration only. Nothing here touches libtorch or judges a request, because two programs compile this file: the
//! launcher, which must answer `--help` on a machine without libtorch, and the engine, which does the work.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Arg, Args, Command as ClapCommand, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};

/// The model used when none is named: a small one in the repository, looked for from here and from the program upwards.
pub const DEFAULT_MODEL: &str = "models/demo";
/// The graphs used when none are named, looked for like [`DEFAULT_MODEL`].
pub const DEFAULT_GRAPHS: &str = "graphs";

const ABOUT: &str = "\
Stable Diffusion XL on libtorch: makes pictures from prompts.
Without a command it is a RunPod worker where RUNPOD_WEBHOOK_GET_JOB is set; elsewhere it runs ./test_input.json once
and prints the reply as JSON on standard output.";

const EXAMPLES: &str = "\
Examples:
  sdxl-worker generate --prompt \"a red fox in the snow\" --seed 7
      one picture into ./out with the default model
  sdxl-worker generate --model /models/sdxl --graphs /models/graphs --input request.json
      a whole request from a file; options given beside it win over the file
  sdxl-worker generate --from out/picture.png --num-images 4
      the same picture again, from the parameters stored in it, and three more
  sdxl-worker fetch --model stabilityai/stable-diffusion-xl-base-1.0
      into the Hub's cache, with what is missing alone
  sdxl-worker doctor
      what works on this machine and what to do about the rest
  sdxl-worker serve --port 8000
      RunPod's endpoint API on this machine: POST /run, GET /status/<id>, ...
  sdxl-worker
      runs ./test_input.json once and prints the reply as JSON

Exit status:
  0 done   1 failed   2 bad input or usage   3 installation incomplete   130 cancelled
  Without a command: 0 or 1, as with RunPod's SDK.
  On failure stderr ends with the error as one JSON object, unless it is a terminal.";

const GENERATE_EXAMPLES: &str = "\
Examples:
  sdxl-worker generate --prompt \"a lighthouse at dusk\" --steps 30 --guidance-scale 6 --output pictures
  sdxl-worker generate --input request.json --seed 42
  echo '{\"prompt\": \"a lighthouse\"}' | sdxl-worker generate --input -
  sdxl-worker generate --prompt \"a lighthouse\" --set clip_skip=1 --set 'original_size=[1024,1024]'";

/// What was typed.
#[derive(Debug, Parser)]
#[command(
    name = "sdxl-worker",
    bin_name = "sdxl-worker",
    version,
    about = ABOUT,
    long_about = None,
    max_term_width = 110,
    disable_help_subcommand = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub sdk: SdkArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make pictures and write them into a folder
    Generate(Box<GenerateArgs>),
    /// Serve RunPod's endpoint API on this machine
    Serve(ServeArgs),
    /// Turn a photo into a control map and write it as a PNG: canny, scribble, softedge, lineart, tile or invert
    Preprocess(PreprocessArgs),
    /// Fetch the model, and what else is named, into the cache ahead of time; without the network, say what is there
    Fetch,
    /// Check device, libtorch, graphs and weights: what works and what to do about the rest
    Doctor(DoctorArgs),
    /// Read a JSON list of strings on standard input and print the token ids of both tokenizers
    #[command(hide = true)]
    Tokenize,
    /// Run one request several times in one process and print each reply's timings as a line of JSON
    #[command(hide = true)]
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Also make one picture of one step, and say how long each phase of the start took
    #[arg(long)]
    pub timing: bool,
}

/// Which model runs, and on what. Accepted before and after any command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine options")]
pub struct EngineArgs {
    /// Model: a folder in the diffusers layout, a .safetensors file, or org/name[@revision][/file] of the Hub [default: the
    /// project's models/demo]
    #[arg(long, global = true, env = "MODEL_ID", value_name = "PATH|HUB_ID", alias = "sdxl_model_path")]
    pub model: Option<String>,
    /// Folder with configuration and tokenizers for a .safetensors file that is not of SDXL's published architectures
    #[arg(long, global = true, env = "MODEL_CONFIG", value_name = "DIR")]
    pub model_config: Option<PathBuf>,
    /// A VAE in place of the model's own: a folder, a .safetensors file, or a repository of the Hub
    #[arg(long, global = true, env = "VAE_ID", value_name = "PATH|HUB_ID")]
    pub vae: Option<String>,
    /// Folder of exported graphs with its manifest.json [default: the project's graphs]
    #[arg(long, global = true, env = "GRAPHS", value_name = "DIR")]
    pub graphs: Option<PathBuf>,
    /// cuda, cuda:N, mps or cpu; several, such as cuda:0,cuda:1, work side by side [default: the first that works]
    #[arg(long, global = true, env = "DEVICE", value_delimiter = ',')]
    pub device: Vec<DeviceName>,
    /// Number format of weights and computation [default: float16 on cuda, else float32]
    #[arg(long, global = true, env = "DTYPE", value_enum)]
    pub dtype: Option<DtypeName>,
    /// Number format of the VAE [default: --dtype, but float32 for a model that says force_upcast]
    #[arg(long, global = true, env = "VAE_DTYPE", value_enum)]
    pub vae_dtype: Option<DtypeName>,
    /// Which weight files to read: `fp16` reads *.fp16.safetensors where they exist
    #[arg(long, global = true, env = "VARIANT")]
    pub variant: Option<String>,
    /// CPU threads for computation, shared out between the devices [default: one per core]
    #[arg(long, global = true, env = "THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Largest picture a request may ask for, in pixels (width x height)
    #[arg(long, global = true, env = "MAX_PIXELS", value_name = "N", default_value_t = 4_194_304)]
    pub max_pixels: u64,
    /// Most pictures a request may ask for
    #[arg(long, global = true, env = "MAX_NUM_IMAGES", value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_images: u32,
    /// A ControlNet and the name that requests give it (repeatable; the first is the default) [default: the folders in
    /// the model's own `controlnets`]
    #[arg(long, global = true, env = "CONTROLNETS", value_name = "NAME=DIR|HUB_ID", value_delimiter = ',')]
    pub controlnet: Vec<NamedDir>,
    /// Load the ControlNets at start rather than when a request first asks for one
    #[arg(long, global = true, env = "PRELOAD_CONTROLNETS", value_name = "BOOL", num_args = 0..=1,
          default_value_t = false, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    pub preload_controlnets: bool,
    /// Keep at most this many bytes of ControlNets loaded; those used longest ago make room
    #[arg(long, global = true, env = "CONTROLNET_MEMORY", value_name = "BYTES", default_value = "8G")]
    pub controlnet_memory: ByteSize,
    /// On CUDA, keep this many UNet and ControlNet calls as CUDA graphs, one for each size and batch; 0 captures none
    #[arg(long, global = true, env = "CUDA_GRAPHS", value_name = "N", default_value_t = 8)]
    pub cuda_graphs: usize,
    /// Most images of concurrent jobs in one call of the UNet; 1 runs one job after the other
    #[arg(long, global = true, env = "MAX_BATCH", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..))]
    pub max_batch: u16,
    /// A refiner, and the name that requests give it: by default its folder's (repeatable; the first is the default)
    #[arg(long, global = true, env = "REFINER_ID", value_name = "[NAME=]DIR|HUB_ID", value_delimiter = ',',
          value_parser = NamedDir::maybe_named)]
    pub refiner: Vec<NamedDir>,
    /// Most controls a request may ask for
    #[arg(long, global = true, env = "MAX_CONTROLS", value_name = "N", default_value_t = 8)]
    pub max_controls: usize,
    /// Folder of LoRA files that requests name (repeatable) [default: the model's own `loras`]
    #[arg(long, global = true, env = "LORA_DIR", value_name = "DIR", value_delimiter = ',')]
    pub lora_dir: Vec<PathBuf>,
    /// Folder of textual inversions that requests name (repeatable)
    #[arg(long, global = true, env = "EMBEDDING_DIR", value_name = "DIR", value_delimiter = ',')]
    pub embedding_dir: Vec<PathBuf>,
    /// Most LoRAs a request may ask for
    #[arg(long, global = true, env = "MAX_LORAS", value_name = "N", default_value_t = 16)]
    pub max_loras: usize,
    /// Refuse LoRA files larger than this
    #[arg(long, global = true, env = "MAX_LORA_BYTES", value_name = "BYTES", default_value = "4G")]
    pub max_lora_bytes: ByteSize,
    /// Keep at most this many bytes of LoRA files in memory; those used longest ago make room
    #[arg(long, global = true, env = "LORA_MEMORY", value_name = "BYTES", default_value = "1G")]
    pub lora_memory: ByteSize,
    /// Where weights come from when a LoRA is taken out of them: read the checkpoint's file again, or a copy on the device
    #[arg(long, global = true, env = "LORA_BACKUP", value_enum, default_value_t = LoraBackup::File)]
    pub lora_backup: LoraBackup,
    /// Where a network volume is mounted: models and adapters are kept there, where there is one
    #[arg(long, global = true, env = "NETWORK_VOLUME", value_name = "DIR", default_value = "/runpod-volume")]
    pub network_volume: PathBuf,
    /// Folder for downloaded adapters [default: on the network volume where there is one, else ~/.cache/sdxl-worker/adapters]
    #[arg(long, global = true, env = "ADAPTER_CACHE", value_name = "DIR")]
    pub adapter_cache: Option<PathBuf>,
    /// Keep at most this many bytes of downloaded adapters on the disk; those used longest ago make room
    #[arg(long, global = true, env = "LORA_CACHE", value_name = "BYTES", default_value = "20G")]
    pub lora_cache: ByteSize,
    /// Refuse requests that would need more memory, such as 6G [default: what the machine or container allows]
    #[arg(long, global = true, env = "MEMORY_LIMIT", value_name = "BYTES")]
    pub memory_limit: Option<ByteSize>,
    /// Decode pictures in tiles, which takes less memory; auto: only large ones, and others when memory runs out
    #[arg(long, global = true, env = "VAE_TILING", value_enum, default_value_t = VaeTiling::Auto)]
    pub vae_tiling: VaeTiling,
    /// Pixels (width x height) above which `--vae-tiling auto` uses tiles
    #[arg(long, global = true, env = "VAE_TILING_PIXELS", value_name = "N", default_value_t = 2_359_296)]
    pub vae_tiling_pixels: u64,
    /// What leaves the device while it does not compute: for small cards; comes back from the weight files
    #[arg(long, global = true, env = "OFFLOAD", value_enum, default_value_t = Offload::None)]
    pub offload: Offload,
    /// Attention kernels on cuda; auto leaves the choice to libtorch, fastest tries them when the model is loaded
    #[arg(long, global = true, env = "ATTENTION", value_enum, default_value_t = Attention::Auto)]
    pub attention: Attention,
    /// Let cuDNN try its convolution kernels at each new size, which takes time and memory there, and keep the fastest
    #[arg(long, global = true, env = "CUDNN_BENCHMARK")]
    pub cudnn_benchmark: bool,
    /// Encode the next job's prompt while the device works on the last step of this one; auto: on cuda
    #[arg(long, global = true, env = "ENCODE_AHEAD", value_enum, default_value_t = Switch::Auto)]
    pub encode_ahead: Switch,
    /// Sizes of pictures that `serve` and a RunPod worker are ready for when they start [default: the model's own]
    #[arg(long, global = true, env = "WARM_UP", value_name = "WIDTHxHEIGHT", value_delimiter = ',')]
    pub warm_up: Vec<PictureSize>,
    /// Graphs compiled ahead of time: used where they are beside --graphs and fit, or never
    #[arg(long, global = true, env = "AOT", value_enum, default_value_t = Aot::Auto)]
    pub aot: Aot,
    /// UNet graphs of fewer and larger operations; auto: on CUDA, where they are among the graphs
    #[arg(long, global = true, env = "FUSED", value_enum, default_value_t = Switch::Auto)]
    pub fused: Switch,
    /// error, warn, info, debug or trace; also read from RUNPOD_DEBUG_LEVEL
    #[arg(long, global = true, env = "RUNPOD_LOG_LEVEL", alias = "rp_log_level", value_name = "LEVEL",
          default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// What `generate` does, in three groups: where the request comes from, what it says, where the pictures go.
#[derive(Debug, Clone, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub struct GenerateArgs {
    /// Request as JSON, `{"prompt": ...}` or `{"input": {...}}`; `-` reads standard input
    #[arg(long, value_name = "FILE", help_heading = "Request")]
    pub input: Option<PathBuf>,
    /// Picture made earlier: start from the parameters stored in it
    #[arg(long, value_name = "PICTURE", conflicts_with = "input", help_heading = "Request")]
    pub from: Option<PathBuf>,
    /// What the picture shows
    #[arg(long, help_heading = "Request")]
    pub prompt: Option<String>,
    /// What the picture must not show
    #[arg(long, help_heading = "Request")]
    pub negative_prompt: Option<String>,
    /// Pixels, a multiple of 8 [default: the model's own size]
    #[arg(long, value_name = "N", help_heading = "Request")]
    pub width: Option<u32>,
    /// Pixels, a multiple of 8 [default: the model's own size]
    #[arg(long, value_name = "N", help_heading = "Request")]
    pub height: Option<u32>,
    /// Number of denoising steps, 1 to 200 [default: 30]
    #[arg(long, value_name = "N", alias = "num-inference-steps", help_heading = "Request")]
    pub steps: Option<u32>,
    /// How strictly the prompt is followed; 1 or less turns guidance off [default: 5]
    #[arg(long, value_name = "X", allow_negative_numbers = true, help_heading = "Request")]
    pub guidance_scale: Option<f64>,
    /// Same seed, same picture; -1 draws one [default: -1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Request")]
    pub seed: Option<i64>,
    /// Pictures to make, with seed, seed+1, ... [default: 1]
    #[arg(long, value_name = "N", help_heading = "Request")]
    pub num_images: Option<u32>,
    /// Picture to start from: a file or a URL
    #[arg(long, value_name = "FILE", help_heading = "Request")]
    pub image: Option<String>,
    /// White where that picture is to be repainted: a file or a URL
    #[arg(long, value_name = "FILE", help_heading = "Request")]
    pub mask_image: Option<String>,
    /// How much of that picture is made anew, 0 to 1 [default: 0.3; 0.8 with a control; 0.9999 with a mask]
    #[arg(long, value_name = "X", help_heading = "Request")]
    pub strength: Option<f64>,
    /// Control map for a ControlNet: a file or a URL; several go into --input's `controlnets`
    #[arg(long, value_name = "FILE", help_heading = "Request")]
    pub control_image: Option<String>,
    /// What kind of map it is, for a union ControlNet: canny, depth, openpose, ...
    #[arg(long, value_name = "NAME", help_heading = "Request")]
    pub control_mode: Option<String>,
    /// How strictly the map is followed [default: 1]
    #[arg(long, value_name = "X", help_heading = "Request")]
    pub control_scale: Option<f64>,
    /// Make the control map from a photo first: canny, scribble, softedge, lineart, tile or invert
    #[arg(long, value_name = "NAME", help_heading = "Request")]
    pub preprocess: Option<String>,
    /// LoRA: a name in --lora-dir, a file, a file of the Hub or a URL (repeatable; the scale is 1 if absent)
    #[arg(long, value_name = "LORA[:SCALE]", help_heading = "Request")]
    pub lora: Vec<LoraOption>,
    /// Such as euler or ddim [default: the model's own]
    #[arg(long, value_name = "NAME", help_heading = "Request")]
    pub scheduler: Option<String>,
    /// png, jpeg or webp [default: png]
    #[arg(long, value_name = "FORMAT", help_heading = "Request")]
    pub output_format: Option<String>,
    /// Any other field of the request (repeatable): `clip_skip=1`, `original_size=[1024,1024]`
    #[arg(long = "set", value_name = "KEY=JSON", help_heading = "Request")]
    pub set: Vec<RequestField>,

    /// Folder for the pictures; made when missing
    #[arg(long, short, value_name = "DIR", default_value = "out", help_heading = "Result")]
    pub output: PathBuf,
    /// Also write the final latents, before the VAE, as safetensors (`latents`, float32)
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    pub save_latents: Option<PathBuf>,
    /// No progress bar
    #[arg(long, short, help_heading = "Result")]
    pub quiet: bool,
}

/// Where `serve` listens, and whom it serves.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address to listen on; 0.0.0.0 is every interface
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 chooses a free one
    #[arg(long, env = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// Key that clients must send, bare or after `Bearer` [default: none]
    #[arg(long, env = "SERVE_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Web page that may call, such as http://localhost:3000 (repeatable; `*` is every page)
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Jobs that run at the same time [default: --max-batch for each device]
    #[arg(long, value_name = "N", env = "CONCURRENCY")]
    pub concurrency: Option<usize>,
    /// Jobs that may wait; later ones are told to try again
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max_queue: usize,
}

impl SdkArgs {
    /// What `serve` would have been given.
    pub fn serve(&self) -> ServeArgs {
        ServeArgs {
            host: self.rp_api_host.clone().unwrap_or_else(|| "127.0.0.1".into()),
            port: self.rp_api_port.unwrap_or(8000),
            api_key: std::env::var("SERVE_API_KEY").ok().filter(|key| !key.is_empty()),
            cors_origin: Vec::new(),
            concurrency: self.rp_api_concurrency.map(|jobs| jobs as usize),
            max_queue: 100,
        }
    }
}

/// A photo, and what it becomes.
#[derive(Debug, Clone, Args)]
pub struct PreprocessArgs {
    /// canny, scribble, softedge, lineart, tile or invert
    pub name: String,
    /// PNG, JPEG or WebP
    pub photo: PathBuf,
    /// The PNG to write
    pub map: PathBuf,
    /// A parameter of the preprocessor (repeatable): `low_threshold=50`
    #[arg(long = "set", value_name = "KEY=JSON")]
    pub set: Vec<RequestField>,
}

/// What the benchmark repeats.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Request as JSON
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// How often it runs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeat: usize,
}

/// Flags of RunPod's SDK, so that a start command written for it works here.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "RunPod's flags")]
pub struct SdkArgs {
    /// Run this job, `{"input": {...}}`, instead of ./test_input.json
    #[arg(long = "test_input", value_name = "JSON")]
    pub test_input: Option<String>,
    #[arg(long = "rp_serve_api", hide = true)]
    pub rp_serve_api: bool,
    #[arg(long = "rp_api_port", hide = true)]
    pub rp_api_port: Option<u16>,
    #[arg(long = "rp_api_host", hide = true)]
    pub rp_api_host: Option<String>,
    #[arg(long = "rp_api_concurrency", hide = true)]
    pub rp_api_concurrency: Option<u32>,
    #[arg(long = "rp_debugger", hide = true)]
    pub rp_debugger: bool,
}

impl Cli {
    /// Parses a whole command line, the program's name first, and the environment variables of the options.
    pub fn parse_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
        let mut command = read_variables(Cli::command());
        let matches = command.try_get_matches_from_mut(arguments)?;
        Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
    }
}

/// An empty variable counts as unset, since a template's form cannot leave one out; `RUNPOD_DEBUG_LEVEL` is the SDK's
/// older name of `RUNPOD_LOG_LEVEL`.
fn read_variables(command: ClapCommand) -> ClapCommand {
    let given = |name: &OsStr| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let read = |argument: Arg| match argument.get_env().map(OsStr::to_owned) {
        Some(name) if given(&name) => argument,
        Some(name) if name == "RUNPOD_LOG_LEVEL" && given("RUNPOD_DEBUG_LEVEL".as_ref()) => {
            argument.env("RUNPOD_DEBUG_LEVEL")
        }
        Some(name) if std::env::var_os(&name).is_some() => argument.env(None::<&str>),
        _ => argument,
    };
    command.mut_args(read)
}

impl EngineArgs {
    /// The model asked for, else the default one's folder where it can be found.
    pub fn model_or_default(&self) -> Option<String> {
        let default =
            || find_upwards(DEFAULT_MODEL, "model_index.json").map(|path| path.to_string_lossy().into_owned());
        self.model.clone().or_else(default)
    }

    /// The graphs asked for, else the default ones where they can be found.
    pub fn graphs_or_default(&self) -> Option<PathBuf> {
        self.graphs.clone().or_else(|| find_upwards(DEFAULT_GRAPHS, "manifest.json"))
    }
}

/// The folder `name` in the working folder or in one of the folders above the program, when it holds `marker`.
fn find_upwards(name: &str, marker: &str) -> Option<PathBuf> {
    if Path::new(name).join(marker).exists() {
        return Some(name.into());
    }
    let program = std::env::current_exe().ok()?;
    program.ancestors().skip(1).map(|folder| folder.join(name)).find(|folder| folder.join(marker).exists())
}

impl GenerateArgs {
    /// The fields of the request that were typed as options, by their canonical names; they win over `--input`.
    pub fn request_fields(&self) -> Map<String, Value> {
        let typed = [
            ("prompt", self.prompt.clone().map(Value::from)),
            ("negative_prompt", self.negative_prompt.clone().map(Value::from)),
            ("width", self.width.map(Value::from)),
            ("height", self.height.map(Value::from)),
            ("num_inference_steps", self.steps.map(Value::from)),
            ("guidance_scale", self.guidance_scale.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
            ("num_images", self.num_images.map(Value::from)),
            ("scheduler", self.scheduler.clone().map(Value::from)),
            ("output_format", self.output_format.clone().map(Value::from)),
            ("image", self.image.clone().map(Value::from)),
            ("mask_image", self.mask_image.clone().map(Value::from)),
            ("strength", self.strength.map(Value::from)),
            ("controlnets", self.control()),
            ("loras", (!self.lora.is_empty()).then(|| self.lora.iter().map(LoraOption::entry).collect())),
        ];
        let typed = typed.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        let set = self.set.iter().map(|field| (field.key.clone(), field.value.clone()));
        typed.chain(set).collect()
    }

    /// `controlnets` with one entry, where an option speaks of a control.
    fn control(&self) -> Option<Value> {
        let fields = [
            ("image", self.control_image.clone().map(Value::from)),
            ("mode", self.control_mode.clone().map(Value::from)),
            ("scale", self.control_scale.map(Value::from)),
            ("preprocess", self.preprocess.as_ref().map(|name| serde_json::json!({ "name": name }))),
        ];
        let fields: Map<String, Value> =
            fields.into_iter().filter_map(|(key, value)| Some((key.into(), value?))).collect();
        (!fields.is_empty()).then(|| Value::Array(vec![fields.into()]))
    }
}

/// `NAME=DIR|HUB_ID` of `--controlnet` and `--refiner`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedDir {
    pub name: String,
    /// A folder, or a repository of the Hub.
    pub dir: PathBuf,
}

impl NamedDir {
    /// `NAME=DIR`, or a folder that has its own name.
    fn maybe_named(text: &str) -> Result<Self, String> {
        if text.contains('=') {
            return text.parse();
        }
        let dir = PathBuf::from(text.trim());
        match dir.file_name() {
            Some(name) => Ok(NamedDir { name: name.to_string_lossy().into_owned(), dir }),
            None => Err("expected [NAME=]DIR".into()),
        }
    }
}

impl FromStr for NamedDir {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=').map(|(name, dir)| (name.trim(), dir.trim())) {
            Some((name, dir)) if !name.is_empty() && !dir.is_empty() => {
                Ok(NamedDir { name: name.to_owned(), dir: dir.into() })
            }
            _ => Err("expected NAME=DIR".into()),
        }
    }
}

/// In pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSize {
    pub width: u32,
    pub height: u32,
}

impl FromStr for PictureSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        let (width, height) = sides.ok_or("expected WIDTHxHEIGHT, such as 1024x1024")?;
        Ok(PictureSize { width, height })
    }
}

/// `LORA[:SCALE]` of `--lora`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraOption {
    pub source: String,
    pub scale: Option<f64>,
}

impl FromStr for LoraOption {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let scaled = text.rsplit_once(':').and_then(|(source, scale)| Some((source, scale.parse().ok()?)));
        Ok(match scaled.filter(|(source, _)| !source.is_empty()) {
            Some((source, scale)) => LoraOption { source: source.into(), scale: Some(scale) },
            None => LoraOption { source: text.into(), scale: None },
        })
    }
}

impl LoraOption {
    /// The entry of the request's `loras`. What has a slash is a path: on this machine, or on the Hub.
    fn entry(&self) -> Value {
        let is_url = self.source.contains("://");
        let is_path = self.source.contains('/') || Path::new(&self.source).is_file();
        let key = if is_url {
            "url"
        } else if is_path {
            "path"
        } else {
            "name"
        };
        let mut entry = serde_json::json!({ key: self.source });
        if let Some(scale) = self.scale {
            entry["scale"] = scale.into();
        }
        entry
    }
}

/// `KEY=JSON` of `--set`. A bare word is a string: `scheduler=ddim`.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestField {
    pub key: String,
    pub value: Value,
}

impl FromStr for RequestField {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or("expected KEY=JSON")?;
        let key = key.trim();
        if key.is_empty() {
            return Err("expected KEY=JSON, and KEY is empty".into());
        }
        let value = match serde_json::from_str(value) {
            Ok(value) => value,
            Err(error) if value.trim_start().starts_with(['{', '[', '"']) => return Err(format!("not JSON: {error}")),
            Err(_) => value.into(),
        };
        Ok(RequestField { key: key.into(), value })
    }
}

/// Where to compute, as it was asked for; whether it exists is found out at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    Cuda(usize),
    Mps,
    Cpu,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "cuda" => Ok(DeviceName::Cuda(0)),
            "mps" => Ok(DeviceName::Mps),
            "cpu" => Ok(DeviceName::Cpu),
            other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) => Ok(DeviceName::Cuda(index)),
                None => Err("expected cuda, cuda:N, mps or cpu".into()),
            },
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cuda(index) => write!(f, "cuda:{index}"),
            DeviceName::Mps => f.write_str("mps"),
            DeviceName::Cpu => f.write_str("cpu"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    #[value(aliases = ["fp32", "float"])]
    Float32,
    #[value(aliases = ["fp16", "half"])]
    Float16,
    #[value(alias = "bf16")]
    Bfloat16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoraBackup {
    File,
    Copy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VaeTiling {
    Auto,
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Offload {
    None,
    TextEncoders,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Aot {
    Auto,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    Auto,
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attention {
    Auto,
    Fastest,
    Flash,
    Efficient,
    Cudnn,
    Math,
}

/// How much is logged. A name it does not know means `info`: a slip in a template must not stop a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
    Off,
}

impl FromStr for LogLevel {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        // names, and the numbers that RunPod's SDK gives them
        Ok(match text.trim().to_ascii_lowercase().as_str() {
            "error" | "critical" | "5" => LogLevel::Error,
            "warn" | "warning" | "4" => LogLevel::Warn,
            "debug" | "2" => LogLevel::Debug,
            "trace" | "1" => LogLevel::Trace,
            "notset" | "off" | "0" => LogLevel::Off,
            _ => LogLevel::Info,
        })
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
            LogLevel::Off => "off",
        })
    }
}

/// A number of bytes: `6442450944`, `6G`, `6GB` and `6GiB` are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "expected a number of bytes, such as 500M or 6G".to_owned();
        let text = text.trim();
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c.is_whitespace());
        let exponent = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 1,
            "m" | "mb" | "mib" => 2,
            "g" | "gb" | "gib" => 3,
            "t" | "tb" | "tib" => 4,
            _ => return Err(wrong()),
        };
        let number: f64 = digits.parse().map_err(|_| wrong())?;
        let bytes = number * 1024f64.powi(exponent);
        if !bytes.is_finite() || bytes < 1.0 {
            return Err(wrong());
        }
        Ok(ByteSize(bytes as u64))
    }
}
