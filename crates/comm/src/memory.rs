//! Memory that more than one rank can see.

use crate::os::os_error;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use spec::{Error, Result};

/// A mapping of whole pages, unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping {
    ptr: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is memory, not a borrow; those who access it synchronise among themselves.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zeroed memory for ranks that are threads; pages take space when first touched.
    pub(crate) fn anonymous(bytes: usize) -> Result<Mapping> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let ptr = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes.max(1),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Mapping::checked(ptr, bytes)
    }

    /// A new memory file and its mapping. The file has no name anywhere: it goes with the last process that holds it.
    pub(crate) fn shared(name: &str, bytes: usize) -> Result<(Mapping, OwnedFd)> {
        let failed =
            |e: rustix::io::Errno| os_error(&format!("make shared memory of {bytes} bytes"), &e.into());
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed)?;
        rustix::fs::ftruncate(&fd, bytes as u64).map_err(failed)?;
        // A file that cannot shrink cannot fault the ranks that map it.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(failed)?;
        let mapping = Mapping::of_file(&fd, bytes)?;
        Ok((mapping, fd))
    }

    /// Maps a memory file received from a peer.
    pub(crate) fn of_file(fd: impl AsFd, bytes: usize) -> Result<Mapping> {
        // In this order: the size of a file that can shrink means nothing. Other files than memory have no seals.
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK) {
            return Err(Error::failure("shared memory that is not sealed against shrinking"));
        }
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| Error::failure(format!("look at shared memory: {e}")))?;
        if u64::try_from(stat.st_size).is_ok_and(|size| size < bytes as u64) {
            return Err(Error::failure(format!("shared memory of {} bytes, expected {bytes}", stat.st_size)));
        }
        // SAFETY: a fresh mapping of a file that has so many bytes and cannot shrink.
        let ptr = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes.max(1),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                0,
            )
        };
        Mapping::checked(ptr, bytes)
    }

    fn checked(ptr: rustix::io::Result<*mut std::ffi::c_void>, bytes: usize) -> Result<Mapping> {
        let ptr = ptr.map_err(|e| {
            Error::failure(format!("map {bytes} bytes of memory: {e}"))
                .hint("fewer ranks here, or a smaller model or batch; ulimit -v and the container's limit bound it too")
        })?;
        let mapping = Mapping { ptr: ptr.cast(), bytes: bytes.max(1) };
        // A forked child (a data worker, say) must not keep gigabytes of a dead rank alive.
        mapping.advise(Advice::LinuxDontFork).map_err(|e| Error::failure(format!("map memory: {e}")))?;
        Ok(mapping)
    }

    /// Takes all pages now, so that a machine that is out of memory says so here and not with a signal later.
    pub(crate) fn populate(&self) -> Result<()> {
        match self.advise(Advice::LinuxPopulateWrite) {
            // Kernels before 5.14 do not know the advice; pages then come when touched.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(e) => Err(Error::failure(format!("take {} bytes of memory: {e}", self.bytes))
                .hint("use fewer ranks on this machine, or a smaller model or micro-batch")),
        }
    }

    fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        // SAFETY: the range is this mapping's own, and the advice leaves its contents as they are.
        unsafe { rustix::mm::madvise(self.ptr.cast(), self.bytes, advice) }
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where in the mapping `bytes` bytes at `ptr` lie, if they do.
    pub(crate) fn offset_of(&self, ptr: *const u8, bytes: usize) -> Option<usize> {
        let offset = (ptr as usize).checked_sub(self.ptr as usize)?;
        (offset.checked_add(bytes)? <= self.bytes).then_some(offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.ptr.cast(), self.bytes) };
    }
}
