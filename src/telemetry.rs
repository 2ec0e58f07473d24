//! Log lines: one JSON object each on RunPod's platform, a line for a person elsewhere. Never a job's input or output.

use std::fmt::Write as _;
use std::io::{self, Write};

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, util::SubscriberInitExt};

/// The longest message, in characters; the platform's own SDK cuts there too.
const MAX_MESSAGE: usize = 4096;
/// The field, of an event or of a span around it, that names the job.
const REQUEST_ID: &str = "request_id";

/// How lines look, and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `{"requestId": ..., "message": ..., "level": ...}` on stdout, which the platform collects.
    Platform,
    /// `INFO   | <job> | <message>` on stderr.
    Human,
}

/// Sends this process's log lines to where they belong. `level` as in `info`.
pub fn init(level: &str, format: LogFormat) {
    let filter = EnvFilter::new(format!("sdxl_worker={level},sdxl_worker_engine={level}"));
    tracing_subscriber::registry().with(Lines(format).with_filter(filter)).init();
}

struct Lines(LogFormat);

/// The job that a span belongs to.
struct RequestId(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut words = Words::default();
        attributes.record(&mut words);
        if let (Some(request_id), Some(span)) = (words.request_id, context.span(id)) {
            span.extensions_mut().insert(RequestId(request_id));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut words = Words::default();
        event.record(&mut words);
        let from_span = || {
            let spans = context.event_scope(event).into_iter().flatten();
            spans.filter_map(|span| span.extensions().get::<RequestId>().map(|id| id.0.clone())).next()
        };
        let request_id = words.request_id.take().or_else(from_span);
        let line = line(self.0, *event.metadata().level(), request_id, &cut(&(words.message + &words.fields)));
        // a log that cannot be written must not end the job it tells of
        match self.0 {
            LogFormat::Platform => writeln!(io::stdout().lock(), "{line}").ok(),
            LogFormat::Human => writeln!(io::stderr().lock(), "{line}").ok(),
        };
    }
}

fn line(format: LogFormat, level: Level, request_id: Option<String>, message: &str) -> String {
    let level = level.as_str();
    match format {
        LogFormat::Platform => {
            let request_id = request_id.map_or(Value::Null, Value::from);
            json!({ "requestId": request_id, "message": message, "level": level }).to_string()
        }
        LogFormat::Human => match request_id {
            Some(id) => format!("{level:<7}| {id} | {message}"),
            None => format!("{level:<7}| {message}"),
        },
    }
}

/// Takes the middle out of a message that is too long.
fn cut(message: &str) -> String {
    let length = message.chars().count();
    if length <= MAX_MESSAGE {
        return message.to_owned();
    }
    let half = MAX_MESSAGE / 2 - 20;
    let head: String = message.chars().take(half).collect();
    let tail: String = message.chars().skip(length - half).collect();
    format!("{head} ...{} cut... {tail}", length - 2 * half)
}

/// An event's message, its other fields as ` key=value`, and the job's id.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
    request_id: Option<String>,
}

impl Words {
    fn add(&mut self, field: &Field, value: String) {
        match field.name() {
            "message" => self.message = value,
            REQUEST_ID => self.request_id = Some(value),
            name => write!(self.fields, " {name}={value}").expect("writing to a string"),
        }
    }
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_platform_gets_one_json_object_a_line() {
        let text = line(LogFormat::Platform, Level::INFO, Some("a-u1".into()), "done \"now\"\nreally");
        assert_eq!(text, r#"{"requestId":"a-u1","message":"done \"now\"\nreally","level":"INFO"}"#);
        let text = line(LogFormat::Platform, Level::WARN, None, "idle");
        assert_eq!(text, r#"{"requestId":null,"message":"idle","level":"WARN"}"#);
    }

    #[test]
    fn a_person_gets_level_job_and_message() {
        assert_eq!(line(LogFormat::Human, Level::INFO, Some("a-u1".into()), "done"), "INFO   | a-u1 | done");
        assert_eq!(line(LogFormat::Human, Level::ERROR, None, "gone"), "ERROR  | gone");
    }

    #[test]
    fn a_long_message_loses_its_middle() {
        let text = cut(&format!("start{}end", "é".repeat(10_000)));
        assert!(text.chars().count() <= MAX_MESSAGE && text.starts_with("start") && text.ends_with("end"));
        assert!(text.contains("cut"));
    }
}
