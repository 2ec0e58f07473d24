//! The launcher: reads the command line, finds libtorch, and becomes the engine.
//!
//! A program linked against libtorch dies in the dynamic loader where libtorch is missing, before it can say so. This
//! one links nothing of it, so `--help`, `doctor` and a clear error work everywhere; then it replaces itself by
//! `sdxl-worker-engine` beside it (same process, same arguments). It must not use the library crate `sdxl_worker`,
//! which would link libtorch: the files it shares with it are compiled in again as modules.

#[allow(dead_code, unreachable_pub, reason = "shared with the library, which uses and exports all of it")]
mod cli;
#[allow(dead_code, unreachable_pub, reason = "shared with the library, which uses and exports all of it")]
mod error;
#[allow(unreachable_pub, reason = "written like the modules of the library")]
mod libtorch;

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};
use std::time::Duration;

use cli::{Cli, Command, DEFAULT_GRAPHS, DEFAULT_MODEL, EngineArgs};
use error::{Error, ErrorClass, Result};
use libtorch::{Libtorch, Surroundings, library_path_variable, run_briefly};

/// Tells the engine which folder libtorch was loaded from.
const FOUND_LIBTORCH: &str = "SDXL_WORKER_LIBTORCH";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    let cli = match Cli::parse_arguments(arguments.clone()) {
        Ok(cli) => cli,
        Err(answer) => return print_usage(&answer),
    };
    match launch(&cli, &arguments) {
        Ok(code) => code,
        Err(error) => {
            error.print();
            error.class.exit_code().into()
        }
    }
}

/// Help and version are answers; everything else clap has to say is a mistake in the command line.
fn print_usage(answer: &clap::Error) -> ExitCode {
    answer.print().ok();
    if !answer.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let text = answer.to_string();
    let first_paragraph = text.split("\n\n").next().unwrap_or_default().trim();
    let message = first_paragraph.strip_prefix("error: ").unwrap_or(first_paragraph);
    let error = Error::new(ErrorClass::InvalidInput, "usage", message).remedy("see sdxl-worker --help");
    error.print_json();
    error.class.exit_code().into()
}

/// Becomes the engine; returns only where that cannot be.
fn launch(cli: &Cli, arguments: &[OsString]) -> Result<ExitCode> {
    let program = env::current_exe()
        .and_then(|path| path.canonicalize())
        .map_err(|error| Error::setup("engine_not_found", "the program's own folder cannot be found").source(error))?;
    let program_dir = program.parent().expect("a program is in a folder");
    let engine = find_engine(program_dir);
    let libtorch = find_libtorch(program_dir, engine.as_deref().ok());

    if matches!(cli.command, Some(Command::Doctor(_))) {
        let loads = try_engine(&engine, &libtorch);
        if engine.is_err() || libtorch.is_err() || loads.is_err() {
            return Ok(report_installation(&cli.engine, &engine, &libtorch, loads));
        }
    }
    let (engine, libtorch) = (engine?, libtorch?);
    let mut process = with_libtorch(&engine, libtorch.as_ref());
    if let Some(name) = arguments.first() {
        process.arg0(name);
    }
    let failure = process.args(arguments.iter().skip(1)).exec();
    Err(Error::setup("engine_not_found", format!("{} cannot be started", engine.display())).source(failure))
}

fn find_engine(program_dir: &Path) -> Result<PathBuf> {
    let engine = program_dir.join("sdxl-worker-engine");
    match engine.is_file() {
        true => Ok(engine),
        false => Err(Error::setup("engine_not_found", format!("{} does not exist", engine.display()))
            .remedy("keep sdxl-worker and sdxl-worker-engine in one folder; cargo build --release makes both")),
    }
}

/// `None` where the dynamic loader finds libtorch by itself, as with a system package.
fn find_libtorch(program_dir: &Path, engine: Option<&Path>) -> Result<Option<Libtorch>> {
    match libtorch::find(&Surroundings::of_this_process(program_dir)) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code == "libtorch_not_found" && env::var_os("LIBTORCH").is_none_or(|v| v.is_empty()) => {
            match engine.is_some_and(|engine| start_engine(engine, None).is_ok()) {
                true => Ok(None),
                false => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// The engine as a process whose loader looks into libtorch's folder first.
fn with_libtorch(engine: &Path, libtorch: Option<&Libtorch>) -> Process {
    let mut process = Process::new(engine);
    if let Some(libtorch) = libtorch {
        let set = env::var_os(library_path_variable());
        let folders = std::iter::once(libtorch.lib.clone()).chain(set.iter().flat_map(env::split_paths));
        // A folder with a colon in its name cannot be in a list of folders; then it has to do alone.
        let folders = env::join_paths(folders).unwrap_or_else(|_| libtorch.lib.clone().into());
        process.env(library_path_variable(), folders).env(FOUND_LIBTORCH, &libtorch.lib);
    }
    process
}

/// Starts the engine just far enough to see that its libraries load; the error is the loader's own words.
fn start_engine(engine: &Path, libtorch: Option<&Libtorch>) -> Result<(), String> {
    let output = run_briefly(with_libtorch(engine, libtorch).arg("--version"), Duration::from_secs(60));
    match output {
        Some(output) if output.status.success() => Ok(()),
        Some(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        None => Err("it does not start, or not within a minute".into()),
    }
}

fn try_engine(engine: &Result<PathBuf>, libtorch: &Result<Option<Libtorch>>) -> Result<(), String> {
    match (engine, libtorch) {
        (Ok(engine), Ok(libtorch)) => start_engine(engine, libtorch.as_ref()),
        _ => Ok(()),
    }
}

/// `doctor` where the engine cannot run: what can be said without libtorch.
fn report_installation(
    arguments: &EngineArgs,
    engine: &Result<PathBuf>,
    libtorch: &Result<Option<Libtorch>>,
    loads: Result<(), String>,
) -> ExitCode {
    let mut to_do = Vec::new();
    let mut line = |name: &str, found: Result<String, (String, String)>| match found {
        Ok(found) => println!("  {name:<9} ok       {found}"),
        Err((problem, remedy)) => {
            println!("  {name:<9} FAILED   {}", problem.replace('\n', "\n    "));
            to_do.push(remedy);
        }
    };
    let words = |error: &Error| (error.message.clone(), error.remedy.clone().unwrap_or_default());

    println!("sdxl-worker {}\n", env!("CARGO_PKG_VERSION"));
    let unloadable = loads.err().map(|loader| (format!("it does not start: {loader}"), REINSTALL.to_owned()));
    line(
        "engine",
        match (engine, unloadable) {
            (Err(error), _) => Err(words(error)),
            (Ok(_), Some(unloadable)) => Err(unloadable),
            (Ok(path), None) => Ok(path.display().to_string()),
        },
    );
    line(
        "libtorch",
        match libtorch {
            Err(error) => Err(words(error)),
            Ok(None) => Ok("found by the system's loader".into()),
            Ok(Some(found)) => {
                Ok(format!("{} {}", found.version.as_deref().unwrap_or("of unknown version"), found.lib.display()))
            }
        },
    );
    let make_setup = || "make setup, in the project's folder, or name another with --model and --graphs".to_owned();
    line(
        "model",
        match arguments.model_or_default() {
            Some(model) if Path::new(&model).exists() => Ok(model),
            Some(model) => Err((format!("{model} does not exist"), make_setup())),
            None => Err((format!("{DEFAULT_MODEL} is not here or above the program"), make_setup())),
        },
    );
    line(
        "graphs",
        match arguments.graphs_or_default() {
            Some(graphs) if graphs.join("manifest.json").exists() => Ok(graphs.display().to_string()),
            Some(graphs) => Err((format!("{} has no manifest.json", graphs.display()), make_setup())),
            None => Err((format!("{DEFAULT_GRAPHS} is not here or above the program"), make_setup())),
        },
    );
    println!("  device    unknown  libtorch has to run to tell\n\nTo do:");
    to_do.dedup();
    for remedy in to_do {
        println!("  - {remedy}");
    }
    ExitCode::from(ErrorClass::Setup.exit_code())
}

const REINSTALL: &str = "install libtorch again with all it needs: pip install --force-reinstall torch==2.11.0";
