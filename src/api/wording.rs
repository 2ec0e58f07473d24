//! How the errors about a request are worded: a fact with the bound and the given value, and a remedy. Whatever a
//! caller sent is shortened before it is repeated, since it may be megabytes.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::Value;

use crate::error::Error;

/// The first `max` characters of `text`, with dots where something is missing.
pub(super) fn shorten(text: &str, max: usize) -> String {
    match text.char_indices().nth(max) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The candidate that looks most like `name`. The first part of a very long name is enough to tell.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = shorten(name, 80).to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&name, &candidate.to_lowercase()), candidate))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// A JSON value's type, with the value itself where it is short.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(value) => format!("the string {:?}", shorten(value, 40)),
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => "an object".into(),
    }
}

pub(super) fn invalid_type(path: &str, expected: &str, given: &Value) -> Error {
    Error::invalid("invalid_type", path, format!("`{path}` must be {expected}, got {}", describe(given)))
        .remedy(format!("send `{path}` as {expected}"))
}

/// A word that is none of the accepted ones.
pub(super) fn invalid_value(field: &str, accepted: &[&str], given: &str) -> Error {
    let accepted = accepted.join(", ");
    Error::invalid("invalid_value", field, format!("`{field}` must be one of {accepted}, got {:?}", shorten(given, 40)))
        .remedy(format!("choose one of {accepted}"))
}

/// Passes `value` on if it lies in `range`; NaN lies in none.
pub(super) fn in_range<T>(field: &str, value: T, range: RangeInclusive<T>) -> Result<T, Error>
where
    T: PartialOrd + Copy + Display,
{
    if range.contains(&value) {
        return Ok(value);
    }
    let (low, high) = (range.start(), range.end());
    let bound = if value > *high { high } else { low };
    Err(Error::invalid("out_of_range", field, format!("`{field}` must be from {low} to {high}, got {value}"))
        .remedy(format!("the nearest accepted value is {bound}")))
}

/// A field of the request whose feature this version does not have.
pub(super) fn unsupported_feature(field: &str, what: &str) -> Error {
    Error::invalid("unsupported_feature", field, format!("{what} is not supported by this version"))
        .remedy(format!("leave `{field}` out"))
}
