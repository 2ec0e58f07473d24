//! The platform's URL templates. Substitution never touches what is not a placeholder: `gpu=NVIDIA+GeForce+RTX+4090`
//! stays byte for byte.

/// Templates, as they were given and then as [`Urls::filled`] left them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Urls {
    pub take: String,
    pub done: Option<String>,
    pub stream: Option<String>,
    pub ping: Option<String>,
}

impl Urls {
    /// Puts in everything that is known before there is a job.
    pub fn filled(self, worker_id: &str, gpu_type_id: Option<&str>) -> Urls {
        let common = |template: String| {
            let url = replace(&template, "RUNPOD_POD_ID", worker_id);
            match gpu_type_id {
                Some(gpu) => replace(&url, "RUNPOD_GPU_TYPE_ID", gpu),
                None => url,
            }
        };
        Urls {
            take: replace(&common(self.take), "ID", worker_id),
            done: self.done.map(common),
            stream: self.stream.map(common),
            ping: self.ping.map(|template| replace(&common(template), "ID", worker_id)),
        }
    }

    pub fn take(&self, job_in_progress: bool) -> String {
        with_parameter(&self.take, &format!("job_in_progress={}", u8::from(job_in_progress)))
    }

    /// `None` where the take URL has no segment to exchange.
    pub fn take_batch(&self, size: usize, job_in_progress: bool) -> Option<String> {
        let url = with_parameter(&self.sibling("job-take-batch")?, &format!("batch_size={size}"));
        Some(with_parameter(&url, &format!("job_in_progress={}", u8::from(job_in_progress))))
    }

    pub fn stop(&self) -> Option<String> {
        self.sibling("job-stop")
    }

    pub fn done(&self, job_id: &str, is_stream: bool) -> Option<String> {
        Some(for_job(self.done.as_ref()?, job_id, is_stream))
    }

    pub fn stream(&self, job_id: &str) -> Option<String> {
        Some(for_job(self.stream.as_ref()?, job_id, false))
    }

    /// The take URL with another word in place of its path segment `job-take`.
    fn sibling(&self, segment: &str) -> Option<String> {
        let (path, query) = match self.take.find(['?', '#']) {
            Some(at) => self.take.split_at(at),
            None => (self.take.as_str(), ""),
        };
        let mut segments: Vec<&str> = path.split('/').collect();
        *segments.iter_mut().find(|found| **found == "job-take")? = segment;
        Some(segments.join("/") + query)
    }
}

fn for_job(template: &str, job_id: &str, is_stream: bool) -> String {
    let url = replace(template, "ID", &encode_segment(job_id));
    with_parameter(&url, &format!("isStream={is_stream}"))
}

/// `$NAME` and `${NAME}`; a longer name that begins the same is another placeholder.
fn replace(template: &str, name: &str, value: &str) -> String {
    let template = template.replace(&format!("${{{name}}}"), value);
    let placeholder = format!("${name}");
    let mut url = String::new();
    let mut rest = template.as_str();
    while let Some(at) = rest.find(&placeholder) {
        let after = &rest[at + placeholder.len()..];
        url.push_str(&rest[..at]);
        match after.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            true => url.push_str(&placeholder),
            false => url.push_str(value),
        }
        rest = after;
    }
    url + rest
}

pub fn with_parameter(url: &str, parameter: &str) -> String {
    let glue = if !url.contains('?') {
        "?"
    } else if url.ends_with(['?', '&']) {
        ""
    } else {
        "&"
    };
    format!("{url}{glue}{parameter}")
}

/// Percent-encodes all but what RFC 3986 calls unreserved.
pub fn encode_segment(text: &str) -> String {
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    // A segment of dots alone would be taken for a step through the path.
    let dots = matches!(text, "." | "..");
    text.bytes()
        .map(|byte| if unreserved(byte) && !dots { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(take: &str, done: &str) -> Urls {
        let filled = Urls { take: take.into(), done: Some(done.into()), stream: None, ping: None };
        filled.filled("pod1", Some("NVIDIA+L4"))
    }

    #[test]
    fn both_template_styles_are_filled_and_parameters_glued_right() {
        let production = urls(
            "https://api.runpod.ai/v2/e/job-take/$ID?gpu=NVIDIA+GeForce+RTX+4090",
            "https://api.runpod.ai/v2/e/job-done/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+GeForce+RTX+4090",
        );
        let base = "https://api.runpod.ai/v2/e";
        let gpu = "gpu=NVIDIA+GeForce+RTX+4090";
        assert_eq!(production.take(true), format!("{base}/job-take/pod1?{gpu}&job_in_progress=1"));
        assert_eq!(
            production.take_batch(3, false).unwrap(),
            format!("{base}/job-take-batch/pod1?{gpu}&batch_size=3&job_in_progress=0")
        );
        assert_eq!(production.stop().unwrap(), format!("{base}/job-stop/pod1?{gpu}"));
        assert_eq!(production.done("a-u1", true).unwrap(), format!("{base}/job-done/pod1/a-u1?{gpu}&isStream=true"));

        let harness = urls(
            "http://0.0.0.0:80/v2/IDE/job-take/$RUNPOD_POD_ID",
            "http://0.0.0.0:80/v2/IDE/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID",
        );
        assert_eq!(harness.take(false), "http://0.0.0.0:80/v2/IDE/job-take/pod1?job_in_progress=0");
        assert_eq!(
            harness.done("0", false).unwrap(),
            "http://0.0.0.0:80/v2/IDE/job-done/pod1/0?gpu=NVIDIA+L4&isStream=false"
        );
        assert_eq!(
            urls("http://h/${RUNPOD_POD_ID}/job-take/${ID}", "").take(true),
            "http://h/pod1/job-take/pod1?job_in_progress=1"
        );
    }

    #[test]
    fn an_odd_job_id_is_one_path_segment() {
        let urls = urls("http://h/job-take/$ID", "http://h/$ID/$IDENTITY?");
        assert_eq!(urls.done("a/b c?é", false).unwrap(), "http://h/a%2Fb%20c%3F%C3%A9/$IDENTITY?isStream=false");
        assert_eq!(urls.done("..", false).unwrap(), "http://h/%2E%2E/$IDENTITY?isStream=false");
    }

    #[test]
    fn the_segment_is_exchanged_only_where_it_is_a_segment_of_the_path() {
        for take in ["http://h/take/$ID?next=/job-take/x", "http://h/my-job-take/$ID"] {
            assert_eq!((urls(take, "").stop(), urls(take, "").take_batch(2, false)), (None, None));
        }
    }
}
