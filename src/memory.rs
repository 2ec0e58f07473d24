//! What the system says of this process: how old it is, and how much memory it may still take, so that a request too large
//! is refused before it starts instead of killing the worker.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Bytes of host memory that can still be used: the least of what the machine has free and what the cgroups allow.
/// `None` where neither can be read (not Linux).
pub fn available() -> Option<u64> {
    [machine_available(), cgroup_available(Path::new("/sys/fs/cgroup"))].into_iter().flatten().min()
}

/// How long ago this process began; the clock of the kernel's table ticks in hundredths of a second.
pub fn process_age() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // behind the name, which may hold anything
    let began: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let up: f64 = fs::read_to_string("/proc/uptime").ok()?.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_secs_f64((up - began / 100.0).max(0.0)))
}

fn machine_available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Limit less what is used and cannot be dropped, for cgroup version 2, then 1.
fn cgroup_available(root: &Path) -> Option<u64> {
    let number = |file: &str| fs::read_to_string(root.join(file)).ok()?.trim().parse::<u64>().ok();
    let inactive_file = |file: &str, key: &str| {
        let stat = fs::read_to_string(root.join(file)).ok()?;
        stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok())
    };
    let (limit, used, droppable) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?, inactive_file("memory.stat", "inactive_file ")),
        None => {
            let limit = number("memory/memory.limit_in_bytes")?;
            let used = number("memory/memory.usage_in_bytes")?;
            (limit, used, inactive_file("memory/memory.stat", "total_inactive_file "))
        }
    };
    Some(limit.saturating_sub(used.saturating_sub(droppable.unwrap_or(0))))
}

/// Bytes in the unit a person would use.
pub fn format_bytes(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{bytes} bytes"),
        1_048_576..1_073_741_824 => format!("{:.1} MB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_version_2_limit_counts_page_cache_as_free() {
        let root = cgroup(&[
            ("memory.max", "1000\n"),
            ("memory.current", "900\n"),
            ("memory.stat", "anon 5\ninactive_file 300\n"),
        ]);
        assert_eq!(cgroup_available(root.path()), Some(400));
    }

    #[test]
    fn a_version_1_limit_is_read_too() {
        let root = cgroup(&[("memory/memory.limit_in_bytes", "1000\n"), ("memory/memory.usage_in_bytes", "1200\n")]);
        assert_eq!(cgroup_available(root.path()), Some(0));
    }

    #[test]
    fn no_limit_is_no_bound() {
        let root = cgroup(&[("memory.max", "max\n"), ("memory.current", "900\n")]);
        assert_eq!(cgroup_available(root.path()), None);
    }
}
