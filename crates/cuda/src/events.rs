//! What orders streams against each other, and memory that card and host both reach.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUresult};
use spec::Result;

use crate::driver::{Stream, check, get};
use crate::libs::symbol;

/// A point in a stream's order.
pub(crate) struct Event(sys::CUevent);

/// `cuEventElapsedTime`, by the name that every driver has: `cudarc` asks for one of 12.8.
type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> CUresult;

// SAFETY: as for streams.
unsafe impl Send for Event {}

impl Event {
    pub(crate) fn new() -> Result<Event> {
        Event::with(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
    }

    /// One that knows when it was reached.
    pub(crate) fn timed() -> Result<Event> {
        Event::with(sys::CUevent_flags_enum::CU_EVENT_DEFAULT)
    }

    fn with(flags: sys::CUevent_flags_enum) -> Result<Event> {
        // SAFETY: an out-parameter.
        get("make an event", |out| unsafe { sys::cuEventCreate(out, flags as u32) }).map(Event)
    }

    /// Nanoseconds from this to another, both timed and reached; the card counts by half microseconds.
    pub(crate) fn ns_until(&self, other: &Event) -> Result<u64> {
        let mut ms = 0.0;
        let elapsed = elapsed()?;
        // SAFETY: both are alive; an out-parameter.
        check(unsafe { elapsed(&mut ms, self.0, other.0) }, || "ask for the time between events".into())?;
        Ok((f64::from(ms) * 1e6) as u64)
    }
}

/// Found once: each wait of a step asks for its time.
fn elapsed() -> Result<Elapsed> {
    static FOUND: OnceLock<Elapsed> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(*found);
    }
    // SAFETY: a function of this type in every driver.
    let found: Elapsed = unsafe { std::mem::transmute(symbol("cuEventElapsedTime", "the driver")?) };
    Ok(*FOUND.get_or_init(|| found))
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`; what waits for it goes on by itself.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Stream {
    /// What the stream was given so far becomes `event`.
    pub(crate) fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both are alive.
        check(unsafe { sys::cuEventRecord(event.0, self.0) }, || "record an event".into())
    }

    /// The same of a timed event while the stream records: each run of the recording reaches it anew.
    pub(crate) fn record_node(&self, event: &Event) -> Result<()> {
        let flags = sys::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: both are alive; whoever keeps the recording keeps the event.
        check(unsafe { sys::cuEventRecordWithFlags(event.0, self.0, flags) }, || "record an event".into())
    }

    /// What the stream is given from now on comes after `event` as it was recorded last.
    pub(crate) fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: both are alive.
        check(unsafe { sys::cuStreamWaitEvent(self.0, event.0, 0) }, || "wait for an event".into())
    }

    /// What this stream is given from now on comes after all that `other` was given, through `event`.
    pub(crate) fn follow(&self, other: &Stream, event: &Event) -> Result<()> {
        other.record(event)?;
        self.wait_for(event)
    }

    /// Whether all that the stream was given is done, or will never be.
    pub(crate) fn is_idle(&self) -> bool {
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamQuery(self.0) != CUresult::CUDA_ERROR_NOT_READY }
    }
}

/// Words of the host's memory that kernels write and the host reads meanwhile.
pub(crate) struct Words {
    base: *const AtomicU32,
    count: usize,
}

// SAFETY: atomics, at an address that stays.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// So many, all 0.
    pub(crate) fn new(count: usize) -> Result<Words> {
        let bytes = count.max(1) * size_of::<AtomicU32>();
        let base: *mut std::ffi::c_void = get("take memory of the host", |out| unsafe {
            // SAFETY: an out-parameter.
            sys::cuMemHostAlloc(out, bytes, sys::CU_MEMHOSTALLOC_PORTABLE)
        })?;
        // SAFETY: memory of that size.
        unsafe { base.cast::<u8>().write_bytes(0, bytes) };
        Ok(Words { base: base.cast(), count })
    }

    /// Where word `i` lies, for host and card alike.
    pub(crate) fn address(&self, i: usize) -> u64 {
        assert!(i < self.count);
        self.base.wrapping_add(i) as u64
    }

    pub(crate) fn read(&self, i: usize) -> u32 {
        assert!(i < self.count);
        // SAFETY: inside the memory, aligned, and never anything but words.
        unsafe { (*self.base.add(i)).load(Ordering::Relaxed) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: taken in `new`; the streams that write it were waited for.
        unsafe { sys::cuMemFreeHost(self.base.cast_mut().cast()) };
    }
}
