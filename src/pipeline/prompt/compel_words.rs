//! The pieces of compel's prompt syntax: where a word, a quote, a row of signs or a number ends.

/// The base of `word++` and of `word--`.
const PLUS: f64 = 1.1;
const MINUS: f64 = 0.9;
/// What a word cannot hold without a backslash.
const SYNTAX: &str = "()\",.+-=";
pub(super) const WHITE: [char; 6] = [' ', '\t', '\n', '\r', '\x0b', '\x0c'];

/// Bytes of the word that `text` begins with: anything but white space and syntax, which a backslash makes harmless; a
/// sign also counts if more of the word follows it.
pub(super) fn word_length(text: &str) -> usize {
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let mut following = rest[c.len_utf8()..].chars();
        let next = following.next();
        let taken = match c {
            '\\' if next.is_some_and(|next| SYNTAX.contains(next)) => 2,
            '+' | '-' if next.is_some_and(|next| !WHITE.contains(&next) && !SYNTAX.contains(next)) => 1,
            c if WHITE.contains(&c) || SYNTAX.contains(c) => break,
            c => c.len_utf8(),
        };
        rest = &rest[taken..];
    }
    text.len() - rest.len()
}

/// What stands between the quotes at `at`, with quotes inside marked by a backslash, and where they end.
pub(super) fn quoted(text: &str, at: usize) -> Option<(String, usize)> {
    let content = text[at..].strip_prefix('"')?;
    let line = &content[..content.find(['\n', '\r']).unwrap_or(content.len())];
    let closes = |(place, _): &(usize, &str)| !line[..*place].ends_with('\\');
    // a quote behind a backslash closes only where no other does
    let place = line.match_indices('"').find(closes).or_else(|| line.rmatch_indices('"').next())?.0;
    let mut inside = line[..place].to_owned();
    for escape in ["\\t", "\\n", "\\f", "\\r"] {
        inside = inside.replace(escape, " ");
    }
    Some((inside, at + 1 + place + 1))
}

/// `++` or `--`: the weight and its length.
pub(super) fn signs(text: &str) -> Option<(f64, usize)> {
    let sign = text.chars().next().filter(|c| "+-".contains(*c))?;
    let count = text.len() - text.trim_start_matches(sign).len();
    let base: f64 = if sign == '+' { PLUS } else { MINUS };
    Some((base.powf(count as f64), count))
}

/// `1.5`, `.5`, `1.` or `2`, also negative: the number and its length.
pub(super) fn number(text: &str) -> Option<(f64, usize)> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = |text: &str| text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let whole = digits(unsigned);
    let fraction = unsigned[whole..].strip_prefix('.').map(digits);
    let length = match (whole, fraction) {
        (0, None | Some(0)) => return None,
        (_, None) if text.starts_with('+') => return None, // compel reads +1.5 and not +1
        (whole, None) => whole,
        (whole, Some(fraction)) => whole + 1 + fraction,
    };
    let length = text.len() - unsigned.len() + length;
    Some((text[..length].parse().ok()?, length))
}
