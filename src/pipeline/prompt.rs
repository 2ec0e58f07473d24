//! From texts to what the UNet is told about them: `encode_prompt` and the added time ids of diffusers.

use tch::{Device, Kind, Tensor};

use super::tokenizer::ClipTokenizer;
use crate::api::GenerateParams;
use crate::error::{Error, Result};
use crate::models::TextEncoder;

/// A tokenizer and the encoder that takes its ids.
pub(super) struct TextStage {
    pub(super) tokenizer: ClipTokenizer,
    pub(super) encoder: TextEncoder,
}

/// One text, encoded by all encoders.
struct PromptEmbeds {
    /// `[1, 77, sum of hidden sizes]`
    prompt_embeds: Tensor,
    /// `[1, projection_dim]`, of the last encoder
    pooled_prompt_embeds: Tensor,
}

/// What stays the same over all steps: for each image one row, and with guidance the negative rows first.
pub(super) struct Conditions {
    /// `[batch, 77, cross_attention_dim]`
    pub(super) encoder_hidden_states: Tensor,
    /// `[batch, projection_dim]`
    pub(super) text_embeds: Tensor,
    /// `[batch, 6]`
    pub(super) time_ids: Tensor,
}

pub(super) struct PromptEncoder<'a> {
    pub(super) stages: &'a [TextStage],
    pub(super) force_zeros_for_empty_prompt: bool,
    pub(super) kind: Kind,
    pub(super) device: Device,
}

impl PromptEncoder<'_> {
    /// `StableDiffusionXLPipeline.encode_prompt`, then `_get_add_time_ids`. Notes for the caller go to `warnings`.
    pub(super) fn encode(
        &self,
        params: &GenerateParams,
        do_classifier_free_guidance: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Conditions> {
        let texts = [&params.prompt, non_empty(&params.prompt_2).unwrap_or(&params.prompt)];
        let positive = self.encode_texts(texts, params.clip_skip, ["prompt", "prompt_2"], warnings)?;
        let mut rows = vec![(positive, self.time_ids(params))];
        if do_classifier_free_guidance {
            let negative = self.encode_negative(params, &rows[0].0, warnings)?;
            rows.insert(0, (negative, self.negative_time_ids(params, warnings)));
        }

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
        &self,
        params: &GenerateParams,
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
            });
        }
        let first = params.negative_prompt.as_deref().unwrap_or("");
        let second = non_empty(&params.negative_prompt_2).unwrap_or(first);
        // clip_skip counts for the prompt alone, as in diffusers
        self.encode_texts([first, second], None, ["negative_prompt", "negative_prompt_2"], warnings)
    }

    /// The texts for the first and the second encoder; a model with one encoder has only the second.
    fn encode_texts(
        &self,
        texts: [&str; 2],
        clip_skip: Option<u32>,
        fields: [&str; 2],
        warnings: &mut Vec<String>,
    ) -> Result<PromptEmbeds> {
        let skip = 2 - self.stages.len();
        let mut hidden = Vec::new();
        let mut pooled = None;
        for (i, stage) in self.stages.iter().enumerate() {
            let tokens = stage.tokenizer.encode(texts[skip + i])?;
            if tokens.truncated {
                let max_length = stage.tokenizer.max_length();
                warnings.push(format!("{} was cut to {max_length} tokens", fields[skip + i]));
            }
            let input_ids = Tensor::from_slice(&tokens.ids).unsqueeze(0).to_device(self.device);
            let output = stage.encoder.forward(&input_ids)?;
            // the last layer but one, and further up by clip_skip
            let depth = clip_skip.unwrap_or(0) as usize + 2;
            let index = output.hidden_states.len().checked_sub(depth).ok_or_else(|| {
                let most = output.hidden_states.len() - 2;
                Error::invalid("out_of_range", "clip_skip", format!("clip_skip must be at most {most} on this model"))
            })?;
            hidden.push(output.hidden_states[index].shallow_clone());
            pooled = Some(output.pooled);
        }
        warnings.dedup();
        Ok(PromptEmbeds {
            prompt_embeds: Tensor::cat(&hidden, -1),
            pooled_prompt_embeds: pooled.expect("a model has at least one text encoder"),
        })
    }

    /// The row for the prompt.
    fn time_ids(&self, params: &GenerateParams) -> Tensor {
        let own = [params.height, params.width];
        let (original_size, target_size) = (params.original_size.unwrap_or(own), params.target_size.unwrap_or(own));
        self.time_ids_row(original_size, params.crops_coords_top_left, target_size)
    }

    /// The row for the negative prompt: from text the negative sizes act together and with their own crop; from a picture
    /// each of them acts alone, and the crop is the prompt's.
    fn negative_time_ids(&self, params: &GenerateParams, warnings: &mut Vec<String>) -> Tensor {
        let (original_size, target_size) = (params.negative_original_size, params.negative_target_size);
        if params.init.is_some() {
            let own = [params.height, params.width];
            let original_size = original_size.or(params.original_size).unwrap_or(own);
            let target_size = target_size.or(params.target_size).unwrap_or(own);
            return self.time_ids_row(original_size, params.crops_coords_top_left, target_size);
        }
        match (original_size, target_size) {
            (Some(original_size), Some(target_size)) => {
                self.time_ids_row(original_size, params.negative_crops_coords_top_left, target_size)
            }
            (one, other) => {
                if one.is_some() || other.is_some() {
                    let what = "negative_original_size and negative_target_size act only together";
                    warnings.push(format!("{what}; the one given was not used"));
                }
                self.time_ids(params)
            }
        }
    }

    /// Original size, crop and target size as one row, height before width: `[1, 6]`.
    fn time_ids_row(&self, original_size: [u32; 2], crop: Option<[u32; 2]>, target_size: [u32; 2]) -> Tensor {
        let ids = [original_size, crop.unwrap_or([0, 0]), target_size];
        let ids: Vec<f32> = ids.concat().into_iter().map(|n| n as f32).collect();
        Tensor::from_slice(&ids).unsqueeze(0).to_kind(self.kind).to_device(self.device)
    }
}

fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}
