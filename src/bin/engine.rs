//! The program that does the work. People start `sdxl-worker`, which finds libtorch and becomes this one.

use std::io::Write;

use sdxl_worker::cli::{Cli, Command};
use sdxl_worker::error::Result;
use sdxl_worker::telemetry::{self, LogFormat};
use sdxl_worker::{commands, config, torch};

fn main() {
    let cli = match Cli::parse_arguments(std::env::args_os()) {
        Ok(cli) => cli,
        // the launcher has answered these already, unless somebody started the engine by hand
        Err(answer) => answer.exit(),
    };
    // the platform is where an endpoint has an id; elsewhere a person reads
    let on_platform = std::env::var_os("RUNPOD_ENDPOINT_ID").is_some();
    let format = if on_platform { LogFormat::Platform } else { LogFormat::Human };
    telemetry::init(&cli.engine.log_level.to_string(), format);
    // A job's panic is answered as an error; the log needs the place, not the words, which may quote the request.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "panic");
    }));
    let status = match run(&cli) {
        Ok(()) => 0,
        Err(error) => {
            error.print();
            // one job without a command ends as under RunPod's SDK: 1 for whatever went wrong
            if cli.command.is_none() { 1 } else { error.class.exit_code() }
        }
    };
    std::io::stdout().flush().ok();
    torch::exit(status);
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Some(Command::Generate(options)) => commands::generate(&cli.engine, options),
        Some(Command::Preprocess(options)) => commands::preprocess(options),
        Some(Command::Fetch) => commands::fetch(&cli.engine),
        Some(Command::Doctor(options)) => commands::doctor(&cli.engine, options),
        Some(Command::Bench(options)) => commands::bench(&cli.engine, options),
        Some(Command::Tokenize) => commands::tokenize(&cli.engine),
        Some(Command::Serve(options)) => commands::serve(&cli.engine, options),
        None if cli.sdk.rp_serve_api || config::realtime_port().is_some() => {
            commands::serve(&cli.engine, &cli.sdk.serve())
        }
        None => match (&cli.sdk.test_input, config::worker_settings(&cli.engine)) {
            (None, Some(settings)) => commands::runpod(&cli.engine, settings),
            (test_input, _) => commands::run_once(&cli.engine, test_input.as_deref()),
        },
    }
}
