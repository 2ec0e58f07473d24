//! Against compel's own parser, by way of `tests/fixtures/prompts.py`.

use serde_json::{Value, json};

use super::*;

fn plain(part: &Part) -> Value {
    let list =
        |fragments: &[Fragment]| -> Value { fragments.iter().map(|one| json!([one.text, one.weight])).collect() };
    match part {
        Part::Prompt(fragments) => json!({ "prompt": list(fragments) }),
        Part::Blend { prompts, weights, normalize } => {
            let prompts: Value = prompts.iter().map(|fragments| list(fragments)).collect();
            json!({ "blend": prompts, "weights": weights, "normalize": normalize })
        }
    }
}

#[test]
fn prompts_are_read_as_compel_reads_them() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("../../../tests/fixtures/prompts.json")).unwrap();
    let (mut compared, mut wrong) = (0, Vec::new());
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let parsed = parse(text, "prompt")
            .map(|parts| parts.iter().map(|(part, weight)| json!([plain(part), weight])).collect::<Value>());
        if case["parts"].is_null() {
            continue; // an exception there; here an error, or what is left of it
        }
        compared += 1;
        match parsed {
            Ok(parsed) if parsed == case["parts"] => {}
            Ok(parsed) => wrong.push(format!("{text:?}: {parsed}, compel {}", case["parts"])),
            Err(error) => wrong.push(format!("{text:?}: {error}")),
        }
    }
    assert!(compared > 500, "{compared}");
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_cannot_be_is_refused() {
    for (text, code) in [
        ("a cat.swap(dog) on a mat", "unsupported_option"),
        ("a (\"big cat\" .swap( dog ))", "unsupported_option"),
        ("a cat withLora(ink, 0.5)", "unsupported_option"),
        ("(\"a\", \"b\").blend(1)", "prompt_syntax"),
        ("(\"a\", \"b\").blend(1, x)", "prompt_syntax"),
        ("(\"a\", \"b\").blend(1, 1) c", "prompt_syntax"),
        ("(\"a\", ()).blend(1, 1)", "prompt_syntax"),
        ("(\"a\", \"b\").and(1, 2, 3)", "prompt_syntax"),
        (&"(".repeat(100), "prompt_syntax"),
    ] {
        let error = parse(text, "negative_prompt").expect_err(text);
        assert_eq!((error.code, error.field.as_deref()), (code, Some("negative_prompt")), "{text}");
        assert!(error.remedy.is_some());
    }
    for text in ["a swap.swapped (b)", "a .swap b", "withLoras (a)", "withLora"] {
        parse(text, "prompt").unwrap();
    }
}

#[test]
fn any_prompt_is_read_in_a_moment() {
    for text in ["( ", "\"( ", "( a ", "\\\"", "(a)+ ", "\"a\", ", "a--", "(a\" ", ") ("] {
        let _ = parse(&text.repeat(20_000 / text.len()), "prompt");
        let _ = parse(&format!("({}", text.repeat(20_000 / text.len())), "prompt");
    }
}
