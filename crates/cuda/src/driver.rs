//! The driver's calls with errors that say what was tried, and objects that end what they began.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use cudarc::driver::sys::{self, CUresult};
use spec::{Error, Result};

/// Turns a result of the driver into ours; `doing` says what was tried.
pub(crate) fn check(result: CUresult, doing: impl FnOnce() -> String) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let error = Error::failure(format!("{}: {}", doing(), describe(result)));
    Err(match result {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => error.hint(
            "another process may hold memory of the card (nvidia-smi lists them); a smaller layout.micro_batch, \
             layout.recompute = \"full\" or more ranks take less",
        ),
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS => {
            error.hint("a kernel failed: please report it with the run file; the last checkpoint is whole")
        }
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUresult::CUDA_ERROR_UNKNOWN => error.hint(
            "the card is lost or faulty (look for Xid in the kernel's log); the same command on another card goes \
             on from the last checkpoint",
        ),
        _ => error,
    })
}

fn describe(result: CUresult) -> String {
    let text = |of: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver gives a static string, or an error for numbers that it does not know.
        let ok = unsafe { of(result, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
        // SAFETY: as above.
        ok.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("{result:?}"));
    text(sys::cuGetErrorString).map_or(name.clone(), |says| format!("{says} ({name})"))
}

/// Calls a function of the driver that fills in one value.
pub(crate) fn get<T>(doing: &str, call: impl FnOnce(*mut T) -> CUresult) -> Result<T> {
    let mut value = MaybeUninit::uninit();
    check(call(value.as_mut_ptr()), || doing.to_owned())?;
    // SAFETY: the driver said that it succeeded, and then it has filled the value in.
    Ok(unsafe { value.assume_init() })
}

/// A card's primary context, held for as long as this lives.
pub(crate) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: contexts may be used from any thread that makes them current first.
unsafe impl Send for Context {}

impl Context {
    pub(crate) fn new(ordinal: i32) -> Result<Context> {
        // SAFETY: plain calls with out-parameters; `cuInit` came before (see `cards::driver`).
        let device = get("open the card", |out| unsafe { sys::cuDeviceGet(out, ordinal) })?;
        // SAFETY: as above.
        let raw =
            get("make a context on the card", |out| unsafe { sys::cuDevicePrimaryCtxRetain(out, device) })?;
        let context = Context { device, raw };
        context.bind()?;
        Ok(context)
    }

    /// Makes the calls of this thread go to the card.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context is alive.
        check(unsafe { sys::cuCtxSetCurrent(self.raw) }, || "choose the card".into())
    }

    /// Free and total bytes of the card.
    pub(crate) fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two out-parameters.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || {
            "ask the card for its memory".into()
        })?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `new`; what was made in it is gone (fields drop in order).
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Memory of the card.
pub(crate) struct Memory {
    pub(crate) base: u64,
    pub(crate) bytes: usize,
}

impl Memory {
    /// No memory yet.
    pub(crate) fn none() -> Memory {
        Memory { base: 0, bytes: 0 }
    }

    /// Takes `bytes`, at least one.
    pub(crate) fn new(bytes: usize) -> Result<Memory> {
        let bytes = bytes.max(1);
        let mut base = 0;
        // SAFETY: an out-parameter.
        check(unsafe { sys::cuMemAlloc_v2(&mut base, bytes) }, || {
            format!("take {bytes} bytes of the card's memory")
        })?;
        Ok(Memory { base, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.base != 0 {
            // SAFETY: taken in `new`; the stream that used it was waited for.
            unsafe { sys::cuMemFree_v2(self.base) };
        }
    }
}

/// Work of the card in order.
pub(crate) struct Stream(pub(crate) sys::CUstream);

// SAFETY: streams may be used from any thread on which the context is current.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn new() -> Result<Stream> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: an out-parameter.
        get("make a stream", |out| unsafe { sys::cuStreamCreate(out, flags) }).map(Stream)
    }

    pub(crate) fn wait(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        check(unsafe { sys::cuStreamSynchronize(self.0) }, || "wait for the card".into())
    }

    /// Copies to the card; returns when `from` may be changed.
    pub(crate) fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: the caller keeps `to` inside its memory. Pageable memory is staged before the call returns.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.0) };
        check(result, || format!("copy {} bytes to the card", from.len()))
    }

    /// Copies from the card, after all that the stream was given.
    pub(crate) fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: as in `upload`; waited for below, so `to` outlives the copy.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.0) };
        check(result, || format!("copy {} bytes from the card", to.len()))?;
        self.wait()
    }

    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller keeps both inside its memory.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.0) };
        check(result, || format!("copy {bytes} bytes on the card"))
    }

    pub(crate) fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller keeps it inside its memory.
        check(unsafe { sys::cuMemsetD8Async(to, byte, bytes, self.0) }, || format!("fill {bytes} bytes"))
    }

    /// What is given to the stream from now on is recorded instead of run.
    pub(crate) fn begin_recording(&self) -> Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) }, || "begin to record".into())
    }

    /// What was recorded, ready to be run.
    pub(crate) fn end_recording(&self) -> Result<Graph> {
        // SAFETY: out-parameters; the graph is no longer needed once it is instantiated.
        unsafe {
            let graph = get("end the recording", |out| sys::cuStreamEndCapture(self.0, out))?;
            let ready =
                get("prepare what was recorded", |out| sys::cuGraphInstantiateWithFlags(out, graph, 0));
            sys::cuGraphDestroy(graph);
            ready.map(Graph)
        }
    }

    pub(crate) fn run(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both are alive.
        check(unsafe { sys::cuGraphLaunch(graph.0, self.0) }, || "run what was recorded".into())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `new`. An error was reported when it was first met.
        unsafe {
            sys::cuStreamSynchronize(self.0);
            sys::cuStreamDestroy_v2(self.0);
        }
    }
}

/// A recorded stretch of work.
pub(crate) struct Graph(sys::CUgraphExec);

// SAFETY: as for streams.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once; the stream that ran it is waited for before memory goes.
        unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
