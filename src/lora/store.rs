//! LoRA files that were read and checked, by content hash; those used longest ago make room.

use std::rc::Rc;

use super::file::LoraFile;
use crate::error::Result;

pub(super) struct Store {
    limit: u64,
    /// The one used last at the end.
    files: Vec<(String, Rc<LoraFile>)>,
}

impl Store {
    pub(super) fn new(limit: u64) -> Self {
        Store { limit, files: Vec::new() }
    }

    /// The file with this content, read by `read` where it is not here.
    pub(super) fn get(&mut self, sha256: &str, read: impl FnOnce() -> Result<LoraFile>) -> Result<Rc<LoraFile>> {
        let entry = match self.files.iter().position(|(own, _)| own == sha256) {
            Some(index) => self.files.remove(index),
            None => (sha256.to_owned(), Rc::new(read()?)),
        };
        let file = entry.1.clone();
        self.files.push(entry);
        Ok(file)
    }

    /// Drops what is above the limit. What a job holds lives until it is done.
    pub(super) fn trim(&mut self) {
        while self.files.iter().map(|(_, file)| file.bytes).sum::<u64>() > self.limit {
            self.files.remove(0);
        }
    }
}
