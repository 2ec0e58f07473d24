//! `<lora:name:0.8>` in a prompt: AUTOMATIC1111's way to ask for a LoRA.

/// A LoRA that a prompt asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LoraTag {
    pub(super) name: String,
    /// 1 where the tag has none.
    pub(super) scale: f64,
}

const OPEN: &str = "<lora:";

/// The text without its tags, and the tags in their order. What has no name, or a scale that is no number, is no tag.
pub(super) fn take_lora_tags(text: &str) -> (String, Vec<LoraTag>) {
    let (mut kept, mut tags) = (String::new(), Vec::new());
    let mut rest = text;
    while let Some(start) = rest.find(OPEN) {
        kept.push_str(&rest[..start]);
        rest = &rest[start..];
        match tag(rest) {
            Some((tag, length)) => {
                tags.push(tag);
                rest = &rest[length..];
            }
            None => {
                kept.push_str(OPEN);
                rest = &rest[OPEN.len()..];
            }
        }
    }
    kept.push_str(rest);
    (kept, tags)
}

/// Whether there is a tag in the text.
pub fn has_lora_tag(text: &str) -> bool {
    !take_lora_tags(text).1.is_empty()
}

/// The tag that `text` begins with, and its length.
fn tag(text: &str) -> Option<(LoraTag, usize)> {
    let inside = &text[OPEN.len()..text.find('>')?];
    let (name, scale) = match inside.split_once(':') {
        Some((name, scale)) => (name.trim(), scale.trim().parse().ok().filter(|scale: &f64| scale.is_finite())?),
        None => (inside.trim(), 1.0),
    };
    let is_name = !name.is_empty() && !name.contains(['<', '\n']);
    is_name.then(|| (LoraTag { name: name.to_owned(), scale }, OPEN.len() + inside.len() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_taken_out_in_their_order() {
        let tag = |name: &str, scale| LoraTag { name: name.into(), scale };
        for (text, kept, tags) in [
            ("a cat", "a cat", vec![]),
            ("a <lora:ink:0.8> cat", "a  cat", vec![tag("ink", 0.8)]),
            ("<lora:a/b-1.5><lora:c d:-1>é", "é", vec![tag("a/b-1.5", 1.0), tag("c d", -1.0)]),
            ("<lora: x : .5 >", "", vec![tag("x", 0.5)]),
            ("<lora:a:b> <lora:a:1:2>", "<lora:a:b> <lora:a:1:2>", vec![]),
            ("<lora:> <lora::1> <lora:a:nan>", "<lora:> <lora::1> <lora:a:nan>", vec![]),
            ("<lora:<lora:x>", "<lora:", vec![tag("x", 1.0)]),
            ("<lora:a", "<lora:a", vec![]),
            ("<LORA:a> <lyco:a>", "<LORA:a> <lyco:a>", vec![]),
        ] {
            assert_eq!(take_lora_tags(text), (kept.to_owned(), tags.clone()), "{text}");
            assert_eq!(has_lora_tag(text), !tags.is_empty());
        }
    }
}
