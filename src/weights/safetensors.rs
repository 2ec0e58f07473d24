//! One mapped `.safetensors` file.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::single_file;
use crate::error::{Error, Result};
use crate::torch::Mapping;

pub(crate) struct MappedFile {
    path: PathBuf,
    mapping: Arc<Mapping>,
    /// Byte offset of the first tensor.
    data_start: usize,
    entries: HashMap<String, Entry>,
    notes: HashMap<String, String>,
    /// Names of tensors in the original layout that are no component's.
    marks: BTreeSet<String>,
}

/// One tensor of the file, or a part of one.
pub(super) struct Entry {
    kind: Kind,
    shape: Vec<i64>,
    start: usize,
    /// Rows and columns are exchanged: `shape` is the other way round than the file's.
    is_transposed: bool,
}

impl Entry {
    pub(super) fn rank(&self) -> usize {
        self.shape.len()
    }

    /// A share of the rows, of so many equal ones.
    pub(super) fn rows(&self, share: usize, of: usize) -> Entry {
        let mut shape = self.shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows /= of as i64;
        }
        let bytes = shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes();
        Entry { start: self.start + share * bytes, shape, ..*self }
    }

    /// Rows and columns alone.
    pub(super) fn flattened(self) -> Entry {
        let columns = self.shape[1..].iter().product();
        Entry { shape: vec![self.shape[0], columns], ..self }
    }

    pub(super) fn transposed(self) -> Entry {
        Entry { shape: self.shape.iter().rev().copied().collect(), is_transposed: !self.is_transposed, ..self }
    }
}

impl MappedFile {
    /// Maps the file and reads its header; the header is compared with the file's length, so that no tensor lies beyond.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mapping = Mapping::open(path).map_err(|e| {
            Error::setup("weights_damaged", format!("{}: cannot be opened", path.display()))
                .source(e)
                .remedy("download the file again")
        })?;
        Self::new(path, mapping)
    }

    /// The same for bytes that are there already; `path` is for messages.
    ///
    /// # Errors
    /// `weights_damaged`.
    pub(crate) fn new(path: &Path, mapping: Arc<Mapping>) -> Result<Self> {
        let damaged = |message: String| {
            Error::setup("weights_damaged", format!("{}: {message}", path.display())).remedy("download the file again")
        };
        let (header, metadata) = SafeTensors::read_metadata(mapping.bytes())
            .map_err(|e| damaged("not a whole safetensors file".into()).source(e))?;
        let data_start = header + 8;
        let mut end = 0;
        let mut entries = HashMap::new();
        for (name, info) in metadata.tensors() {
            let kind = kind_of(info.dtype).ok_or_else(|| damaged(format!("{name} has dtype {:?}", info.dtype)))?;
            let shape = info.shape.iter().map(|&n| n as i64).collect();
            end = end.max(info.data_offsets.1);
            entries.insert(name, Entry { kind, shape, start: info.data_offsets.0, is_transposed: false });
        }
        let length = mapping.bytes().len();
        if length != data_start + end {
            return Err(damaged(format!("{length} bytes long, but its header describes {}", data_start + end)));
        }
        let notes = metadata.metadata().clone().unwrap_or_default();
        Ok(MappedFile { path: path.to_owned(), mapping, data_start, entries, notes, marks: BTreeSet::new() })
    }

    /// The tensors of one component under diffusers' names, where the file is in the original layout.
    pub(super) fn of_component(mut self, component: &str) -> Self {
        if single_file::is_original(self.names()) {
            self.marks = self.names().filter(|name| !name.contains('.')).map(str::to_owned).collect();
            self.entries = single_file::component(component, self.entries);
        }
        self
    }

    pub(super) fn marks(&self) -> &BTreeSet<String> {
        &self.marks
    }

    /// The header's `__metadata__`.
    pub(crate) fn notes(&self) -> &HashMap<String, String> {
        &self.notes
    }

    /// Whether the tensor's memory is this file's mapping.
    pub(super) fn holds(&self, tensor: &Tensor) -> bool {
        tensor.device() == Device::Cpu && self.mapping.contains(tensor.data_ptr() as usize)
    }

    /// Makes a tensor that this file [holds](Self::holds) what it was.
    pub(super) fn restore(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let entry = &self.entries[name];
        let length = tensor.numel() * entry.kind.elt_size_in_bytes();
        Ok(self.mapping.restore(self.data_start + entry.start, length)?)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[i64]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The tensor's first byte.
    pub(super) fn position(&self, name: &str) -> usize {
        self.data_start + self.entries[name].start
    }

    pub(super) fn kind(&self, name: &str) -> Option<Kind> {
        self.entries.get(name).map(|entry| entry.kind)
    }

    /// The tensor as stored; on the CPU, over the mapping.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = &self.entries[name];
        let stored: Vec<i64> = match entry.is_transposed {
            true => entry.shape.iter().rev().copied().collect(),
            false => entry.shape.clone(),
        };
        let tensor = self.mapping.tensor(self.data_start + entry.start, &stored, entry.kind);
        let tensor = tensor.map_err(|e| e.context(format!("reading {name} of {}", self.path.display())))?;
        match entry.is_transposed {
            // a copy, so that kernels find it as they find every other
            true => Ok(tensor.f_transpose(0, 1).and_then(|t| t.f_contiguous()).map_err(anyhow::Error::from)?),
            false => Ok(tensor),
        }
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
