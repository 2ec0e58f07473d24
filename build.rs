//! Compiles the C++ shim, with CUDA graphs where CUDA's headers are, keeps libtorch's CUDA half linked, and stamps the commit.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let lib_dir = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let libtorch = lib_dir.parent().expect("libtorch's lib folder has a parent");

    let cuda_include = cuda_include(libtorch).filter(|_| lib_dir.join("libtorch_cuda.so").exists());
    let mut shim = cc::Build::new();
    if let Some(include) = &cuda_include {
        shim.define("SHIM_CUDA_GRAPHS", None).include(include);
        // what the shim calls there; nothing of CUDA's own libraries
        println!("cargo:rustc-link-lib=dylib=torch_cuda");
        println!("cargo:rustc-link-lib=dylib=c10_cuda");
    }
    shim.cpp(true)
        .std("c++17")
        .warnings(false)
        .debug(false)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .file("src/torch/shim.cpp")
        .compile("sdxl_worker_shim");
    println!("cargo:rerun-if-changed=src/torch/shim.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");

    let target_os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    // Tests and `cargo run` start without the launcher, so they need to know where libtorch was at build time.
    if matches!(target_os.as_str(), "linux" | "macos") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib_dir.display());
    }
    // Nothing here names a CUDA symbol, so the linker would drop the library that registers the CUDA kernels.
    if target_os == "linux" && lib_dir.join("libtorch_cuda.so").exists() {
        for argument in ["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"] {
            println!("cargo:rustc-link-arg-bin=sdxl-worker-engine={argument}");
        }
    }
    println!("cargo:rustc-env=GIT_COMMIT={}", git_commit().unwrap_or_else(|| "unknown".into()));
}

/// CUDA's headers: those of an installation, else the ones that Triton brings beside a torch that pip installed. The shim
/// needs names of types and enumerations that all versions share.
fn cuda_include(libtorch: &Path) -> Option<PathBuf> {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    let packages = libtorch.canonicalize().ok().and_then(|torch| torch.parent().map(Path::to_owned));
    let triton = packages.map(|packages| packages.join("triton/backends/nvidia/include"));
    let candidates = [home, Some("/usr/local/cuda/include".into()), triton];
    candidates.into_iter().flatten().find(|folder| folder.join("cuda_runtime.h").exists())
}

/// Named by the variable where there is no repository, as in an image's build.
fn git_commit() -> Option<String> {
    println!("cargo:rerun-if-env-changed=GIT_COMMIT");
    if let Some(given) = std::env::var("GIT_COMMIT").ok().filter(|given| !given.is_empty()) {
        return Some(given);
    }
    if Path::new(".git/HEAD").exists() {
        println!("cargo:rerun-if-changed=.git/HEAD");
    }
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
