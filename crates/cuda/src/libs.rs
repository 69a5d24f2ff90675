//! Where the libraries are: by the loader's own search, then in the folders where they are usually installed.

use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use spec::{Error, Result};

/// A library that is loaded when it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver's own, installed with it.
    Driver,
    /// The compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Collectives between GPUs.
    Nccl,
}

/// Every library, in the order in which they are needed.
pub(crate) const LIBRARIES: [Library; 4] =
    [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Nccl];

impl Library {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "driver",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
            Library::Nccl => "NCCL",
        }
    }

    /// File names, the likeliest first.
    fn files(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
            Library::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    fn how_to_get(self) -> &'static str {
        match self {
            Library::Driver => "install NVIDIA's driver (580 or later), or give the container --gpus all",
            _ => {
                "install the CUDA toolkit or NVIDIA's Python packages (nvidia-cuda-nvrtc, nvidia-cublas, \
                 nvidia-nccl-cu13), or name their folder in CUDA_HOME or LD_LIBRARY_PATH"
            }
        }
    }
}

/// Loads a library for the whole process and says which file it was.
///
/// # Errors
/// If no name is found anywhere: which names were looked for where.
pub(crate) fn load(library: Library) -> Result<PathBuf> {
    static LOADED: Mutex<Vec<(Library, PathBuf)>> = Mutex::new(Vec::new());
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, path)) = loaded.iter().find(|(l, _)| *l == library) {
        return Ok(path.clone());
    }
    let folders = folders();
    let by_loader = library.files().iter().map(PathBuf::from);
    let by_folder = folders.iter().flat_map(|d| library.files().iter().map(move |f| d.join(f)));
    for path in by_loader.chain(by_folder.filter(|p| p.exists())) {
        if open(&path) {
            loaded.push((library, path.clone()));
            return Ok(path);
        }
    }
    let places: Vec<String> = folders.iter().map(|d| d.display().to_string()).collect();
    Err(Error::user(format!(
        "{} not found: looked for {} in the loader's path and in {}",
        library.name(),
        library.files().join(", "),
        places.join(", ")
    ))
    .hint(library.how_to_get()))
}

/// Opens a file for all later lookups by its own name.
fn open(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_encoded_bytes()) else { return false };
    // SAFETY: a terminated string; the library stays loaded, so nothing that comes of it dangles.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
}

/// A function of `whose` library, which [`load`] has opened.
pub(crate) fn symbol(name: &str, whose: &str) -> Result<*mut c_void> {
    let c = CString::new(name).map_err(|_| Error::failure("a name with a zero byte"))?;
    // SAFETY: a terminated name.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c.as_ptr()) };
    if found.is_null() { Err(Error::failure(format!("{whose} has no {name}"))) } else { Ok(found) }
}

/// Folders that exist among those where toolkits and Python packages put libraries.
fn folders() -> Vec<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut all = Vec::new();
    for home in [set("CUDA_HOME"), set("CUDA_PATH"), Some("/usr/local/cuda".into())].into_iter().flatten() {
        all.extend([home.join("lib64"), home.join("lib"), home.join("targets/x86_64-linux/lib")]);
    }
    all.extend(
        ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib"].map(PathBuf::from),
    );
    for root in python_roots() {
        all.extend(
            ["cu13/lib", "cuda_nvrtc/lib", "cublas/lib", "nccl/lib"].map(|d| root.join("nvidia").join(d)),
        );
    }
    all.retain(|d| d.is_dir());
    all.dedup();
    all
}

/// The package folders of the Python that is in use: an active environment, or the first `python3` in the path.
fn python_roots() -> Vec<PathBuf> {
    let environment = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let python = std::env::split_paths(&path).find(|d| d.join("python3").exists());
    let mut roots = Vec::new();
    for prefix in environment.into_iter().chain(python.and_then(|bin| bin.parent().map(Path::to_owned))) {
        let Ok(versions) = std::fs::read_dir(prefix.join("lib")) else { continue };
        let mut found: Vec<PathBuf> =
            versions.flatten().map(|v| v.path().join("site-packages")).filter(|p| p.is_dir()).collect();
        found.sort();
        roots.extend(found);
    }
    roots
}
