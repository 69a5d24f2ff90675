use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys;
use spec::Result;

use crate::driver::check;

/// How the copy engine sees rows of bf16: boxes of 64 columns, swizzled by 128 bytes; what lies outside of a
/// leaf reads as zero.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct TensorMap([u64; 16]);

/// Columns and rows of a box.
const BOX: u32 = 64;

impl TensorMap {
    /// `leaves` runs of `rows` rows of `cols` elements, a multiple of 8, from an address aligned to 16 bytes.
    ///
    /// # Errors
    /// If the driver refuses.
    pub(crate) fn of_leaves(address: u64, leaves: usize, rows: usize, cols: usize) -> Result<TensorMap> {
        TensorMap::boxed(address, leaves, rows, cols, BOX)
    }

    /// One matrix, in boxes of 64 columns by so many rows.
    ///
    /// # Errors
    /// As [`TensorMap::of_leaves`].
    pub(crate) fn of_rows(address: u64, rows: usize, cols: usize, box_rows: usize) -> Result<TensorMap> {
        TensorMap::boxed(address, 1, rows, cols, box_rows as u32)
    }

    fn boxed(address: u64, leaves: usize, rows: usize, cols: usize, box_rows: u32) -> Result<TensorMap> {
        let dims = [cols, rows, leaves].map(|n| n as u64);
        let strides = [2 * cols, 2 * cols * rows].map(|n| n as u64);
        let (boxes, steps) = ([BOX, box_rows, 1], [1u32; 3]);
        let mut map = MaybeUninit::<sys::CUtensorMap>::zeroed();
        // SAFETY: an out-parameter of its own alignment; arrays of the rank given.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                3,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check(result, || format!("describe {leaves} x {rows} x {cols} elements"))?;
        // SAFETY: zeroed, then filled in.
        Ok(TensorMap(unsafe { map.assume_init() }.opaque))
    }
}
