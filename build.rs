//! Compiles the C++ shim, keeps libtorch's CUDA half linked, and stamps the commit.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let lib_dir = PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let libtorch = lib_dir.parent().expect("libtorch's lib folder has a parent");

    cc::Build::new()
        .cpp(true)
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

fn git_commit() -> Option<String> {
    if Path::new(".git/HEAD").exists() {
        println!("cargo:rerun-if-changed=.git/HEAD");
    }
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
