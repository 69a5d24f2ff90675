//! The site's MPI library, found and loaded at run time through the standard's binary interface (MPI 5.0, chapter 20).
//!
//! The interface fixes what used to differ from library to library: the name of the file, the values of constants, the
//! layout of a status. One program then runs over any library that has it; older ones have interfaces of their own.

use spec::{Error, Result};
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// The file's name under the standard's interface, version 1.
pub(super) const NAME: &str = "libmpi_abi.so.1";
/// Libraries with interfaces of their own: Open MPI up to 5, MPICH and its descendants up to 4, the draft of the standard's.
const OLDER: [&str; 4] = ["libmpi_abi.so.0", "libmpi.so.40", "libmpi.so.12", "libmpi.so"];
/// Names the library to load.
const VARIABLE: &str = "PHALANX_MPI";
/// Where distributions put libraries; the loader looks there by itself, but does not say what else is there.
const USUAL: [&str; 5] =
    ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];

/// Handles of communicators, types and requests: pointers whose predefined values are small numbers.
pub(super) type Handle = usize;

pub(super) const COMM_WORLD: Handle = 0x101;
pub(super) const ERRORS_RETURN: Handle = 0x143;
pub(super) const REQUEST_NULL: Handle = 0x180;
pub(super) const FLOAT: Handle = 0x210;
pub(super) const BYTE: Handle = 0x247;
pub(super) const SUM: Handle = 0x21;
pub(super) const ANY_SOURCE: c_int = -1;
/// Calls from any thread, one at a time.
pub(super) const THREAD_SERIALIZED: c_int = 2048;
pub(super) const SUCCESS: c_int = 0;
const ERROR_STRING_BYTES: usize = 512;
const VERSION_BYTES: usize = 8192;

/// What is known of a message that has arrived.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Status {
    pub(super) source: c_int,
    tag: c_int,
    error: c_int,
    internal: [c_int; 5],
}

macro_rules! functions {
    ($($field:ident = $name:literal: fn($($argument:ty),*);)*) => {
        /// The functions that are used, each as the standard declares it; all give an error code.
        #[derive(Clone, Copy)]
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            /// # Safety
            /// `library` has the standard's binary interface.
            unsafe fn of(library: &libloading::Library) -> Result<Functions, libloading::Error> {
                // SAFETY: the standard gives these names these types.
                unsafe { Ok(Functions { $($field: *library.get($name)?,)* }) }
            }
        }
    };
}

functions! {
    abi_get_version = b"MPI_Abi_get_version\0": fn(*mut c_int, *mut c_int);
    init_thread = b"MPI_Init_thread\0": fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    finalize = b"MPI_Finalize\0": fn();
    abort = b"MPI_Abort\0": fn(Handle, c_int);
    comm_rank = b"MPI_Comm_rank\0": fn(Handle, *mut c_int);
    comm_size = b"MPI_Comm_size\0": fn(Handle, *mut c_int);
    comm_set_errhandler = b"MPI_Comm_set_errhandler\0": fn(Handle, Handle);
    isend = b"MPI_Isend\0": fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    irecv = b"MPI_Irecv\0": fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle);
    test = b"MPI_Test\0": fn(*mut Handle, *mut c_int, *mut Status);
    cancel = b"MPI_Cancel\0": fn(*mut Handle);
    get_count = b"MPI_Get_count\0": fn(*const Status, Handle, *mut c_int);
    error_string = b"MPI_Error_string\0": fn(c_int, *mut c_char, *mut c_int);
    library_version = b"MPI_Get_library_version\0": fn(*mut c_char, *mut c_int);
    allreduce = b"MPI_Allreduce\0": fn(*const c_void, *mut c_void, c_int, Handle, Handle, Handle);
}

/// A library that is loaded, for as long as the process lives.
pub(super) struct Library {
    pub(super) functions: Functions,
    pub(super) path: PathBuf,
    /// As it says itself, in one line.
    pub(super) version: String,
}

impl Library {
    /// Finds a library and loads it; nothing of it is started.
    ///
    /// # Errors
    /// There is none with the standard's interface: names and places that were tried, and what else is there.
    pub(super) fn load() -> Result<Library> {
        let given = std::env::var_os(VARIABLE).filter(|v| !v.is_empty());
        let (candidates, dirs) = match &given {
            Some(path) => (vec![PathBuf::from(path)], Vec::new()),
            None => {
                let dirs = beside_launchers();
                let found = dirs.iter().map(|d| d.join(NAME)).filter(|p| p.exists());
                (std::iter::once(PathBuf::from(NAME)).chain(found).collect::<Vec<_>>(), dirs)
            }
        };
        let mut why = None;
        for candidate in &candidates {
            // SAFETY: what is loaded is what the person or the site calls an MPI library; its constructors run.
            match unsafe { open(candidate) } {
                Ok(library) => return Library::of(library, candidate),
                Err(e) => why = Some(e).filter(|_| candidate.exists()).or(why),
            }
        }
        Err(missing(given, &dirs, why))
    }

    fn of(library: libloading::Library, path: &Path) -> Result<Library> {
        // SAFETY: the file's name promises the standard's interface, and its version is looked at first.
        let functions = unsafe { Functions::of(&library) };
        let functions = functions.map_err(|e| {
            Error::user(format!("{} has not the standard's binary interface: {}", path.display(), full(&e)))
                .hint(GET)
        })?;
        // Libraries leave threads and handlers behind: none is ever unloaded.
        std::mem::forget(library);
        let (mut major, mut minor) = (-1, -1);
        // SAFETY: both are written; the call is allowed before the library is started.
        let code = unsafe { (functions.abi_get_version)(&raw mut major, &raw mut minor) };
        if code != SUCCESS || major != 1 {
            return Err(Error::user(format!(
                "{} has version {major}.{minor} of the standard's binary interface, expected 1",
                path.display()
            ))
            .hint(GET));
        }
        let mut text = vec![0u8; VERSION_BYTES];
        let mut bytes: c_int = 0;
        // SAFETY: room for the longest; the call is allowed before the library is started.
        unsafe { (functions.library_version)(text.as_mut_ptr().cast(), &raw mut bytes) };
        Ok(Library { functions, path: path.to_owned(), version: first_line(&text) })
    }

    /// What an error code means, in the library's words.
    pub(super) fn words(&self, code: c_int) -> String {
        let mut text = vec![0u8; ERROR_STRING_BYTES];
        let mut bytes: c_int = 0;
        // SAFETY: room for the longest.
        unsafe { (self.functions.error_string)(code, text.as_mut_ptr().cast(), &raw mut bytes) };
        let words = CStr::from_bytes_until_nul(&text).map_or_else(|_| "?".into(), CStr::to_string_lossy);
        words.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// `MPICH Version: 5.0.2` of the many lines that libraries say about themselves.
fn first_line(text: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(text).map_or_else(|_| "".into(), CStr::to_string_lossy);
    let line = text.lines().next().unwrap_or("unnamed");
    line.split_whitespace().collect::<Vec<_>>().join(" ").replace(" Version:", "")
}

/// # Safety
/// The library's constructors run.
unsafe fn open(path: &Path) -> Result<libloading::Library, libloading::Error> {
    use libloading::os::unix::{Library as Unix, RTLD_GLOBAL, RTLD_NOW};
    // Parts that the library itself loads later look for its symbols.
    // SAFETY: passed on from the caller.
    unsafe { Unix::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map(libloading::Library::from)
}

/// The loader's own words are in the cause.
fn full(e: &libloading::Error) -> String {
    let cause = std::error::Error::source(e).map(|c| c.to_string());
    cause.unwrap_or_else(|| e.to_string())
}

/// Folders of libraries that belong to whatever started this process, and to the `mpiexec` that would: `pip install`
/// puts the library beside its programs, where the loader does not look.
fn beside_launchers() -> Vec<PathBuf> {
    let parent = std::fs::read_link(format!("/proc/{}/exe", std::os::unix::process::parent_id())).ok();
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&paths).map(|d| d.join("mpiexec")).find(|p| p.is_file());
    let on_path = on_path.and_then(|p| p.canonicalize().ok());
    let mut found = Vec::new();
    for program in parent.into_iter().chain(on_path) {
        let Some(root) = program.parent().and_then(Path::parent) else { continue };
        for dir in ["lib", "lib64"].map(|lib| root.join(lib)).into_iter().filter(|d| d.is_dir()) {
            if !found.contains(&dir) {
                found.push(dir);
            }
        }
    }
    found
}

const GET: &str = "install one with the standard's interface: pip install mpich (5 or newer), or the site's (module avail mpi); \
                   PHALANX_MPI=/path/to/libmpi_abi.so.1 names it";

fn missing(given: Option<OsString>, dirs: &[PathBuf], why: Option<libloading::Error>) -> Error {
    let why = why.map(|e| format!(": {}", full(&e))).unwrap_or_default();
    if let Some(path) = given {
        let why = if why.is_empty() { ": there is no such file" } else { &why };
        return Error::user(format!("{VARIABLE}={}{why}", path.display())).hint(GET);
    }
    let loader = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let loader: Vec<&str> = loader.split(':').filter(|d| !d.is_empty()).collect();
    let mut places: Vec<String> = loader.iter().map(|d| (*d).to_owned()).collect();
    places.push("the system's folders".to_owned());
    places.extend(dirs.iter().map(|d| d.display().to_string()));
    let all = loader.iter().map(PathBuf::from).chain(dirs.iter().cloned()).chain(USUAL.map(PathBuf::from));
    let all: Vec<PathBuf> = all.collect();
    let older = OLDER.iter().find_map(|name| all.iter().map(|d| d.join(name)).find(|p| p.exists()));
    let older = older.map_or_else(String::new, |path| {
        format!(
            "; {} is there, but has an interface of its own: it is older than the standard's",
            path.display()
        )
    });
    Error::user(format!(
        "there is no MPI library that can be used: {NAME} is not in {}{why}{older}",
        places.join(", ")
    ))
    .hint(GET)
}
