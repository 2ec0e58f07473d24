use super::block_on;
use crate::cli::EngineArgs;
use crate::config;
use crate::error::Result;
use crate::memory::format_bytes;

/// Fetches what the options name into the cache, and prints where each is.
pub fn fetch(arguments: &EngineArgs) -> Result<()> {
    let mut arguments = arguments.clone();
    if arguments.model.is_none() {
        arguments.model = Some(config::model(&arguments)?.display().to_string());
    }
    let hub = config::hub(&arguments);
    let mut paths = Vec::new();
    for (wanted, _) in config::wanted(&mut arguments) {
        let found = block_on(hub.fetch(&wanted))?;
        let (source, bytes, seconds) = (found.source.name(), format_bytes(found.downloaded), found.time.as_secs_f64());
        eprintln!("{}: {source}, {bytes} downloaded, {seconds:.1} s", found.name);
        paths.push(found.path);
    }
    for path in paths {
        println!("{}", path.display());
    }
    Ok(())
}
