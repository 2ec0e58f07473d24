//! One mapped `.safetensors` file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::Mapping;

pub(super) struct MappedFile {
    path: PathBuf,
    mapping: Arc<Mapping>,
    /// Byte offset of the first tensor.
    data_start: usize,
    entries: HashMap<String, Entry>,
}

struct Entry {
    kind: Kind,
    shape: Vec<i64>,
    start: usize,
}

impl MappedFile {
    /// Maps the file and reads its header; the header is compared with the file's length, so that no tensor lies beyond.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let damaged = |message: String| {
            Error::setup("weights_damaged", format!("{}: {message}", path.display())).remedy("download the file again")
        };
        let mapping = Mapping::open(path).map_err(|e| damaged("cannot be opened".into()).source(e))?;
        let (header, metadata) = SafeTensors::read_metadata(mapping.bytes())
            .map_err(|e| damaged("not a whole safetensors file".into()).source(e))?;
        let data_start = header + 8;
        let mut end = 0;
        let mut entries = HashMap::new();
        for (name, info) in metadata.tensors() {
            let kind = kind_of(info.dtype).ok_or_else(|| damaged(format!("{name} has dtype {:?}", info.dtype)))?;
            let shape = info.shape.iter().map(|&n| n as i64).collect();
            end = end.max(info.data_offsets.1);
            entries.insert(name, Entry { kind, shape, start: info.data_offsets.0 });
        }
        let length = mapping.bytes().len();
        if length != data_start + end {
            return Err(damaged(format!("{length} bytes long, but its header describes {}", data_start + end)));
        }
        Ok(MappedFile { path: path.to_owned(), mapping, data_start, entries })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The tensor as stored; on the CPU, over the mapping.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = &self.entries[name];
        let tensor = self.mapping.tensor(self.data_start + entry.start, &entry.shape, entry.kind);
        Ok(tensor.map_err(|e| e.context(format!("reading {name} of {}", self.path.display())))?)
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F8_E4M3 => Kind::Float8e4m3fn,
        Dtype::F8_E5M2 => Kind::Float8e5m2,
        Dtype::U8 => Kind::Uint8,
        Dtype::I8 => Kind::Int8,
        Dtype::I16 => Kind::Int16,
        Dtype::I32 => Kind::Int,
        Dtype::I64 => Kind::Int64,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}
