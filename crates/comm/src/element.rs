use crate::inner::Address;
use half::bf16;
use spec::shares;
use std::fmt;
use std::ops::Range;

/// The element type of a buffer that takes part in communication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ElementType {
    /// IEEE binary32.
    F32 = 0,
    /// bfloat16; sums are taken in binary32 and rounded once.
    Bf16 = 1,
    /// IEEE binary64.
    F64 = 2,
    /// Unsigned 32-bit; sums wrap.
    U32 = 3,
    /// Bytes; sums wrap.
    U8 = 4,
}

impl ElementType {
    pub(crate) const ALL: [ElementType; 5] =
        [ElementType::F32, ElementType::Bf16, ElementType::F64, ElementType::U32, ElementType::U8];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::F32 | ElementType::U32 => 4,
            ElementType::Bf16 => 2,
            ElementType::F64 => 8,
            ElementType::U8 => 1,
        }
    }
}

impl From<spec::DType> for ElementType {
    fn from(dtype: spec::DType) -> Self {
        match dtype {
            spec::DType::F32 => ElementType::F32,
            spec::DType::Bf16 => ElementType::Bf16,
            spec::DType::F64 => ElementType::F64,
            spec::DType::U32 => ElementType::U32,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["f32", "bf16", "f64", "u32", "u8"][*self as usize])
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A type that can be communicated: `f32`, `bf16`, `f64`, `u32` or `u8`.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Its name at run time.
    const TYPE: ElementType;
}

macro_rules! elements {
    ($($t:ty => $name:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const TYPE: ElementType = ElementType::$name;
        }
    )*};
}
elements!(f32 => F32, bf16 => Bf16, f64 => F64, u32 => U32, u8 => U8);

/// A buffer by address: what an executor with placed buffers hands to [`Group::run`](crate::Group::run).
///
/// A span is only a name for memory. Making one is safe; the operations that read or write through it are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSlice {
    pub(crate) ptr: *mut u8,
    pub(crate) count: usize,
    pub(crate) element: ElementType,
}

// SAFETY: a span is an address and two numbers; who dereferences it answers for the memory.
unsafe impl Send for RawSlice {}
// SAFETY: as above.
unsafe impl Sync for RawSlice {}

impl RawSlice {
    /// `count` elements at `ptr`.
    pub fn new(ptr: *mut u8, count: usize, element: ElementType) -> RawSlice {
        RawSlice { ptr, count, element }
    }

    /// The elements of a slice that may be written.
    pub fn of<T: Element>(slice: &mut [T]) -> RawSlice {
        RawSlice { ptr: slice.as_mut_ptr().cast(), count: slice.len(), element: T::TYPE }
    }

    /// The elements of a slice that is only read.
    pub(crate) fn of_const<T: Element>(slice: &[T]) -> RawSlice {
        RawSlice { ptr: slice.as_ptr().cast_mut().cast(), count: slice.len(), element: T::TYPE }
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Type of the elements.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.count * self.element.bytes()
    }

    /// Address of the first element.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// As many elements elsewhere.
    pub(crate) fn moved(&self, to: Address) -> RawSlice {
        RawSlice { ptr: to.0, ..*self }
    }

    /// The elements of `range`, which must lie inside (checked: a range outside gives an empty span at the end).
    pub(crate) fn part(&self, range: &Range<usize>) -> RawSlice {
        let start = range.start.min(self.count);
        let end = range.end.clamp(start, self.count);
        RawSlice { ptr: self.ptr.wrapping_add(start * self.element.bytes()), count: end - start, ..*self }
    }
}

/// Names an operation of the step program: it travels with every message and is compared on arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OpTag(pub u64);

impl fmt::Display for OpTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "op {}", self.0)
    }
}

/// In which order a reduction adds the ranks' contributions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// In a balanced tree over the group index (see [`tree_radices`](crate::tree_radices)): the bits depend on nothing else.
    #[default]
    Tree,
    /// In whatever order moves the fewest bytes per link; the bits may depend on transport and placement.
    Ring,
}

/// The [even](shares::even) shares of all members.
///
/// ```
/// assert_eq!(comm::even_ranges(7, 3), [0..3, 3..5, 5..7]);
/// ```
pub fn even_ranges(count: usize, parts: usize) -> Vec<Range<usize>> {
    (0..parts).map(|i| shares::even(count, parts, i)).collect()
}
