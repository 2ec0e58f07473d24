use super::block_on;
use crate::cli::EngineArgs;
use crate::config;
use crate::error::{Error, Result};
use crate::hub::{Delivered, Source};

/// The options with a folder wherever they named a model of the Hub: one that is here, else one that is fetched now.
pub(super) fn deliver(arguments: &EngineArgs) -> Result<(EngineArgs, Vec<Delivered>)> {
    let mut arguments = arguments.clone();
    let hub = config::hub(&arguments);
    let mut all = Vec::new();
    for (wanted, place) in config::wanted(&mut arguments) {
        let delivered = match hub.find(&wanted)? {
            Some(here) => here,
            None => block_on(hub.deliver(&wanted))?,
        };
        if delivered.source != Source::Path {
            report(&delivered);
        }
        place.set(&delivered.path);
        all.push(delivered);
    }
    Ok((arguments, all))
}

/// The same, but nothing is fetched.
///
/// # Errors
/// `model_not_here`.
pub(super) fn find(arguments: &EngineArgs) -> Result<EngineArgs> {
    let mut arguments = arguments.clone();
    let hub = config::hub(&arguments);
    for (wanted, place) in config::wanted(&mut arguments) {
        let here = hub.find(&wanted)?.ok_or_else(|| {
            Error::setup("model_not_here", format!("{} is not on this machine yet", wanted.name))
                .remedy("run `sdxl-worker fetch` with the same options; a start fetches it too")
        })?;
        place.set(&here.path);
    }
    Ok(arguments)
}

fn report(Delivered { name, path, source, time, downloaded }: &Delivered) {
    let (path, seconds) = (path.display(), format!("{:.2}", time.as_secs_f64()));
    tracing::info!(name, source = source.name(), %path, seconds, bytes = downloaded, "model found");
}
