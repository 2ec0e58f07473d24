//! Prompts that were encoded before, the latest last.

use std::collections::VecDeque;

use tch::Tensor;

use crate::api::PromptWeighting;

/// Everything that the embeddings of a prompt depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// For the first and the second encoder.
    pub(super) texts: [String; 2],
    pub(super) clip_skip: Option<u32>,
    pub(super) weighting: PromptWeighting,
    /// Token and SHA-256 of the file.
    pub(super) inversions: Vec<(String, [u8; 32])>,
    /// What the encoders' weights are besides the model's own.
    pub(super) weights_id: String,
}

/// One text, encoded by all encoders.
#[derive(Debug)]
pub(super) struct PromptEmbeds {
    /// `[1, 77 n, sum of hidden sizes]`
    pub(super) prompt_embeds: Tensor,
    /// `[1, projection_dim]`, of the last encoder
    pub(super) pooled_prompt_embeds: Tensor,
    /// For each of the texts, whether something of it was cut off.
    pub(super) cut: [bool; 2],
}

impl Clone for PromptEmbeds {
    /// The same tensors.
    fn clone(&self) -> Self {
        PromptEmbeds {
            prompt_embeds: self.prompt_embeds.shallow_clone(),
            pooled_prompt_embeds: self.pooled_prompt_embeds.shallow_clone(),
            cut: self.cut,
        }
    }
}

impl PromptEmbeds {
    fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
        bytes(&self.prompt_embeds) + bytes(&self.pooled_prompt_embeds)
    }
}

/// Embeddings of the latest prompts, bounded in number and in bytes.
pub(in crate::pipeline) struct PromptCache {
    entries: VecDeque<(Key, PromptEmbeds)>,
    max_entries: usize,
    max_bytes: usize,
}

impl Default for PromptCache {
    /// 64 prompts of 77 tokens are 38 MiB in float32.
    fn default() -> Self {
        PromptCache::new(64, 128 << 20)
    }
}

impl PromptCache {
    fn new(max_entries: usize, max_bytes: usize) -> Self {
        PromptCache { entries: VecDeque::new(), max_entries, max_bytes }
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<PromptEmbeds> {
        let index = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(index)?;
        let embeds = entry.1.clone();
        self.entries.push_back(entry);
        Some(embeds)
    }

    /// Keeps the embeddings, and lets go of the oldest ones beyond the bounds.
    pub(super) fn put(&mut self, key: Key, embeds: PromptEmbeds) {
        self.entries.push_back((key, embeds));
        let total = |entries: &VecDeque<(Key, PromptEmbeds)>| entries.iter().map(|(_, e)| e.bytes()).sum::<usize>();
        while self.entries.len() > self.max_entries || total(&self.entries) > self.max_bytes {
            self.entries.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn key(text: &str) -> Key {
        Key {
            texts: [text.into(), text.into()],
            clip_skip: None,
            weighting: PromptWeighting::Off,
            inversions: vec![],
            weights_id: String::new(),
        }
    }

    fn embeds(value: f64) -> PromptEmbeds {
        PromptEmbeds {
            prompt_embeds: Tensor::full([1, 77, 4], value, (Kind::Float, Device::Cpu)),
            pooled_prompt_embeds: Tensor::full([1, 4], value, (Kind::Float, Device::Cpu)),
            cut: [value > 1.0, false],
        }
    }

    #[test]
    fn a_prompt_is_found_again_by_all_that_it_depends_on() {
        let mut cache = PromptCache::default();
        let others = [
            key("other"),
            Key { texts: ["a".into(), "b".into()], ..key("a") },
            Key { clip_skip: Some(1), ..key("a") },
            Key { weighting: PromptWeighting::A1111, ..key("a") },
            Key { inversions: vec![("<t>".into(), [1; 32])], ..key("a") },
            Key { inversions: vec![("<t>".into(), [2; 32])], ..key("a") },
            Key { weights_id: "lora".into(), ..key("a") },
        ];
        cache.put(key("a"), embeds(2.0));
        for other in &others {
            assert!(cache.get(other).is_none(), "{other:?}");
        }
        for (value, other) in (3..).zip(&others) {
            cache.put(other.clone(), embeds(f64::from(value)));
        }
        for (value, known) in (2..).zip([key("a")].iter().chain(&others)) {
            let found = cache.get(known).unwrap();
            assert!(found.prompt_embeds.equal(&embeds(f64::from(value)).prompt_embeds), "{known:?}");
            assert_eq!(found.cut, [true, false]);
        }
    }

    #[test]
    fn the_prompt_that_was_not_asked_for_longest_goes_first() {
        let mut cache = PromptCache::new(2, usize::MAX);
        cache.put(key("a"), embeds(1.0));
        cache.put(key("b"), embeds(1.0));
        assert!(cache.get(&key("a")).is_some());
        cache.put(key("c"), embeds(1.0));
        let known = ["a", "b", "c"].map(|text| cache.get(&key(text)).is_some());
        assert_eq!(known, [true, false, true]);

        let mut cache = PromptCache::new(64, embeds(1.0).bytes() * 3);
        for text in ["a", "b", "c", "d"] {
            cache.put(key(text), embeds(1.0));
        }
        assert!(cache.get(&key("a")).is_none() && cache.get(&key("b")).is_some());
    }
}
