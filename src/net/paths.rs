//! Names of files in a job, looked up under the configured folders and nowhere else.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, ErrorClass, Result};

/// Where a job's names are looked for, in order.
#[derive(Debug, Clone, Default)]
pub struct Folders(Vec<PathBuf>);

impl Folders {
    pub fn new(folders: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Folders(folders.into_iter().map(Into::into).collect())
    }

    /// The file that a name or path means. The folders may appear, or change, after this was made: all is asked of the
    /// disk at each call. Links are followed, and what they lead to must lie in the same folder.
    ///
    /// # Errors
    ///
    /// `path_refused`, `file_not_found`, with this `field`. A path outside gives the same answer whether or not there
    /// is a file.
    pub fn resolve(&self, name: &str, field: &str) -> Result<PathBuf> {
        let path = Path::new(name);
        let refused = |message: &str| Err(Error::invalid("path_refused", field, message));
        if name.contains('\0') {
            return refused("a path cannot hold a NUL");
        }
        if path.components().any(|component| component == Component::ParentDir) {
            return refused("a path cannot hold `..`");
        }
        if path.is_absolute() && !self.0.iter().any(|folder| path.starts_with(folder)) {
            return refused("the path is outside the configured folders");
        }
        let mut leads_outside = false;
        for folder in self.0.iter().filter(|folder| path.is_relative() || path.starts_with(folder)) {
            let (Ok(folder), Ok(file)) = (folder.canonicalize(), folder.join(path).canonicalize()) else { continue };
            if !file.starts_with(folder) {
                leads_outside = true;
            } else if file.is_file() {
                return Ok(file);
            }
        }
        if leads_outside {
            return refused("the path leads outside the configured folders");
        }
        let message = "there is no such file in the configured folders";
        Err(Error::new(ErrorClass::NotFound, "file_not_found", message).field(field))
    }

    /// Names of the first files whose names end so, from all folders and one level below, for messages.
    pub fn list(&self, end: &str) -> Vec<String> {
        const MOST: usize = 1000;
        let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut names = Vec::new();
        for folder in &self.0 {
            let below = entries(folder).take(MOST).filter(|path| path.is_dir()).flat_map(|path| entries(&path));
            let files = entries(folder).chain(below).take(MOST);
            let name = |path: PathBuf| path.strip_prefix(folder).ok()?.to_str()?.strip_suffix(end).map(str::to_owned);
            names.extend(files.filter_map(name));
        }
        names
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn code(folders: &Folders, name: &str) -> &'static str {
        let error = folders.resolve(name, "loras[0].name").unwrap_err();
        assert_eq!(error.field.as_deref(), Some("loras[0].name"));
        error.code
    }

    #[test]
    fn names_resolve_under_the_folders_in_order() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let (first, second) = (root.join("first"), root.join("second"));
        fs::create_dir_all(first.join("sub")).unwrap();
        fs::create_dir_all(&second).unwrap();
        for file in [first.join("both"), second.join("both"), second.join("one"), first.join("sub/deep")] {
            fs::write(file, "x").unwrap();
        }
        let folders = Folders::new([root.join("missing"), first.clone(), second.clone()]);
        assert_eq!(folders.resolve("both", "f").unwrap(), first.join("both"));
        assert_eq!(folders.resolve("one", "f").unwrap(), second.join("one"));
        assert_eq!(folders.resolve("sub/./deep", "f").unwrap(), first.join("sub/deep"));
        assert_eq!(folders.resolve(second.join("both").to_str().unwrap(), "f").unwrap(), second.join("both"));
        for name in ["none", "sub/none", "", ".", "sub", "one/", "one/x", "\u{202e}", &"x".repeat(10_000)] {
            assert_eq!(code(&folders, name), "file_not_found", "{name:?}");
        }
    }

    #[test]
    fn nothing_outside_the_folders_is_reached() {
        let root = tempfile::tempdir().unwrap();
        let inside = root.path().join("inside");
        fs::create_dir_all(inside.join("sub")).unwrap();
        // A neighbour whose name begins like the folder's.
        fs::create_dir(root.path().join("inside-not")).unwrap();
        fs::write(root.path().join("inside-not/file"), "x").unwrap();
        fs::write(root.path().join("secret"), "x").unwrap();
        symlink(root.path().join("secret"), inside.join("link")).unwrap();
        symlink("../secret", inside.join("relative")).unwrap();
        symlink(root.path(), inside.join("up")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        let folders = Folders::new([&inside]);
        let neighbour = root.path().join("inside-not/file");
        for name in [
            "../secret",
            "sub/../../secret",
            "sub/..",
            "..",
            "/etc/passwd",
            "/",
            "/none",
            neighbour.to_str().unwrap(),
            "link",
            "relative",
            "up/secret",
            "up/inside-not/file",
            "li\0nk",
        ] {
            assert_eq!(code(&folders, name), "path_refused", "{name:?}");
        }
        assert_eq!(code(&folders, "loop"), "file_not_found");
        assert_eq!(code(&Folders::default(), "x"), "file_not_found");
    }

    #[test]
    fn links_within_a_folder_are_followed() {
        // As in the Hub's cache.
        let root = tempfile::tempdir().unwrap();
        let real = root.path().join("real");
        fs::create_dir_all(real.join("blobs")).unwrap();
        fs::create_dir_all(real.join("snapshots/1")).unwrap();
        fs::write(real.join("blobs/abc"), "x").unwrap();
        symlink("../../blobs/abc", real.join("snapshots/1/model")).unwrap();
        symlink(&real, root.path().join("volume")).unwrap();
        let folders = Folders::new([root.path().join("volume")]);
        let blob = real.canonicalize().unwrap().join("blobs/abc");
        assert_eq!(folders.resolve("snapshots/1/model", "f").unwrap(), blob);
        let path = root.path().join("volume/snapshots/1/model");
        assert_eq!(folders.resolve(path.to_str().unwrap(), "f").unwrap(), blob);
    }

    #[test]
    fn only_regular_files_are_files() {
        let root = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
        assert_eq!(code(&Folders::new([root.path()]), "socket"), "file_not_found");
    }
}
