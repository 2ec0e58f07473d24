//! Textual inversion: vectors that stand for a word of their own at the input of the text encoders.
//!
//! Read as diffusers reads them (`loaders/textual_inversion.py`), but put in by lending a token the rows of the embedding
//! table that a text does not use, not by making the table longer.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ::safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::error::{Error, ErrorClass, Result};

/// A token, and what it is for each encoder.
pub(in crate::pipeline) struct TextualInversion {
    pub(super) token: String,
    /// float32 `[n, hidden_size]` for the first and the second encoder; `None` leaves the token a plain text there.
    pub(super) vectors: [Option<Tensor>; 2],
    /// Of the file.
    pub(super) sha256: [u8; 32],
}

/// Far above any: a vector has a few kilobytes.
pub const MAX_BYTES: u64 = 64 << 20;
/// What fits between start and end token.
const MAX_VECTORS: i64 = 75;
/// How SDXL's files name the parts for the first and the second encoder.
const PARTS: [&str; 2] = ["clip_l", "clip_g"];

/// Reads a safetensors file: `clip_l` and `clip_g`, or tensors of any name (`emb_params`, the token) whose width says
/// which encoder they are for. `widths` are those of the encoders that the model has.
///
/// # Errors
/// `textual_inversion_invalid` for another format, a damaged file, a wrong width, and
/// numbers that are not finite; `too_large`. All name `field`.
pub(in crate::pipeline) fn load(
    file: &File,
    token: &str,
    field: &str,
    widths: [Option<i64>; 2],
) -> Result<TextualInversion> {
    let invalid = |message: String, remedy: &str| {
        Error::invalid("textual_inversion_invalid", field, format!("the textual inversion for {token:?} {message}"))
            .remedy(remedy)
    };
    let bytes = read(file, token, field)?;
    let again = "download the file again; it must be a safetensors file";
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
        if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(&[0x80]) {
            let remedy = "convert it: torch.load(..., weights_only=True), then safetensors.torch.save_file";
            return invalid("is a pickle, which can run code when it is read".into(), remedy);
        }
        invalid("is not a whole safetensors file".into(), again).source(e)
    })?;

    let fits = "use one that was trained for this model's text encoders (SDXL: clip_l and clip_g)";
    let mut vectors = [None, None];
    for (name, view) in tensors.tensors() {
        let kind = match view.dtype() {
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            other => return Err(invalid(format!("has {name} in {other:?}"), fits)),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        let [count, width] = match shape[..] {
            [width] => [1, width],
            [count, width] => [count, width],
            _ => return Err(invalid(format!("has {name} of shape {shape:?}"), fits)),
        };
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(invalid(format!("has {count} vectors; 1 to {MAX_VECTORS} fit a prompt"), fits));
        }
        let index = match PARTS.iter().position(|part| *part == name) {
            Some(index) if widths[index].is_none() => continue, // for an encoder that this model does without
            Some(index) if widths[index] == Some(width) => index,
            None => match (widths[0] == Some(width), widths[1] == Some(width)) {
                (true, false) => 0,
                (false, true) => 1,
                (true, true) => {
                    return Err(invalid(
                        format!("has {name}, which fits both text encoders"),
                        "name it clip_l or clip_g",
                    ));
                }
                (false, false) => return Err(wrong_width(&invalid, &name, width, widths, fits)),
            },
            Some(_) => return Err(wrong_width(&invalid, &name, width, widths, fits)),
        };
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind).map_err(anyhow::Error::from)?;
        let tensor = tensor.to_kind(Kind::Float).view([count, width]);
        if tensor.isfinite().all().int64_value(&[]) == 0 {
            return Err(invalid(format!("has numbers in {name} that are not finite"), again));
        }
        if vectors[index].replace(tensor).is_some() {
            return Err(invalid(format!("has a second tensor ({name}) for one text encoder"), fits));
        }
    }
    if vectors.iter().all(Option::is_none) {
        return Err(invalid("has nothing for this model's text encoders".into(), fits));
    }
    Ok(TextualInversion { token: token.to_owned(), vectors, sha256: Sha256::digest(&bytes).into() })
}

fn wrong_width(
    invalid: &impl Fn(String, &str) -> Error,
    name: &str,
    width: i64,
    widths: [Option<i64>; 2],
    remedy: &str,
) -> Error {
    let known = widths.iter().flatten().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    invalid(format!("has {name} with vectors of {width} numbers; the text encoders take {known}"), remedy)
}

fn read(file: &File, token: &str, field: &str) -> Result<Vec<u8>> {
    let bytes = file.metadata().map_err(anyhow::Error::from)?.len();
    if bytes > MAX_BYTES {
        let message = format!("the textual inversion for {token:?} has more than {} MB", MAX_BYTES >> 20);
        return Err(Error::new(ErrorClass::TooLarge, "too_large", message)
            .field(field)
            .remedy("a textual inversion has a few kilobytes a vector; this is something else"));
    }
    let mut read = vec![0; bytes as usize];
    file.read_exact_at(&mut read, 0).map_err(anyhow::Error::from)?;
    Ok(read)
}

/// Rows of an embedding table that hold something else until this is dropped.
pub(super) struct BorrowedRows {
    table: Tensor,
    /// int64 `[n]`
    rows: Tensor,
    own: Tensor,
}

impl BorrowedRows {
    /// `table` `[ids, hidden_size]`, `vectors` `[n, hidden_size]` in its dtype and on its device.
    pub(super) fn new(table: &Tensor, rows: &[i64], vectors: &Tensor) -> Result<Self> {
        let rows = Tensor::from_slice(rows).to_device(table.device());
        let own = table.f_index_select(0, &rows).map_err(anyhow::Error::from)?;
        let mut borrowed = BorrowedRows { table: table.shallow_clone(), rows, own };
        let _ = borrowed.table.f_index_copy_(0, &borrowed.rows, vectors).map_err(anyhow::Error::from)?;
        Ok(borrowed)
    }
}

impl Drop for BorrowedRows {
    fn drop(&mut self) {
        // also while a panic unwinds, so nothing here may panic
        let _no_grad = tch::no_grad_guard();
        if let Err(error) = self.table.f_index_copy_(0, &self.rows, &self.own) {
            tracing::error!(%error, "rows of a token embedding could not be restored");
        }
    }
}

#[cfg(test)]
#[path = "textual_inversion_tests.rs"]
mod tests;
