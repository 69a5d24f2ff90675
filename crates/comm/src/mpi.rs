//! MPI as a way between ranks: messages go through the site's library, which knows the site's fabric.
//!
//! Nothing but messages is asked of it (`MPI_Isend`, `MPI_Irecv`, `MPI_Test`): sums of its collectives come in an order of
//! its own, and its blocking calls have no deadline. It is started once in a process and ended with it; every call is made
//! with a lock held, because sites often build it for one thread at a time.

mod last_words;
mod library;
pub(crate) mod pipes;
mod text;

use last_words::LastWords;
use library::{
    ANY_SOURCE, BYTE, COMM_WORLD, ERRORS_RETURN, FLOAT, Handle, Library, REQUEST_NULL, SUCCESS, SUM, Status,
    THREAD_SERIALIZED,
};
use spec::{Error, Result};
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// How long ranks may take to end MPI together: those that are late are saving something.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a launcher may take to read what a rank has said before that rank ends the job.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// The library of this process, once it is started.
static STARTED: OnceLock<Result<Mpi, Failed>> = OnceLock::new();

/// This process's place among those that an `mpiexec` (or `srun --mpi`) has started, and the way to them.
pub struct Mpi {
    library: &'static Library,
    rank: usize,
    size: usize,
    /// Held during each call.
    call: Mutex<()>,
}

/// An error that several may be told.
struct Failed(String, Option<String>, bool);

impl Failed {
    fn of(e: &Error) -> Failed {
        Failed(e.to_string(), e.hint_text().map(str::to_owned), e.exit_code() == 2)
    }

    fn error(&self) -> Error {
        let e = if self.2 { Error::user(&*self.0) } else { Error::failure(&*self.0) };
        match &self.1 {
            Some(hint) => e.hint(&**hint),
            None => e,
        }
    }
}

/// A library that could be started: where it lies, and what it says that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MpiLibrary {
    /// Its file, or the name that the loader found it by.
    pub path: PathBuf,
    /// Its name and version in its own words.
    pub version: String,
}

/// Looks for the site's MPI library and loads it, without starting it.
///
/// # Errors
/// None is there with the standard's binary interface: the names and places that were tried.
pub fn find_mpi() -> Result<MpiLibrary> {
    loaded().map(|library| MpiLibrary { path: library.path.clone(), version: library.version.clone() })
}

fn loaded() -> Result<&'static Library> {
    static LOADED: OnceLock<Result<Library, Failed>> = OnceLock::new();
    LOADED.get_or_init(|| Library::load().map_err(|e| Failed::of(&e))).as_ref().map_err(Failed::error)
}

impl Mpi {
    /// The library, started together with those of all other ranks if it was not. Call it in the process's main thread:
    /// [`Mpi::end`] must be called there too.
    ///
    /// # Errors
    /// There is no library, or it is for one thread only. Ranks that do not come within `timeout` end this process, with one
    /// message: the call that waits for them cannot be left.
    pub fn start(timeout: Duration) -> Result<&'static Mpi> {
        let started = STARTED.get_or_init(|| Mpi::init(timeout).map_err(|e| Failed::of(&e)));
        started.as_ref().map_err(Failed::error)
    }

    /// The library, if this process has started it.
    pub fn started() -> Option<&'static Mpi> {
        STARTED.get().and_then(|started| started.as_ref().ok())
    }

    fn init(timeout: Duration) -> Result<Mpi> {
        let library = loaded()?;
        let functions = library.functions;
        let mut provided = -1;
        let code = {
            let _last_words = LastWords::begin(library);
            let _watch = Watch::begin(
                timeout,
                1,
                format!(
                    "MPI_Init of {} ({}) did not return within {:.0} s, because other ranks have not come to it\nhint: start all \
                 ranks with the mpiexec that belongs to this library, or srun --mpi=pmi2",
                    library.path.display(),
                    library.version,
                    timeout.as_secs_f64()
                ),
            )?;
            // SAFETY: no arguments are handed over, which the standard allows.
            unsafe {
                (functions.init_thread)(
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    THREAD_SERIALIZED,
                    &raw mut provided,
                )
            }
        };
        let mpi = Mpi { library, rank: 0, size: 0, call: Mutex::new(()) };
        mpi.checked("MPI_Init_thread", code)?;
        if provided < THREAD_SERIALIZED {
            return Err(Error::user(format!(
                "{} ({}) lets only one thread call it (it provides thread level {provided}), and ranks have several",
                mpi.library.path.display(),
                mpi.library.version
            ))
            .hint("use a build of it with thread support, or --transport tcp"));
        }
        let (mut rank, mut size) = (-1, -1);
        // SAFETY: the numbers are written.
        unsafe {
            mpi.checked(
                "MPI_Comm_set_errhandler",
                (functions.comm_set_errhandler)(COMM_WORLD, ERRORS_RETURN),
            )?;
            mpi.checked("MPI_Comm_rank", (functions.comm_rank)(COMM_WORLD, &raw mut rank))?;
            mpi.checked("MPI_Comm_size", (functions.comm_size)(COMM_WORLD, &raw mut size))?;
        }
        let number = |n: c_int| usize::try_from(n).unwrap_or(0);
        Ok(Mpi { rank: number(rank), size: number(size), ..mpi })
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The library's name and version in its own words.
    pub fn version(&self) -> &str {
        &self.library.version
    }

    /// The library's file, or the name that the loader found it by.
    pub fn path(&self) -> &Path {
        &self.library.path
    }

    /// That MPI counts this process as the launcher's environment does.
    ///
    /// # Errors
    /// It does not: the library is not the one that the launcher speaks to.
    pub fn check(&self, rank: usize, world: usize) -> Result<()> {
        if (self.rank, self.size) == (rank, world) {
            return Ok(());
        }
        Err(Error::user(format!(
            "the launcher calls this process rank {rank} of {world}, but for {} ({}) it is rank {} of {}",
            self.library.path.display(),
            self.library.version,
            self.rank,
            self.size
        ))
        .hint("start ranks with the mpiexec that belongs to this library, or name another with PHALANX_MPI"))
    }

    /// The sum of `values` over all ranks as the library computes it, in an order of its own: for comparing speed. It has no
    /// deadline.
    ///
    /// # Errors
    /// The library says so.
    pub(crate) fn all_reduce_unordered(&self, input: &[f32], output: &mut [f32]) -> Result<()> {
        let count =
            c_int::try_from(input.len().min(output.len())).map_err(|_| Error::failure("too many values"))?;
        let _call = self.call();
        // SAFETY: both hold `count` floats.
        let code = unsafe {
            (self.library.functions.allreduce)(
                input.as_ptr().cast(),
                output.as_mut_ptr().cast(),
                count,
                FLOAT,
                SUM,
                COMM_WORLD,
            )
        };
        self.checked("MPI_Allreduce", code)
    }

    /// Ends MPI in good order, if this process has started it: without this the launcher takes the end of the process for a
    /// crash. Collective. Call it last, with no world left. Ranks that do not come in time end this process with exit code
    /// 1 and one message.
    ///
    /// # Errors
    /// The library says so.
    pub fn end() -> Result<()> {
        let Some(mpi) = Mpi::started() else { return Ok(()) };
        let _call = mpi.call();
        let _watch = Watch::begin(
            END_TIMEOUT,
            1,
            format!(
                "MPI_Finalize did not return within {} s: other ranks have not ended",
                END_TIMEOUT.as_secs()
            ),
        )?;
        // SAFETY: no request is left, or those of a world that failed, whose memory stays.
        mpi.checked("MPI_Finalize", unsafe { (mpi.library.functions.finalize)() })
    }

    /// Ends all ranks with exit code `code`, this one too, if this process has started MPI.
    pub fn abort(code: u8) {
        let Some(mpi) = Mpi::started() else { return };
        // Whoever holds the lock may never give it back; the library is about to end the process anyway.
        let _call = mpi.call.try_lock();
        text::wait_until_read(READ_TIMEOUT);
        // It may wait for the launcher, which may be gone.
        let _watch = Watch::begin(END_TIMEOUT, code, String::new());
        // SAFETY: the call does not come back, or if it does nothing depends on it.
        unsafe { (mpi.library.functions.abort)(COMM_WORLD, c_int::from(code)) };
    }

    fn call(&self) -> MutexGuard<'_, ()> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn checked(&self, what: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(Error::failure(format!("{what} of {}: {}", self.library.version, self.library.words(code))))
    }

    /// Starts to send.
    ///
    /// # Safety
    /// The bytes stay where they are and as they are until the request has ended.
    unsafe fn send(&self, bytes: *const u8, count: usize, to: usize, tag: c_int) -> Result<Request> {
        let mut request = Request(REQUEST_NULL);
        let _call = self.call();
        // SAFETY: passed on from the caller.
        let code = unsafe {
            (self.library.functions.isend)(
                bytes.cast(),
                count as c_int,
                BYTE,
                to as c_int,
                tag,
                COMM_WORLD,
                &raw mut request.0,
            )
        };
        self.checked("MPI_Isend", code).map(|()| request)
    }

    /// Starts to receive at most `count` bytes, from anybody if `from` is none.
    ///
    /// # Safety
    /// The bytes stay where they are, and are nobody else's, until the request has ended.
    unsafe fn receive(
        &self,
        bytes: *mut u8,
        count: usize,
        from: Option<usize>,
        tag: c_int,
    ) -> Result<Request> {
        let mut request = Request(REQUEST_NULL);
        let from = from.map_or(ANY_SOURCE, |rank| rank as c_int);
        let _call = self.call();
        // SAFETY: passed on from the caller.
        let code = unsafe {
            (self.library.functions.irecv)(
                bytes.cast(),
                count as c_int,
                BYTE,
                from,
                tag,
                COMM_WORLD,
                &raw mut request.0,
            )
        };
        self.checked("MPI_Irecv", code).map(|()| request)
    }

    /// Whether a request has ended: the sender's rank and the bytes received.
    fn test(&self, request: &mut Request) -> Result<Option<(usize, usize)>> {
        let (mut done, mut status, mut bytes) = (0, Status::default(), 0);
        let _call = self.call();
        let functions = &self.library.functions;
        // SAFETY: the request is one of the library's, and the rest is written.
        unsafe {
            self.checked("MPI_Test", (functions.test)(&raw mut request.0, &raw mut done, &raw mut status))?;
            if done == 0 {
                return Ok(None);
            }
            self.checked("MPI_Get_count", (functions.get_count)(&raw const status, BYTE, &raw mut bytes))?;
        }
        let number = |n: c_int| usize::try_from(n).unwrap_or(0);
        Ok(Some((number(status.source), number(bytes))))
    }

    /// Gives up a receive; it has ended once [`Mpi::test`] says so.
    fn cancel(&self, request: &mut Request) {
        let _call = self.call();
        // SAFETY: the request is one of the library's. Where it cannot be given up, it ends or it does not.
        unsafe { (self.library.functions.cancel)(&raw mut request.0) };
    }
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} over {}", self.rank, self.size, self.library.version)
    }
}

/// Something that the library has begun.
struct Request(Handle);

/// Ends the process when a call of the library takes too long: nothing else ends such a call.
struct Watch {
    shared: std::sync::Arc<(Mutex<bool>, Condvar)>,
}

impl Watch {
    fn begin(timeout: Duration, code: u8, last_words: String) -> Result<Watch> {
        let shared = std::sync::Arc::new((Mutex::new(false), Condvar::new()));
        let watched = shared.clone();
        let watch = move || {
            let (is_over, over) = &*watched;
            let held = is_over.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = over.wait_timeout_while(held, timeout, |is_over| !*is_over);
            let is_over = *waited.unwrap_or_else(PoisonError::into_inner).0;
            if !is_over {
                text::say(&last_words);
                // Handlers for the end of the process are the library's too, and may hang like it.
                // SAFETY: ends the process.
                unsafe { libc::_exit(c_int::from(code)) };
            }
        };
        std::thread::Builder::new()
            .name("mpi-watch".into())
            .spawn(watch)
            .map_err(|e| Error::failure(format!("start a thread that watches MPI: {e}")))?;
        Ok(Watch { shared })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.1.notify_all();
    }
}
