//! Finds the folder libtorch is loaded from, before anything is linked against it.
//!
//! The dynamic loader knows neither `LIBTORCH` nor Python's packages, so this is done by a program that needs neither.
//! A `LIBTORCH` that is set is obeyed or refused, never replaced by a lucky find.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The release this program was compiled against: `tch` 0.24 follows libtorch 2.11.
pub const VERSION: &str = "2.11";

const LIBRARY: &str = if cfg!(target_os = "macos") { "libtorch.dylib" } else { "libtorch.so" };

/// A usable libtorch.
#[derive(Debug, PartialEq, Eq)]
pub struct Libtorch {
    /// The folder `libtorch.so` is in, without symbolic links.
    pub lib: PathBuf,
    /// From `version.py` or `build-version`; a system package has neither.
    pub version: Option<String>,
}

/// What the search looks at, read from the process once.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// `LIBTORCH`
    pub libtorch: Option<PathBuf>,
    /// `LIBTORCH_BYPASS_VERSION_CHECK`, which `tch` reads at build time too
    pub any_version: bool,
    /// `LD_LIBRARY_PATH`
    pub library_path: Vec<PathBuf>,
    /// `VIRTUAL_ENV`
    pub virtual_env: Option<PathBuf>,
    pub working_dir: PathBuf,
    /// The folder of the program, without symbolic links.
    pub program_dir: PathBuf,
    /// Asked for its torch package when nothing nearer is found.
    pub python: Option<OsString>,
    /// Where machine-wide installations are: folders of `python3*` and of libtorch itself.
    pub python_roots: Vec<PathBuf>,
    pub system: Vec<PathBuf>,
}

impl Surroundings {
    pub fn of_this_process(program_dir: &Path) -> Self {
        let path = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Surroundings {
            libtorch: path("LIBTORCH"),
            any_version: path("LIBTORCH_BYPASS_VERSION_CHECK").is_some(),
            library_path: env::var_os(library_path_variable()).iter().flat_map(env::split_paths).collect(),
            virtual_env: path("VIRTUAL_ENV"),
            working_dir: env::current_dir().unwrap_or_else(|_| ".".into()),
            program_dir: program_dir.into(),
            python: Some("python3".into()),
            python_roots: ["/usr/local/lib", "/usr/lib"].map(PathBuf::from).into(),
            system: ["/usr/local/libtorch", "/opt/libtorch"].map(PathBuf::from).into(),
        }
    }

    /// Every place to look, nearest first, with the words for a person. Lazy, since the last ones start Python.
    fn places(&self) -> impl Iterator<Item = (&'static str, Vec<PathBuf>)> + '_ {
        let above = |name: &'static str| {
            let above_program = self.program_dir.ancestors().map(move |folder| folder.join(name));
            std::iter::once(self.working_dir.join(name)).chain(above_program).collect::<Vec<_>>()
        };
        type Place<'a> = (&'static str, Box<dyn FnOnce() -> Vec<PathBuf> + 'a>);
        let places: [Place<'_>; 8] = [
            (library_path_variable(), Box::new(|| self.library_path.clone())),
            ("a folder libtorch beside the program", Box::new(|| vec![self.program_dir.join("libtorch")])),
            ("the link .libtorch here and above the program", Box::new(move || above(".libtorch"))),
            (
                "VIRTUAL_ENV",
                Box::new(|| self.virtual_env.iter().flat_map(|venv| packages(&venv.join("lib"))).collect()),
            ),
            (
                ".venv here and above the program",
                Box::new(move || above(".venv").iter().flat_map(|venv| packages(&venv.join("lib"))).collect()),
            ),
            ("the torch package of python3 on PATH", Box::new(|| self.python.iter().filter_map(torch_of).collect())),
            (
                "Python packages in /usr/local/lib and /usr/lib",
                Box::new(|| self.python_roots.iter().flat_map(|root| packages(root)).collect()),
            ),
            ("/usr/local/libtorch and /opt/libtorch", Box::new(|| self.system.clone())),
        ];
        places.into_iter().map(|(name, folders)| (name, folders()))
    }
}

/// The variable that tells the dynamic loader where to look first.
pub fn library_path_variable() -> &'static str {
    if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" }
}

/// Finds the libtorch to run with.
///
/// # Errors
/// `libtorch_not_found`, naming where it looked; `libtorch_version` when all there is has another version.
pub fn find(surroundings: &Surroundings) -> Result<Libtorch> {
    if let Some(folder) = &surroundings.libtorch {
        let Some(found) = libtorch_in(&surroundings.working_dir.join(folder)) else {
            let message =
                format!("LIBTORCH is {}, and there is no {LIBRARY} in it or its lib folder", folder.display());
            return Err(Error::setup("libtorch_not_found", message)
                .remedy("set LIBTORCH to the folder of a libtorch or torch package, or unset it to search for one"));
        };
        return match fits(&found, surroundings) {
            true => Ok(found),
            false => Err(wrong_version(&found)),
        };
    }
    let mut looked = vec!["LIBTORCH: not set"];
    let mut unfit = None;
    for (name, folders) in surroundings.places() {
        for found in folders.iter().filter_map(|folder| libtorch_in(folder)) {
            if fits(&found, surroundings) {
                return Ok(found);
            }
            unfit.get_or_insert(found);
        }
        looked.push(name);
    }
    if let Some(found) = unfit {
        return Err(wrong_version(&found));
    }
    let message = format!("libtorch {VERSION} was not found; looked in:\n    {}", looked.join("\n    "));
    Err(Error::setup("libtorch_not_found", message).remedy(format!("one of these:\n    {}", REMEDIES.join("\n    "))))
}

/// What to do where there is no libtorch, each on its own.
pub const REMEDIES: [&str; 3] = [
    "make setup, in the project's folder",
    "pip install torch==2.11.0, into the python3 on PATH or a virtual environment",
    "set LIBTORCH to the folder of a libtorch 2.11 or of an installed torch package",
];

fn fits(found: &Libtorch, surroundings: &Surroundings) -> bool {
    let is_ours = |version: &String| version == VERSION || version.starts_with(&format!("{VERSION}."));
    surroundings.any_version || found.version.as_ref().is_none_or(is_ours)
}

fn wrong_version(found: &Libtorch) -> Error {
    let version = found.version.as_deref().unwrap_or("unknown");
    let message = format!("libtorch {VERSION} is needed, and {} is version {version}", found.lib.display());
    Error::setup("libtorch_version", message).remedy(
        "pip install torch==2.11.0, or set LIBTORCH to a libtorch 2.11; \
         LIBTORCH_BYPASS_VERSION_CHECK=1 tries this one all the same",
    )
}

/// The libtorch whose root or lib folder this is.
fn libtorch_in(folder: &Path) -> Option<Libtorch> {
    let lib = [folder.join("lib"), folder.into()].into_iter().find(|lib| lib.join(LIBRARY).exists())?;
    let lib = lib.canonicalize().ok()?;
    let version = lib.parent().and_then(version_of);
    Some(Libtorch { lib, version })
}

/// `__version__ = '2.11.0+cu130'` of a Python package, or the one line of a libtorch archive.
fn version_of(root: &Path) -> Option<String> {
    if let Ok(text) = fs::read_to_string(root.join("version.py")) {
        let quoted = text.lines().find_map(|line| line.strip_prefix("__version__")?.split(['\'', '"']).nth(1));
        if let Some(version) = quoted {
            return Some(version.to_owned());
        }
    }
    let text = fs::read_to_string(root.join("build-version")).ok()?;
    Some(text.trim().to_owned())
}

/// The torch packages of every Python under `lib`, as `lib/python3.12/site-packages/torch`.
fn packages(lib: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(lib).into_iter().flatten().flatten();
    let pythons = entries
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    let mut pythons: Vec<_> = pythons.collect();
    pythons.sort();
    pythons
        .iter()
        .flat_map(|python| ["site-packages/torch", "dist-packages/torch"].map(|path| python.join(path)))
        .collect()
}

/// Asks a Python where its torch package is. It is not imported, which would take seconds.
fn torch_of(python: &OsString) -> Option<PathBuf> {
    // The working folder is no place for packages: a folder `torch` there is somebody's data.
    let question = "import sys; sys.path = [p for p in sys.path if p]; from importlib.util import find_spec; \
                    spec = find_spec('torch'); print(*(spec.submodule_search_locations if spec else []), sep='\\n')";
    let output = run_briefly(Command::new(python).args(["-c", question]), Duration::from_secs(10))?;
    let answer = String::from_utf8(output.stdout).ok()?;
    answer.lines().next().filter(|line| !line.is_empty()).map(PathBuf::from)
}

/// Runs a command whose output is short, and ends it when it takes too long.
pub fn run_briefly(command: &mut Command, limit: Duration) -> Option<Output> {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(_)) => return child.wait_with_output().ok(),
            Ok(None) if start.elapsed() < limit => thread::sleep(Duration::from_millis(2)),
            _ => {
                child.kill().ok();
                child.wait().ok();
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like an installed torch package of this version.
    fn install(root: &Path, version: &str) -> PathBuf {
        fs::create_dir_all(root.join("lib")).unwrap();
        fs::write(root.join("lib").join(LIBRARY), "").unwrap();
        fs::write(root.join("version.py"), format!("import x\n__version__ = '{version}'\ndebug = False\n")).unwrap();
        root.join("lib").canonicalize().unwrap()
    }

    /// An empty machine: nothing set, nothing installed, no Python.
    fn machine(root: &Path) -> Surroundings {
        let folder = |name: &str| {
            fs::create_dir_all(root.join(name)).unwrap();
            root.join(name).canonicalize().unwrap()
        };
        Surroundings {
            working_dir: folder("elsewhere"),
            program_dir: folder("project/target/release"),
            ..Surroundings::default()
        }
    }

    #[test]
    fn an_empty_machine_is_told_where_the_search_went_and_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let error = find(&machine(root.path())).unwrap_err();
        assert_eq!(error.code, "libtorch_not_found");
        assert_eq!(error.class.exit_code(), 3);
        assert!(error.message.contains("LIBTORCH: not set") && error.message.contains("VIRTUAL_ENV"), "{error}");
        assert!(error.remedy.unwrap().contains("pip install torch==2.11.0"));
    }

    #[test]
    fn libtorch_may_name_the_package_or_its_lib_folder() {
        let root = tempfile::tempdir().unwrap();
        let lib = install(&root.path().join("torch"), "2.11.0+cu130");
        for named in [root.path().join("torch"), root.path().join("torch/lib")] {
            let found = find(&Surroundings { libtorch: Some(named), ..machine(root.path()) }).unwrap();
            assert_eq!(found, Libtorch { lib: lib.clone(), version: Some("2.11.0+cu130".into()) });
        }
    }

    #[test]
    fn a_libtorch_that_is_set_wrongly_is_an_error_though_another_could_be_found() {
        let root = tempfile::tempdir().unwrap();
        install(&root.path().join("project/.libtorch"), "2.11.0");
        let wrong = Surroundings { libtorch: Some(root.path().join("nowhere")), ..machine(root.path()) };
        let error = find(&wrong).unwrap_err();
        assert_eq!(error.code, "libtorch_not_found");
        assert!(error.message.contains("nowhere"), "{error}");
    }

    #[test]
    fn the_link_above_the_program_is_found_from_any_folder_and_resolved() {
        let root = tempfile::tempdir().unwrap();
        let lib = install(&root.path().join("site-packages/torch"), "2.11.0");
        let machine = machine(root.path());
        std::os::unix::fs::symlink(root.path().join("site-packages/torch"), root.path().join("project/.libtorch"))
            .unwrap();
        assert_eq!(find(&machine).unwrap().lib, lib);
    }

    #[test]
    fn the_nearest_place_wins() {
        let root = tempfile::tempdir().unwrap();
        let mut machine = machine(root.path());
        machine.system = vec![root.path().join("system")];
        machine.virtual_env = Some(root.path().join("venv"));
        let steps = ["system", "venv/lib/python3.12/site-packages/torch", "project/.libtorch", "elsewhere/.libtorch"];
        for place in steps {
            let lib = install(&root.path().join(place), "2.11.0");
            assert_eq!(find(&machine).unwrap().lib, lib);
        }
        let lib = install(&machine.program_dir.join("libtorch"), "2.11.0");
        assert_eq!(find(&machine).unwrap().lib, lib);
    }

    #[test]
    fn another_version_is_passed_over_when_there_is_a_right_one() {
        let root = tempfile::tempdir().unwrap();
        let mut machine = machine(root.path());
        install(&root.path().join("elsewhere/.libtorch"), "2.5.1");
        machine.system = vec![root.path().join("system")];
        let lib = install(&root.path().join("system"), "2.11.0a0+nv26.02");
        assert_eq!(find(&machine).unwrap().lib, lib);
    }

    #[test]
    fn another_version_alone_is_an_error_that_names_both_unless_it_is_bypassed() {
        let root = tempfile::tempdir().unwrap();
        let mut machine = machine(root.path());
        let lib = install(&root.path().join("project/.libtorch"), "2.110.0");
        let error = find(&machine).unwrap_err();
        assert_eq!(error.code, "libtorch_version");
        assert!(error.message.contains("libtorch 2.11 is needed") && error.message.contains("2.110.0"), "{error}");
        machine.any_version = true;
        assert_eq!(find(&machine).unwrap().lib, lib);
    }

    #[test]
    fn the_version_of_an_archive_is_read_and_a_system_library_has_none() {
        let root = tempfile::tempdir().unwrap();
        install(root.path(), "2.11.0");
        fs::remove_file(root.path().join("version.py")).unwrap();
        assert_eq!(libtorch_in(root.path()).unwrap().version, None);
        fs::write(root.path().join("build-version"), "2.11.0+cpu\n").unwrap();
        assert_eq!(libtorch_in(root.path()).unwrap().version.as_deref(), Some("2.11.0+cpu"));
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let start = Instant::now();
        assert!(run_briefly(Command::new("sleep").arg("60"), Duration::from_millis(50)).is_none());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
