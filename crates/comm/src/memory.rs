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
        // SAFETY: a fresh mapping of a file that has so many bytes and cannot shrink; the address is only wished for.
        let ptr = unsafe {
            rustix::mm::mmap(
                huge_page_address(bytes),
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

    /// Takes all pages now, huge ones where there are, so that a machine that is out of memory says so here and not with a
    /// signal later.
    pub(crate) fn populate(&self) -> Result<()> {
        self.collapse();
        match self.advise(Advice::LinuxPopulateWrite) {
            // Kernels before 5.14 do not know the advice; pages then come when touched.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(e) => Err(Error::failure(format!("take {} bytes of memory: {e}", self.bytes))
                .hint("use fewer ranks on this machine, or a smaller model or micro-batch")),
        }
    }

    /// Wishes for huge pages as the memory is touched.
    pub(crate) fn prefer_huge(&self) {
        // A system without them says no, which is no error.
        let _ = self.advise(Advice::LinuxHugepage);
    }

    /// Huge pages save a tenth of a step and more. A memory file has them by its mount's settings, which are "never" by
    /// default, or where it is asked to be made of them now (since Linux 6.1); who cannot says so, which is no error.
    fn collapse(&self) {
        let aligned = (self.ptr as usize).is_multiple_of(HUGE_PAGE);
        let whole = if aligned { self.bytes - self.bytes % HUGE_PAGE } else { 0 };
        for at in (0..whole).step_by(HUGE_PAGE) {
            // Only a range with a page in it can be made one. Who is out of memory is told when all of it is taken.
            // SAFETY: a page of this mapping, which stays as it is.
            let _ = unsafe { rustix::mm::madvise(self.ptr.add(at).cast(), 1, Advice::LinuxPopulateWrite) };
        }
        // SAFETY: the range is this mapping's own, and its contents stay.
        unsafe { libc::madvise(self.ptr.cast(), whole, libc::MADV_COLLAPSE) };
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

/// Bytes of a huge page; where they are larger, memory has small ones.
const HUGE_PAGE: usize = 2 << 20;

/// An address at which `bytes` bytes could have huge pages, free when it was looked for; null for none in particular.
fn huge_page_address(bytes: usize) -> *mut std::ffi::c_void {
    if bytes < HUGE_PAGE {
        return std::ptr::null_mut();
    }
    let room = bytes + HUGE_PAGE;
    // SAFETY: a fresh mapping at an address of the kernel's choice, given back before anybody sees it.
    unsafe {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let Ok(ptr) = rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags)
        else {
            return std::ptr::null_mut();
        };
        let _ = rustix::mm::munmap(ptr, room);
        ptr.map_addr(|at| at.next_multiple_of(HUGE_PAGE))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.ptr.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_could_have_huge_pages_is_aligned_to_them_and_zero() {
        let bytes = 2 * HUGE_PAGE + 4096;
        let aligned = |_| {
            let (mapping, file) = Mapping::shared("test", bytes).unwrap();
            mapping.populate().unwrap();
            let peer = Mapping::of_file(&file, bytes).unwrap();
            for m in [&mapping, &peer] {
                // SAFETY: the mapping has so many bytes, and nobody writes to them.
                assert!(unsafe { std::slice::from_raw_parts(m.ptr, bytes) }.iter().all(|b| *b == 0));
            }
            [mapping, peer].iter().all(|m| (m.ptr as usize).is_multiple_of(HUGE_PAGE))
        };
        // Other tests map memory too, and may be first at an address.
        assert!((0..20).any(aligned));
    }
}
