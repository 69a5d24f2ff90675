//! NCCL's calls: found by name in the library that [`load`] opened, and communicators that never block the host.
//!
//! All of a communicator's calls return at once (`blocking = 0`, NCCL 2.14): what they began is over when
//! [`Communicator::state`] says so, and [`Communicator::abort`] ends them from any thread. NCCL's user guide, "Creating a
//! communicator with options" and "Fault tolerance".

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use spec::{DType, Error, Result};

use crate::driver::Stream;
use crate::libs::{Library, load, symbol};

/// The oldest version whose communicators need not block: 2.14.
const OLDEST: c_int = 21_400;

/// What makes ranks one communicator.
pub(crate) type UniqueId = [u8; 128];

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id(UniqueId);

/// `ncclConfig_t` as version 2.14 has it: later ones take it for what its size and version say.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

type Raw = *mut c_void;

/// What a call says: `ncclResult_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Said(c_int);

impl Said {
    /// Done.
    pub(crate) const SUCCESS: Said = Said(0);
    /// Not yet.
    pub(crate) const IN_PROGRESS: Said = Said(7);
}

macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions.
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn find() -> Result<Functions> {
                Ok(Functions {
                    // SAFETY: the library has a function of this name and type, or none.
                    $($name: unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(symbol(stringify!($name), "NCCL")?) },)*
                })
            }
        }
    };
}

functions! {
    ncclGetUniqueId: fn(*mut Id) -> c_int;
    ncclGetErrorString: fn(c_int) -> *const c_char;
    ncclGetLastError: fn(Raw) -> *const c_char;
    ncclCommInitRankConfig: fn(*mut Raw, c_int, Id, c_int, *mut Config) -> c_int;
    ncclCommGetAsyncError: fn(Raw, *mut c_int) -> c_int;
    ncclCommFinalize: fn(Raw) -> c_int;
    ncclCommDestroy: fn(Raw) -> c_int;
    ncclCommAbort: fn(Raw) -> c_int;
    ncclGroupStart: fn() -> c_int;
    ncclGroupEnd: fn() -> c_int;
    ncclSend: fn(*const c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
    ncclRecv: fn(*mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
    ncclAllGather: fn(*const c_void, *mut c_void, usize, c_int, Raw, Raw) -> c_int;
    ncclAllReduce: fn(*const c_void, *mut c_void, usize, c_int, c_int, Raw, Raw) -> c_int;
}

/// The library's functions, once [`version`] has found them.
fn library() -> Result<&'static Functions> {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    if FUNCTIONS.get().is_none() {
        let _ = FUNCTIONS.set(Functions::find()?);
    }
    FUNCTIONS.get().ok_or_else(|| Error::failure("NCCL is not loaded"))
}

/// The version of the library that is there, whatever it is.
///
/// # Errors
/// If there is none.
pub(crate) fn found_version() -> Result<c_int> {
    load(Library::Nccl)?;
    // SAFETY: a function of this type in every version.
    let ask: unsafe extern "C" fn(*mut c_int) -> c_int =
        unsafe { std::mem::transmute(symbol("ncclGetVersion", "NCCL")?) };
    let mut version = 0;
    // SAFETY: an out-parameter.
    check(Said(unsafe { ask(&mut version) }), "ask NCCL for its version")?;
    Ok(version)
}

/// The version of a library that can be used.
///
/// # Errors
/// If there is none, or it is too old.
pub(crate) fn version() -> Result<c_int> {
    let version = found_version()?;
    if version < OLDEST {
        let what = format!("NCCL is {}, expected {} or later", dotted(version), dotted(OLDEST));
        return Err(Error::user(what).hint(
            "install a newer one (nvidia-nccl-cu13 or -cu12), or set run.messages=host: messages go over the host then",
        ));
    }
    library()?;
    Ok(version)
}

/// `2.28.9`; before 2.9 a version had a digit for its second part.
pub(crate) fn dotted(version: c_int) -> String {
    let digit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / digit, version % digit / 100, version % 100)
}

/// An id for a communicator that is still to be made.
///
/// # Errors
/// If NCCL finds no network.
pub(crate) fn unique_id() -> Result<UniqueId> {
    let mut id = Id([0; 128]);
    // SAFETY: an out-parameter.
    check(Said(unsafe { (library()?.ncclGetUniqueId)(&mut id) }), "ask NCCL for an id")?;
    Ok(id.0)
}

fn check(said: Said, doing: &str) -> Result<()> {
    if said == Said::SUCCESS || said == Said::IN_PROGRESS {
        return Ok(());
    }
    Err(Error::failure(format!("{doing}: {}", describe(said))))
}

/// What NCCL says about a result, with its last words.
pub(crate) fn describe(said: Said) -> String {
    let Ok(library) = library() else { return format!("NCCL says {}", said.0) };
    let text = |at: *const c_char| {
        // SAFETY: NCCL gives terminated strings of its own, or null.
        (!at.is_null()).then(|| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned())
    };
    // SAFETY: any number has a text; no communicator is needed for the last words.
    let (what, last) = unsafe {
        (text((library.ncclGetErrorString)(said.0)), text((library.ncclGetLastError)(std::ptr::null_mut())))
    };
    match last.filter(|l| !l.trim().is_empty()) {
        Some(last) => format!("NCCL: {} ({})", what.unwrap_or_default(), last.trim()),
        None => format!("NCCL: {}", what.unwrap_or_default()),
    }
}

/// `ncclDataType_t`.
fn data_type(dtype: DType) -> c_int {
    match dtype {
        DType::U32 => 3,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    }
}

/// Ranks that talk through NCCL, seen from one of them. Aborted when it goes, unless it was closed.
pub(crate) struct Communicator {
    raw: Mutex<Option<Handle>>,
    library: &'static Functions,
}

#[derive(Clone, Copy)]
struct Handle(Raw);

// SAFETY: a communicator may be used from any thread, by one at a time: the lock sees to it.
unsafe impl Send for Handle {}

impl Communicator {
    /// Begins to meet the other ranks, on the card that is current; [`Communicator::state`] says when all have come.
    ///
    /// # Errors
    /// If NCCL refuses.
    pub(crate) fn begin(id: &UniqueId, rank: usize, ranks: usize) -> Result<Communicator> {
        let library = library()?;
        let mut config =
            Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: OLDEST as u32, blocking: 0 };
        let mut raw = std::ptr::null_mut();
        // SAFETY: an out-parameter, and a configuration that says its size and version.
        let said = Said(unsafe {
            (library.ncclCommInitRankConfig)(&mut raw, ranks as c_int, Id(*id), rank as c_int, &mut config)
        });
        check(said, "begin an NCCL communicator")?;
        Ok(Communicator { raw: Mutex::new(Some(Handle(raw))), library })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Handle>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How what was begun stands.
    pub(crate) fn state(&self) -> Said {
        let Some(Handle(raw)) = *self.lock() else { return Said::SUCCESS };
        let mut state = 0;
        // SAFETY: the communicator is alive; an out-parameter.
        let asked = Said(unsafe { (self.library.ncclCommGetAsyncError)(raw, &mut state) });
        if asked == Said::SUCCESS { Said(state) } else { asked }
    }

    /// Puts calls on a stream as one; over when [`Communicator::state`] is no longer `IN_PROGRESS`.
    ///
    /// # Errors
    /// If NCCL refuses, or the communicator was aborted.
    pub(crate) fn together(
        &self,
        stream: &Stream,
        calls: impl FnOnce(&mut Calls<'_>) -> Result<()>,
    ) -> Result<()> {
        let held = self.lock();
        let Some(Handle(raw)) = *held else {
            return Err(Error::failure("the NCCL communicator was aborted"));
        };
        // SAFETY: groups are the thread's.
        check(Said(unsafe { (self.library.ncclGroupStart)() }), "begin NCCL calls")?;
        let made = calls(&mut Calls { library: self.library, raw, stream: stream.0.cast() });
        // SAFETY: begun above; ended whatever became of the calls.
        let ended = check(Said(unsafe { (self.library.ncclGroupEnd)() }), "start NCCL calls");
        made.and(ended)
    }

    /// Ends whatever is under way, without the other ranks.
    pub(crate) fn abort(&self) {
        if let Some(Handle(raw)) = self.lock().take() {
            // SAFETY: the communicator is alive, and nobody has it after this.
            unsafe { (self.library.ncclCommAbort)(raw) };
        }
    }

    /// Begins to end it in good order; [`Communicator::close`] once [`Communicator::state`] says so.
    pub(crate) fn finalise(&self) {
        if let Some(Handle(raw)) = *self.lock() {
            // SAFETY: the communicator is alive.
            unsafe { (self.library.ncclCommFinalize)(raw) };
        }
    }

    /// Gives it back.
    pub(crate) fn close(&self) {
        if let Some(Handle(raw)) = self.lock().take() {
            // SAFETY: the communicator is alive, and nobody has it after this.
            unsafe { (self.library.ncclCommDestroy)(raw) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Calls that go to a stream as one. Addresses are those of the card's memory, and of what the call says elsewhere.
pub(crate) struct Calls<'a> {
    library: &'a Functions,
    raw: Raw,
    stream: Raw,
}

impl Calls<'_> {
    pub(crate) fn send(&mut self, from: u64, count: usize, dtype: DType, peer: usize) -> Result<()> {
        let (raw, stream, dtype) = (self.raw, self.stream, data_type(dtype));
        // SAFETY: the caller keeps the span inside memory that is alive until the stream has come past it.
        let said = unsafe {
            (self.library.ncclSend)(from as *const c_void, count, dtype, peer as c_int, raw, stream)
        };
        check(Said(said), "send by NCCL")
    }

    pub(crate) fn receive(&mut self, to: u64, count: usize, dtype: DType, peer: usize) -> Result<()> {
        let (raw, stream, dtype) = (self.raw, self.stream, data_type(dtype));
        // SAFETY: as in `send`.
        let said =
            unsafe { (self.library.ncclRecv)(to as *mut c_void, count, dtype, peer as c_int, raw, stream) };
        check(Said(said), "receive by NCCL")
    }

    /// Every rank's `count` elements, rank by rank.
    pub(crate) fn gather(&mut self, from: u64, to: u64, count: usize, dtype: DType) -> Result<()> {
        let (raw, stream, dtype) = (self.raw, self.stream, data_type(dtype));
        // SAFETY: as in `send`.
        let said = unsafe {
            (self.library.ncclAllGather)(from as *const c_void, to as *mut c_void, count, dtype, raw, stream)
        };
        check(Said(said), "gather by NCCL")
    }

    /// The sum over all ranks in the library's order, in place.
    pub(crate) fn sum(&mut self, at: u64, count: usize, dtype: DType) -> Result<()> {
        const SUM: c_int = 0;
        let (raw, stream, dtype) = (self.raw, self.stream, data_type(dtype));
        // SAFETY: as in `send`.
        let said = unsafe {
            (self.library.ncclAllReduce)(
                at as *const c_void,
                at as *mut c_void,
                count,
                dtype,
                SUM,
                raw,
                stream,
            )
        };
        check(Said(said), "sum by NCCL")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        // NCCL_VERSION of nccl.h: X * 1000 + Y * 100 + Z to 2.8, X * 10000 + Y * 100 + Z from 2.9 on.
        assert_eq!([2804, 20_903, 21_405, 22_809].map(dotted), ["2.8.4", "2.9.3", "2.14.5", "2.28.9"]);
    }
}
