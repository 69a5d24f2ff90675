use spec::{Error, Result};

use crate::launch::Operand;

/// One run of zeroed bytes for everything a rank computes with: the program says what lies where.
pub struct Arena {
    base: *mut u8,
    len: usize,
    /// The transport's memory, if neighbours reach it; else `base` was mapped here.
    shared: Option<comm::SharedArena>,
}

// SAFETY: the arena is plain memory; who may touch which part when is the executor's business.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// No memory yet.
    pub(crate) fn none() -> Arena {
        Arena { base: std::ptr::dangling_mut::<u64>().cast(), len: 0, shared: None }
    }

    /// Maps `len` zeroed bytes, aligned to a page.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub fn new(len: usize) -> Result<Arena> {
        let len = len.max(1);
        // SAFETY: a fresh private anonymous mapping; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::failure(format!(
                "map {len} bytes for the step: {}",
                std::io::Error::last_os_error()
            ))
            .hint(
                "a smaller layout.micro_batch, layout.recompute = \"full\" or more ranks take less memory",
            ));
        }
        // Huge pages save a few percent of the step; a system without them says no, which is no error.
        // SAFETY: advice about the mapping just made.
        let _ = unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        Ok(Arena { base: base.cast(), len, shared: None })
    }

    /// Uses memory of a transport.
    pub fn shared(shared: comm::SharedArena) -> Arena {
        Arena { base: shared.as_ptr(), len: shared.bytes(), shared: Some(shared) }
    }

    /// The transport's memory that it is.
    pub(crate) fn in_world(&self) -> Option<&comm::SharedArena> {
        self.shared.as_ref()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Zeroes all bytes.
    pub(crate) fn wipe(&mut self) {
        // SAFETY: the arena is borrowed alone, and is that long.
        unsafe { self.slice_mut::<u8>(0, self.len) }.fill(0);
    }

    /// The elements of an operand.
    ///
    /// # Panics
    /// If they do not lie in the arena, or are not of type `T`.
    pub fn read<T: bytemuck::Pod>(&self, of: Operand) -> &[T] {
        assert_eq!(of.dtype.bytes(), size_of::<T>());
        // SAFETY: only who has the arena alone writes to it, but for launches and messages, which do not run while the
        // device is borrowed from the executor.
        unsafe { self.slice(of.offset, of.len()) }
    }

    /// The same to write to.
    ///
    /// # Panics
    /// As [`Arena::read`].
    pub fn write<T: bytemuck::Pod>(&mut self, of: Operand) -> &mut [T] {
        assert_eq!(of.dtype.bytes(), size_of::<T>());
        // SAFETY: the arena is borrowed alone; messages under way keep to buffers of their own.
        unsafe { self.slice_mut(of.offset, of.len()) }
    }

    /// Copies elements, which may overlap.
    pub(crate) fn copy(&mut self, from: Operand, to: Operand) {
        assert_eq!(from.bytes(), to.bytes());
        let bytes = from.bytes();
        let (from, to) = (self.at::<u8>(from.offset, bytes), self.at::<u8>(to.offset, bytes));
        // SAFETY: both lie in the arena, which is borrowed alone.
        unsafe { std::ptr::copy(from, to, bytes) };
    }

    /// The bytes of an operand.
    pub(crate) fn bytes(&self, of: Operand) -> &[u8] {
        // SAFETY: as in `read`.
        unsafe { self.slice(of.offset, of.bytes()) }
    }

    /// The same to write to.
    pub(crate) fn bytes_mut(&mut self, of: Operand) -> &mut [u8] {
        // SAFETY: as in `write`.
        unsafe { self.slice_mut(of.offset, of.bytes()) }
    }

    /// `count` elements from byte `offset` on.
    ///
    /// # Safety
    /// Nobody may write to them while the slice lives.
    pub(crate) unsafe fn slice<T: bytemuck::Pod>(&self, offset: usize, count: usize) -> &[T] {
        // SAFETY: in bounds and aligned; any bits are a valid `Pod`; the caller guarantees the rest.
        unsafe { std::slice::from_raw_parts(self.at(offset, count), count) }
    }

    /// The same to write to.
    ///
    /// # Safety
    /// Nobody else may use a part of them while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "disjointness comes from the program's placement")]
    pub(crate) unsafe fn slice_mut<T: bytemuck::Pod>(&self, offset: usize, count: usize) -> &mut [T] {
        // SAFETY: as in `slice`.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, count), count) }
    }

    /// The address of `count` elements that lie in the arena.
    fn at<T>(&self, offset: usize, count: usize) -> *mut T {
        let bytes = count * size_of::<T>();
        assert!(offset + bytes <= self.len, "bytes {offset}..{} of an arena of {}", offset + bytes, self.len);
        assert!(offset.is_multiple_of(align_of::<T>()), "offset {offset} is not aligned");
        self.base.wrapping_add(offset).cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.shared.is_none() && self.len > 0 {
            // SAFETY: the mapping was made in `new` with this length and nobody holds slices of it any more.
            unsafe { libc::munmap(self.base.cast(), self.len) };
        }
    }
}
