//! From texts to what the UNet is told about them: `encode_prompt` and the added time ids of diffusers.
//!
//! What `prompt_weighting` makes of a text is in `a1111` and `compel`; without it a text is cut at 77 tokens.

mod a1111;
mod cache;
mod compel;
mod compel_syntax;
mod compel_words;
mod stage;
mod textual_inversion;

use std::fs::File;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::api::{GenerateParams, PromptWeighting, TextualInversionParams, has_lora_tag};
use crate::context::JobContext;
use crate::error::{Error, Result};
use crate::weights::InUse;
pub(super) use cache::PromptCache;
use cache::{Key, PromptEmbeds};
use stage::StageRun;
pub(super) use stage::TextStage;
pub use textual_inversion::MAX_BYTES as MAX_TEXTUAL_INVERSION_BYTES;
use textual_inversion::TextualInversion;

/// What stays the same over all steps: for each image one row, and with guidance the negative rows first.
pub(super) struct Conditions {
    /// `[batch, 77 n, cross_attention_dim]`; n is 1 unless `prompt_weighting` takes a longer text
    pub(super) encoder_hidden_states: Tensor,
    /// `[batch, projection_dim]`
    pub(super) text_embeds: Tensor,
    /// `[batch, 6]`
    pub(super) time_ids: Tensor,
}

impl Conditions {
    /// The rows for the prompt alone, for steps without guidance.
    pub(super) fn without_negative(&self) -> Conditions {
        let half = |tensor: &Tensor| tensor.chunk(2, 0).pop().expect("two halves");
        Conditions {
            encoder_hidden_states: half(&self.encoder_hidden_states),
            text_embeds: half(&self.text_embeds),
            time_ids: half(&self.time_ids),
        }
    }
}

/// What one pass of a job tells the UNet of the picture's size.
pub(super) struct SizeCondition {
    /// Height and width in pixels.
    pub(super) size: [u32; 2],
    /// The pass begins with a picture: diffusers fills in the negative sizes otherwise then.
    pub(super) from_picture: bool,
}

pub(super) struct PromptEncoder<'a> {
    pub(super) stages: &'a [TextStage],
    pub(super) cache: &'a mut PromptCache,
    /// Names what was added to the encoders' own weights, such as a set of LoRAs; empty for nothing.
    pub(super) weights_id: &'a str,
    /// Of the job's textual inversions.
    pub(super) files: &'a [Arc<File>],
    pub(super) context: &'a JobContext,
    /// Brings the encoders to the device; asked for once, when the first text is not in the cache.
    pub(super) bring: &'a dyn Fn() -> Result<InUse<'a>>,
    pub(super) in_use: Option<InUse<'a>>,
    pub(super) force_zeros_for_empty_prompt: bool,
    pub(super) requires_aesthetics_score: bool,
    pub(super) kind: Kind,
    pub(super) device: Device,
}

impl PromptEncoder<'_> {
    /// `StableDiffusionXLPipeline.encode_prompt`, then `_get_add_time_ids`. Notes for the caller go to `warnings`.
    pub(super) fn encode(
        &mut self,
        params: &GenerateParams,
        size: &SizeCondition,
        do_classifier_free_guidance: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Conditions> {
        let added = Added { weighting: params.prompt_weighting, inversions: self.inversions(params)? };
        let texts = [&params.prompt, non_empty(&params.prompt_2).unwrap_or(&params.prompt)];
        let positive = self.encode_texts(texts, params.clip_skip, &added, ["prompt", "prompt_2"], warnings)?;
        let mut rows = vec![(positive, self.time_ids(params, size.size))];
        if do_classifier_free_guidance {
            let negative = self.encode_negative(params, &added, &rows[0].0, warnings)?;
            rows.insert(0, (negative, self.negative_time_ids(params, size, warnings)));
        }
        self.pad(&mut rows, params.clip_skip)?;

        let num_images = params.num_images as i64;
        let batch = |part: fn(&(PromptEmbeds, Tensor)) -> &Tensor| {
            let parts: Vec<Tensor> =
                rows.iter().map(|row| part(row).repeat_interleave_self_int(num_images, 0, None)).collect();
            Tensor::cat(&parts, 0).to_kind(self.kind)
        };
        Ok(Conditions {
            encoder_hidden_states: batch(|row| &row.0.prompt_embeds),
            text_embeds: batch(|row| &row.0.pooled_prompt_embeds),
            time_ids: batch(|row| &row.1),
        })
    }

    fn encode_negative(
        &mut self,
        params: &GenerateParams,
        added: &Added,
        positive: &PromptEmbeds,
        warnings: &mut Vec<String>,
    ) -> Result<PromptEmbeds> {
        if params.negative_prompt.is_none() && self.force_zeros_for_empty_prompt {
            if params.negative_prompt_2.is_some() {
                warnings
                    .push("negative_prompt_2 acts only beside negative_prompt on this model; it was not used".into());
            }
            return Ok(PromptEmbeds {
                prompt_embeds: positive.prompt_embeds.zeros_like(),
                pooled_prompt_embeds: positive.pooled_prompt_embeds.zeros_like(),
                cut: [false; 2],
            });
        }
        let first = params.negative_prompt.as_deref().unwrap_or("");
        let second = non_empty(&params.negative_prompt_2).unwrap_or(first);
        // clip_skip counts for the prompt alone, as in diffusers
        self.encode_texts([first, second], None, added, ["negative_prompt", "negative_prompt_2"], warnings)
    }

    /// The texts for the first and the second encoder; a model with one encoder, the second, gives it the first text, as
    /// diffusers does.
    fn encode_texts(
        &mut self,
        texts: [&str; 2],
        clip_skip: Option<u32>,
        added: &Added,
        fields: [&str; 2],
        warnings: &mut Vec<String>,
    ) -> Result<PromptEmbeds> {
        let key = Key {
            texts: texts.map(str::to_owned),
            clip_skip,
            weighting: added.weighting,
            inversions: added.inversions.iter().map(|one| (one.token.clone(), one.sha256)).collect(),
            weights_id: self.weights_id.to_owned(),
        };
        let embeds = match self.cache.get(&key) {
            Some(embeds) => {
                tracing::debug!(field = fields[0], "prompt from the cache");
                embeds
            }
            None => {
                if self.in_use.is_none() {
                    self.in_use = Some((self.bring)()?);
                }
                let embeds = self.run_encoders(texts, clip_skip, added, fields)?;
                self.cache.put(key, embeds.clone());
                embeds
            }
        };
        let mut of_each = Vec::new();
        for (index, stage) in self.stages.iter().enumerate() {
            let field = fields[index];
            if embeds.cut[index] {
                let max_length = stage.tokenizer.max_length();
                of_each.push(format!("{field} was cut to {max_length} tokens; `prompt_weighting` lifts the limit"));
            }
            if added.weighting == PromptWeighting::Off && has_lora_tag(texts[index]) {
                of_each.push(format!("<lora:...> in {field} is plain text without `prompt_weighting`"));
            }
        }
        warnings.extend(of_each);
        warnings.dedup();
        Ok(embeds)
    }

    fn run_encoders(
        &self,
        texts: [&str; 2],
        clip_skip: Option<u32>,
        added: &Added,
        fields: [&str; 2],
    ) -> Result<PromptEmbeds> {
        let skip = 2 - self.stages.len();
        let (mut runs, mut hidden) = (Vec::new(), Vec::new());
        let (mut pooled, mut cut) = (None, [false; 2]);
        for (index, stage) in self.stages.iter().enumerate() {
            let run = StageRun::new(stage, skip + index, &added.inversions, clip_skip, (self.device, self.context));
            let (one, last) = match added.weighting {
                PromptWeighting::Off => {
                    let tokens = run.tokenizer.frame(&run.ids(texts[index])?);
                    cut[index] = tokens.truncated;
                    let encoded = run.encode(&tokens.ids)?;
                    (encoded.hidden, encoded.pooled)
                }
                PromptWeighting::A1111 => a1111::encode(&run, texts[index])?,
                PromptWeighting::Compel => compel::encode(&run, texts[index], fields[index])?,
            };
            hidden.push(one);
            pooled = Some(last);
            runs.push(run);
        }
        let tokens = hidden.iter().map(|one| one.size()[1]).max().unwrap_or(0);
        let hidden = runs.iter().zip(hidden).map(|(run, one)| run.padded(one, tokens)).collect::<Result<Vec<_>>>()?;
        Ok(PromptEmbeds {
            prompt_embeds: Tensor::cat(&hidden, -1),
            pooled_prompt_embeds: pooled.expect("a model has at least one text encoder"),
            cut,
        })
    }

    /// Brings the rows to one length, with empty texts behind the shorter one.
    fn pad(&mut self, rows: &mut [(PromptEmbeds, Tensor)], clip_skip: Option<u32>) -> Result<()> {
        let tokens = |rows: &[(PromptEmbeds, Tensor)]| rows.iter().map(|row| row.0.prompt_embeds.size()[1]).max();
        let (most, last) = (tokens(rows).unwrap_or(0), rows.len() - 1);
        for (index, (row, _)) in rows.iter_mut().enumerate() {
            if row.prompt_embeds.size()[1] == most {
                continue;
            }
            // the last row is the prompt's, for which alone clip_skip counts
            let clip_skip = clip_skip.filter(|_| index == last);
            let plain = Added { weighting: PromptWeighting::Off, inversions: vec![] };
            let empty = self.encode_texts(["", ""], clip_skip, &plain, ["prompt", "prompt_2"], &mut vec![])?;
            let missing = (most - row.prompt_embeds.size()[1]) / empty.prompt_embeds.size()[1];
            let padding = empty.prompt_embeds.repeat([1, missing, 1]);
            row.prompt_embeds = Tensor::cat(&[&row.prompt_embeds, &padding], 1);
        }
        Ok(())
    }

    /// Reads the files of the request's textual inversions.
    fn inversions(&self, params: &GenerateParams) -> Result<Vec<TextualInversion>> {
        let mut widths = [None; 2];
        for (width, stage) in widths.iter_mut().rev().zip(self.stages.iter().rev()) {
            *width = Some(stage.encoder.token_embedding().size()[1]);
        }
        let load = |(index, (one, file)): (usize, (&TextualInversionParams, &Arc<File>))| {
            let field = format!("textual_inversions[{index}]");
            if self.stages.iter().any(|stage| stage.tokenizer.knows(&one.token)) {
                let message = format!("{:?} is a token of the model already", one.token);
                return Err(Error::invalid("textual_inversion_invalid", format!("{field}.token"), message)
                    .remedy("choose another token, such as <my-style>"));
            }
            textual_inversion::load(file, &one.token, &one.source.field(&field), widths)
        };
        params.textual_inversions.iter().zip(self.files).enumerate().map(load).collect()
    }

    /// The row for the prompt.
    fn time_ids(&self, params: &GenerateParams, own: [u32; 2]) -> Tensor {
        let (original_size, target_size) = (params.original_size.unwrap_or(own), params.target_size.unwrap_or(own));
        self.time_ids_row(original_size, params.crops_coords_top_left, target_size, params.aesthetic_score)
    }

    /// The row for the negative prompt: from text the negative sizes act together and with their own crop; from a picture
    /// each of them acts alone, and the crop is the prompt's, but a refiner's its own.
    fn negative_time_ids(&self, params: &GenerateParams, size: &SizeCondition, warnings: &mut Vec<String>) -> Tensor {
        let (original_size, target_size) = (params.negative_original_size, params.negative_target_size);
        let (own, score) = (size.size, params.negative_aesthetic_score);
        if size.from_picture {
            let original_size = original_size.or(params.original_size).unwrap_or(own);
            let target_size = target_size.or(params.target_size).unwrap_or(own);
            let crop = if self.requires_aesthetics_score {
                params.negative_crops_coords_top_left
            } else {
                params.crops_coords_top_left
            };
            return self.time_ids_row(original_size, crop, target_size, score);
        }
        match (original_size, target_size) {
            (Some(original_size), Some(target_size)) => {
                self.time_ids_row(original_size, params.negative_crops_coords_top_left, target_size, score)
            }
            (one, other) => {
                if one.is_some() || other.is_some() {
                    let what = "negative_original_size and negative_target_size act only together";
                    warnings.push(format!("{what}; the one given was not used"));
                }
                self.time_ids(params, own)
            }
        }
    }

    /// Original size, crop and target size as one row, height before width: `[1, 6]`. A refiner's has its score in the
    /// place of the target size: `[1, 5]`.
    fn time_ids_row(
        &self,
        original_size: [u32; 2],
        crop: Option<[u32; 2]>,
        target_size: [u32; 2],
        aesthetic_score: f64,
    ) -> Tensor {
        let sizes = [original_size, crop.unwrap_or([0, 0]), target_size];
        let mut ids: Vec<f32> = sizes.concat().into_iter().map(|n| n as f32).collect();
        if self.requires_aesthetics_score {
            ids.truncate(4);
            ids.push(aesthetic_score as f32);
        }
        Tensor::from_slice(&ids).unsqueeze(0).to_kind(self.kind).to_device(self.device)
    }
}

/// What a job adds to a text.
struct Added {
    weighting: PromptWeighting,
    inversions: Vec<TextualInversion>,
}

fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}
