//! The syntax alone; what is made of it is compared in `tests/parity/test_prompts.py`.

use super::*;

fn parts(text: &str) -> Vec<(String, f64)> {
    let rounded = |weight: f64| (weight * 1e6).round() / 1e6;
    parse(text)
        .into_iter()
        .map(|part| match part {
            Part::Text(text, weight) => (text, rounded(weight)),
            Part::Break => ("|".into(), 0.0),
        })
        .collect()
}

#[test]
fn brackets_weigh_what_is_inside() {
    for (text, expected) in [
        ("a cat", vec![("a cat", 1.0)]),
        ("a (cat)", vec![("a ", 1.0), ("cat", 1.1)]),
        ("a [cat] b", vec![("a ", 1.0), ("cat", 0.909091), (" b", 1.0)]),
        ("((a) b:1.5)", vec![("a", 1.65), (" b", 1.5)]),
        ("(a:-.5) (b: +2. )", vec![("a", -0.5), (" ", 1.0), ("b", 2.0)]),
        // not closed, not opened, closed by the other kind
        ("a (b [c", vec![("a ", 1.0), ("b ", 1.1), ("c", 1.0)]),
        ("a) b] c", vec![("a) b] c", 1.0)]),
        ("a (b] c)", vec![("a ", 1.0), ("b] c", 1.1)]),
        // a weight without its bracket is text, and so is one that is no number
        ("a:1.5) b", vec![("a:1.5) b", 1.0)]),
        ("(a:b) (c:1.2.3)", vec![("a:b", 1.1), (" ", 1.0), ("c:1.2.3", 1.1)]),
        ("[a:1.5)", vec![("a:1.5)", 0.909091)]),
        (r"\(a\) \[b\] \\ (c\))", vec![(r"(a) [b] \ ", 1.0), ("c)", 1.1)]),
        (r"a\b", vec![("ab", 1.0)]),
        ("", vec![]),
        ("(a é:0.5)ß", vec![("a é", 0.5), ("ß", 1.0)]),
    ] {
        let expected: Vec<_> = expected.into_iter().map(|(text, weight)| (text.to_owned(), weight)).collect();
        let given: Vec<_> = parts(text).into_iter().filter(|(text, _)| !text.is_empty()).collect();
        assert_eq!(given, expected, "{text}");
    }
}

#[test]
fn break_is_a_word_and_takes_the_space_around_it() {
    let texts = |text: &str| parts(text).into_iter().map(|(text, _)| text).collect::<Vec<_>>();
    assert_eq!(texts("a\n BREAK  b"), ["a", "|", "b"]);
    assert_eq!(texts("BREAK"), ["", "|", ""]);
    assert_eq!(texts("a BREAK BREAK b"), ["a", "|", "", "|", "b"]);
    assert_eq!(texts("BREAKs _BREAK 1BREAK break"), ["BREAKs _BREAK 1BREAK break"]);
    assert_eq!(texts("a,BREAK,b"), ["a,", "|", ",b"]);
    // inside of brackets too
    assert_eq!(parts("(a BREAK b:2)"), [("a".into(), 2.0), ("|".into(), 0.0), ("b".into(), 2.0)]);
}

#[test]
fn any_prompt_is_read_in_a_moment() {
    for text in ["(", "[", ":", "\\", "(:", "):1.5)", "BREAK ", "([:1.5)é"] {
        parse(&text.repeat(20_000 / text.len()));
    }
}
