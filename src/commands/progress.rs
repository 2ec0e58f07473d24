use std::io::{IsTerminal, stderr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::context::{JobContext, Progress};

/// How often a line is printed where there is no terminal to draw on.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A context that shows progress on stderr: a bar on a terminal, now and then a line elsewhere, nothing when quiet.
pub(super) fn shown(quiet: bool) -> JobContext {
    if quiet {
        JobContext::default()
    } else if stderr().is_terminal() {
        bar()
    } else {
        lines()
    }
}

fn bar() -> JobContext {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = "{msg:12} {wide_bar} step {pos}/{len}  {per_sec}  {eta} left";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template").with_key(
        "per_sec",
        |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
            write!(out, "{:.2} it/s", state.per_sec()).ok();
        },
    ));
    JobContext::new(move |progress| match progress {
        Progress::Denoising { step, steps, .. } => {
            if step == 0 {
                bar.reset();
            }
            bar.set_length(steps as u64);
            bar.set_message("denoising");
            bar.set_position(step as u64);
        }
        Progress::Decoding => {
            bar.set_message("decoding");
            bar.finish();
        }
    })
}

fn lines() -> JobContext {
    let last: Mutex<Option<(Instant, Instant)>> = Mutex::new(None);
    JobContext::new(move |progress| {
        let Progress::Denoising { step, steps, .. } = progress else {
            return;
        };
        let mut last = last.lock().expect("printing does not panic");
        let now = Instant::now();
        let (started, printed) = *last.get_or_insert((now, now));
        if step > 0 && (step == steps || now - printed >= LINE_INTERVAL) {
            let per_second = step as f64 / (now - started).as_secs_f64();
            let left = (steps - step) as f64 / per_second;
            eprintln!("step {step}/{steps}, {per_second:.2} it/s, {left:.0} s left");
            *last = Some((started, now));
        }
    })
}
