//! Kernels from their sources, by NVRTC, kept on disk.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;

use cudarc::nvrtc::sys::{self, nvrtcResult};
use spec::{Error, Result};
use xxhash_rust::xxh3::xxh3_128;

use crate::libs::{Library, load};

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    text: &'static str,
}

/// What sources include, by name.
const HEADERS: [(&str, &str); 13] = [
    ("device.h", include_str!("../kernels/device.h")),
    ("gpu.h", include_str!("../kernels/gpu.h")),
    ("hopper.h", include_str!("../kernels/hopper.h")),
    ("dropout.h", include_str!("../kernels/dropout.h")),
    ("sight.h", include_str!("../kernels/sight.h")),
    ("attention_rows.h", include_str!("../kernels/attention_rows.h")),
    ("leaves.h", include_str!("../kernels/leaves.h")),
    ("warpgroup.h", include_str!("../kernels/warpgroup.h")),
    ("tiles_wgmma.h", include_str!("../kernels/tiles_wgmma.h")),
    ("tiles.h", include_str!("../kernels/tiles.h")),
    ("tiles_f32.h", include_str!("../kernels/tiles_f32.h")),
    ("groups.h", include_str!("../kernels/groups.h")),
    ("lanes.h", include_str!("../kernels/lanes.h")),
];

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../kernels/", $name, ".cu")) }
    };
}

/// All kernels but those for Hopper alone.
pub(crate) const SOURCES: [Source; 16] = [
    source!("rows"),
    source!("columns"),
    source!("sums"),
    source!("ranks"),
    source!("loss"),
    source!("optim"),
    source!("muon"),
    source!("glu"),
    source!("experts"),
    source!("grouped"),
    source!("latent"),
    source!("attention"),
    source!("attention_grad"),
    source!("attention_f32"),
    source!("contexts"),
    source!("gemm_f32"),
];

/// Kernels with the instructions of sm_90a.
pub(crate) const HOPPER: [Source; 3] =
    [source!("gemm_wgmma"), source!("attention_wgmma"), source!("attention_grad_wgmma")];

/// Machine code of a source for an architecture such as `sm_90a`.
///
/// # Errors
/// If NVRTC is missing, or refuses the source.
pub(crate) fn compile(source: Source, arch: &str) -> Result<Vec<u8>> {
    let (major, minor) = version()?;
    let mut text = format!("{major}.{minor} {arch} {}\n", source.name);
    HEADERS.iter().for_each(|(_, header)| text.push_str(header));
    text.push_str(source.text);
    let file = cache().map(|d| d.join(format!("{}-{:032x}.cubin", source.name, xxh3_128(text.as_bytes()))));
    if let Some(kept) = file.as_ref().and_then(|f| std::fs::read(f).ok()).filter(|c| !c.is_empty()) {
        return Ok(kept);
    }
    let (code, _) = nvrtc(source, arch, &[])?;
    if let Some(file) = file {
        keep(&file, &code);
    }
    Ok(code)
}

/// NVRTC's version.
///
/// # Errors
/// If it is missing.
pub(crate) fn version() -> Result<(i32, i32)> {
    load(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two out-parameters.
    checked(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }, "ask NVRTC for its version")?;
    Ok((major, minor))
}

/// Where compiled kernels are kept; nowhere without a home.
fn cache() -> Option<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(caches.join("phalanx/kernels"))
}

/// Writes a file so that other processes see all of it or nothing; a cache that cannot be written is no error.
fn keep(file: &std::path::Path, code: &[u8]) {
    let part = file.with_extension(format!("{}.tmp", std::process::id()));
    let parent = file.parent().map(std::fs::create_dir_all);
    if parent.is_some_and(|made| made.is_ok()) && std::fs::write(&part, code).is_ok() {
        let _ = std::fs::rename(&part, file);
    }
}

/// Machine code, and what the compiler said.
fn nvrtc(source: Source, arch: &str, more: &[&str]) -> Result<(Vec<u8>, String)> {
    let c = |text: &str| CString::new(text).map_err(|_| Error::failure("a source with a zero byte"));
    let (text, name) = (c(source.text)?, c(&format!("{}.cu", source.name))?);
    let headers = HEADERS.map(|(name, text)| (c(name), c(text)));
    let headers = headers.into_iter().map(|(n, t)| Ok((n?, t?))).collect::<Result<Vec<_>>>()?;
    let pointers =
        |of: &dyn Fn(&(CString, CString)) -> *const c_char| headers.iter().map(of).collect::<Vec<_>>();
    let (names, texts) = (pointers(&|h| h.0.as_ptr()), pointers(&|h| h.1.as_ptr()));
    let options = [format!("--gpu-architecture={arch}"), "--std=c++17".into(), "-lineinfo".into()];
    let options = options.iter().map(String::as_str).chain(more.iter().copied());
    let options = options.map(c).collect::<Result<Vec<_>>>()?;
    let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: terminated strings that outlive the calls; lengths as given; the program is destroyed once.
    unsafe {
        let count = headers.len() as i32;
        let made = sys::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            count,
            texts.as_ptr(),
            names.as_ptr(),
        );
        checked(made, "hand a source to NVRTC")?;
        let compiled = sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let log = bytes(program, sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        let code = if compiled == nvrtcResult::NVRTC_SUCCESS {
            bytes(program, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN).map(|code| (code, log))
        } else {
            Err(Error::failure(format!("NVRTC refuses {}.cu for {arch}: {log}", source.name)))
        };
        sys::nvrtcDestroyProgram(&mut program);
        code
    }
}

/// Reads what a program has of one kind: its size, then its bytes.
unsafe fn bytes(
    program: sys::nvrtcProgram,
    size: unsafe fn(sys::nvrtcProgram, *mut usize) -> nvrtcResult,
    read: unsafe fn(sys::nvrtcProgram, *mut c_char) -> nvrtcResult,
) -> Result<Vec<u8>> {
    let mut len = 0;
    // SAFETY: passed on from the caller; the buffer has the size that NVRTC gave.
    unsafe {
        checked(size(program, &mut len), "ask NVRTC for a size")?;
        let mut out = vec![0u8; len];
        checked(read(program, out.as_mut_ptr().cast()), "read from NVRTC")?;
        Ok(out)
    }
}

fn checked(result: nvrtcResult, doing: &str) -> Result<()> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: NVRTC gives a static string for any number.
    let says = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(Error::failure(format!("{doing}: {}", says.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a thread may put away before its loops and fetch after them. Most has the derivative of keys and values of 64-wide
    /// heads with dropout on sm_80, 116 bytes.
    const FEW_BYTES: usize = 120;

    /// Compiles for an architecture; no kernel may keep more than a few registers in memory, which is what slow kernels
    /// do.
    fn check(source: Source, arch: &str) {
        let (code, log) = nvrtc(source, arch, &["--ptxas-options=-v"]).expect("compiled");
        assert!(!code.is_empty());
        let mut kernel = "";
        for line in log.lines() {
            kernel = line.split("entry function").nth(1).unwrap_or(kernel);
            let spilled = line.split(" bytes spill stores").next().filter(|_| line.contains("spill stores"));
            let spilled = spilled.and_then(|l| l.rsplit(' ').next()?.parse::<usize>().ok()).unwrap_or(0);
            assert!(spilled < FEW_BYTES, "{}.cu for {arch}: {kernel}: {line}", source.name);
        }
        // wgmma that the compiler has to put one after another is as slow as what it replaces.
        let serial = log.lines().find(|l| l.contains("wgmma") && l.contains("serializ"));
        assert_eq!(serial, None, "{}.cu for {arch}", source.name);
    }

    #[test]
    fn every_source_compiles_without_spills() {
        if let Err(e) = version() {
            println!("skipped: {e}");
            return;
        }
        std::thread::scope(|scope| {
            for source in SOURCES {
                scope.spawn(move || ["sm_80", "sm_90a", "sm_100a"].map(|arch| check(source, arch)));
            }
            for source in HOPPER {
                scope.spawn(move || check(source, "sm_90a"));
            }
        });
    }
}
