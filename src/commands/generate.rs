use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write, stdin};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{ColdStart, progress, start_handler};
use crate::api::parse;
use crate::cli::{EngineArgs, GenerateArgs};
use crate::error::{Error, Result};
use crate::handler::Picture;
use crate::media;

/// Makes pictures and writes them into a folder; prints the path of each on stdout.
pub fn generate(arguments: &EngineArgs, options: &GenerateArgs) -> Result<()> {
    let start = ColdStart::begin();
    let input = request(&with_files(options)?)?;
    // a misspelled field is told before the model is loaded
    parse(&input)?;
    // Whatever can be wrong with the folder is better known before the work than after it.
    prepare_folder(&options.output)?;
    if let Some(parent) = options.save_latents.as_deref().and_then(Path::parent) {
        prepare_folder(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    }
    if let Some(folder) = options.save_latents.as_deref().filter(|path| path.is_dir()) {
        return Err(unwritable(folder, anyhow::anyhow!("it is a folder")));
    }
    let handler = start.time("load_model", || start_handler(arguments))?.with_any_path();
    start.include(handler.load_times());
    handler.report_start(start.timings());
    let (output, latents) = handler.generate(&input, progress::shown(options.quiet))?;
    for warning in output.warnings() {
        tracing::warn!("{warning}");
    }
    let timings: Vec<String> = output.timings().iter().map(|(phase, ms)| format!("{phase} {ms:.0} ms")).collect();
    tracing::info!("{}", timings.join(", "));

    if let Some(path) = &options.save_latents {
        write_whole(path, &latents_file(&latents)?)?;
    }
    for picture in output.pictures() {
        let path = free_path(&options.output, picture);
        write_whole(&path, &picture.bytes)?;
        println!("{}", path.display());
    }
    Ok(())
}

/// The request: a file, stdin or an earlier picture, under what was typed.
fn request(options: &GenerateArgs) -> Result<Value> {
    let mut request = match (&options.input, &options.from) {
        (Some(path), _) => request_from_file(path)?,
        (None, Some(picture)) => {
            let bytes = fs::read(picture).map_err(|e| unreadable("--from", picture, e))?;
            match media::read_parameters(&bytes)? {
                Value::Object(mut fields) => {
                    // the model is the one that was loaded, whatever the picture's was called
                    fields.remove("model");
                    fields
                }
                _ => {
                    return Err(Error::invalid("no_parameters", "--from", "the picture's parameters are no request"));
                }
            }
        }
        (None, None) => Map::new(),
    };
    request.extend(options.request_fields());
    Ok(Value::Object(request))
}

/// The options with the pictures themselves in place of the files that were named.
fn with_files(options: &GenerateArgs) -> Result<GenerateArgs> {
    let mut options = options.clone();
    let pictures = [
        ("--image", &mut options.image),
        ("--mask-image", &mut options.mask_image),
        ("--control-image", &mut options.control_image),
    ];
    for (option, picture) in pictures {
        if let Some(source) = picture.as_mut().filter(|source| !source.contains("://") && !source.starts_with("data:"))
        {
            let path = Path::new(source.as_str());
            *source = media::to_base64(&fs::read(path).map_err(|e| unreadable(option, path, e))?);
        }
    }
    Ok(options)
}

pub(super) fn request_from_file(path: &Path) -> Result<Map<String, Value>> {
    let text = if path.as_os_str() == "-" {
        let mut text = String::new();
        stdin().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(path)
    };
    let name = if path.as_os_str() == "-" { "standard input".into() } else { path.display().to_string() };
    let text = text.map_err(|e| unreadable("--input", path, e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| {
        Error::invalid("invalid_json", "--input", format!("{name} is not JSON")).source(e).remedy(REQUEST_HINT)
    })?;
    let input = match value {
        Value::Object(mut job) if job.get("input").is_some_and(Value::is_object) => job.remove("input"),
        other => Some(other),
    };
    match input {
        Some(Value::Object(fields)) => Ok(fields),
        _ => Err(Error::invalid("invalid_type", "--input", "a request is a JSON object").remedy(REQUEST_HINT)),
    }
}

pub(super) fn unreadable(option: &str, path: &Path, error: std::io::Error) -> Error {
    Error::invalid("unreadable_file", option, format!("{} cannot be read", path.display()))
        .source(error)
        .remedy(format!("give {option} a file that is there and that this user may read"))
}

const REQUEST_HINT: &str = "write {\"prompt\": \"...\"}, or {\"input\": {\"prompt\": \"...\"}}";

fn unwritable(path: &Path, error: impl Into<anyhow::Error>) -> Error {
    Error::setup("output_unwritable", format!("{} cannot be written", path.display()))
        .source(error)
        .remedy("name a place that this user may write to, with --output or --save-latents")
}

/// Makes the folder and proves that files can be made in it.
fn prepare_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| unwritable(folder, e))?;
    tempfile::tempfile_in(folder).map(drop).map_err(|e| unwritable(folder, e))
}

/// Writes beside the target and renames, so that no reader ever sees half a file.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o644)).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|e| unwritable(path, e))
}

/// `seed.png`, or with a number where an earlier picture has that name.
fn free_path(folder: &Path, picture: &Picture) -> PathBuf {
    let (seed, extension) = (picture.seed, picture.format().name());
    let first = folder.join(format!("{seed}.{extension}"));
    let others = (2..).map(|n| folder.join(format!("{seed}-{n}.{extension}")));
    std::iter::once(first).chain(others).find(|path| !path.exists()).expect("numbers do not end")
}

/// The latents as a safetensors file: one tensor `latents`, float32.
fn latents_file(latents: &Tensor) -> Result<Vec<u8>> {
    let shape: Vec<usize> = latents.size().iter().map(|&n| n as usize).collect();
    let values = Vec::<f32>::try_from(latents.contiguous().view(-1)).map_err(anyhow::Error::from)?;
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F32, shape, &bytes).map_err(anyhow::Error::from)?;
    Ok(safetensors::serialize(HashMap::from([("latents", view)]), None).map_err(anyhow::Error::from)?)
}
