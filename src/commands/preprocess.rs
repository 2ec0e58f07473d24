use std::fs;

use serde_json::Map;

use super::generate::{unreadable, write_whole};
use crate::api::{OutputFormat, Preprocessor};
use crate::cli::PreprocessArgs;
use crate::error::Result;
use crate::media;

/// Writes the control map that a request with this `preprocess` would use, at the photo's own size.
pub fn preprocess(options: &PreprocessArgs) -> Result<()> {
    let params: Map<_, _> = options.set.iter().map(|field| (field.key.clone(), field.value.clone())).collect();
    let preprocessor = Preprocessor::from_request(&options.name, &params, "preprocess")?;
    let bytes = fs::read(&options.photo).map_err(|e| unreadable("PHOTO", &options.photo, e))?;
    let photo = media::to_rgb(media::decode(&bytes, media::MAX_INPUT_PIXELS, "PHOTO")?);
    let map = media::preprocess(&photo, &preprocessor);
    write_whole(&options.map, &media::encode(&map, OutputFormat::Png, 100, None)?)?;
    println!("{}", options.map.display());
    Ok(())
}
