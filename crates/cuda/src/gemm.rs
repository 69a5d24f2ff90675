//! Matrix products by cuBLASLt, with an algorithm that depends on the weights' shape alone.
//!
//! How the sum over the inner dim is cut decides its bits, so sums are never split over blocks (no reduction scheme is
//! allowed), and the algorithm of a product is chosen once, for [`REFERENCE_ROWS`] rows, however many there are: then a
//! row's result does not depend on the rows beside it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as Attribute,
    cublasLtMatmulPreferenceAttributes_t as Preference, cublasStatus_t as Status, cudaDataType_t as DataType,
};
use spec::{DType, Error, Result};

use crate::driver::Stream;
use crate::libs::{Library, load};

/// Bytes of work space that cuBLASLt may use.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;

/// What it wants the work space to be aligned to.
pub(crate) const WORKSPACE_ALIGN: usize = 256;

/// Rows of activations for which algorithms are chosen.
const REFERENCE_ROWS: usize = 8192;

/// A product of row-major matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// `y [n, out] = x [n, in] w [out, in]^T`.
    Forward,
    /// `dx [n, in] = dy [n, out] w [out, in]`.
    GradInput,
    /// `dw [out, in] = dy [n, out]^T x [n, in]`, in f32.
    GradWeight,
}

/// What a product is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) form: Form,
    /// Rows of activations.
    pub(crate) n: usize,
    pub(crate) out: usize,
    pub(crate) in_: usize,
    /// The fewest rows that this product has anywhere in the run: those of one sequence.
    pub(crate) least: usize,
    /// Of the factors; a weight's gradient is f32.
    pub(crate) dtype: DType,
    /// A bias is added to every row of a forward product.
    pub(crate) bias: bool,
    /// The result is added to something.
    pub(crate) acc: bool,
}

/// Addresses of a product's operands: the first factor is the activation (or its gradient `dy`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    pub(crate) first: u64,
    pub(crate) second: u64,
    pub(crate) bias: u64,
    pub(crate) acc: u64,
    pub(crate) result: u64,
}

/// cuBLASLt on a card.
pub(crate) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Shape, Plan>,
    /// By shape, its rows replaced by [`REFERENCE_ROWS`].
    algorithms: HashMap<Shape, sys::cublasLtMatmulAlgo_t>,
}

// SAFETY: handles that may be used from any thread, one at a time.
unsafe impl Send for CublasLt {}

/// What cuBLASLt is told of a shape.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    result: sys::cublasLtMatrixLayout_t,
    /// Of every operand's address, whatever part of a buffer it is.
    alignment_bytes: u32,
}

/// The library's version, if it is loaded.
pub(crate) fn version() -> String {
    // SAFETY: a call without preconditions on a loaded library.
    let v = unsafe { sys::cublasLtGetVersion() };
    format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100)
}

impl CublasLt {
    /// Loads and starts the library on the current card.
    ///
    /// # Errors
    /// If it is missing or does not start.
    pub(crate) fn new() -> Result<CublasLt> {
        load(Library::CublasLt)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: an out-parameter.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "start cuBLASLt")?;
        Ok(CublasLt { handle, plans: HashMap::new(), algorithms: HashMap::new() })
    }

    /// Puts a product on a stream; `workspace` has [`WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// If cuBLASLt has no algorithm for it.
    pub(crate) fn run(&mut self, stream: &Stream, shape: Shape, o: &Operands, workspace: u64) -> Result<()> {
        let algorithm = self.algorithm(&shape)?;
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Plan::new(&shape)?),
        };
        if shape.bias {
            set(plan.product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o.bias)?;
        }
        let (one, beta) = (1.0f32, if shape.acc { 1.0f32 } else { 0.0 });
        // cuBLASLt thinks in columns: what it gets is the transpose of the product, so the factors change places.
        let (left, right) = (o.second, o.first);
        let acc = if shape.acc { o.acc } else { o.result };
        let at = |address: u64| address as *const c_void;
        // SAFETY: operands of the shapes that the plan describes, in the card's memory; scalars are read at once.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                at(left),
                plan.left,
                at(right),
                plan.right,
                (&raw const beta).cast(),
                at(acc),
                plan.result,
                o.result as *mut c_void,
                plan.result,
                &algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.0.cast(),
            )
        };
        check(status, &format!("multiply {shape:?}"))
    }

    /// The algorithm of a shape, the same for any number of rows that it can do.
    fn algorithm(&mut self, shape: &Shape) -> Result<sys::cublasLtMatmulAlgo_t> {
        let reference = Shape { n: REFERENCE_ROWS, ..*shape };
        let key = if shape.form == Form::GradWeight { *shape } else { reference };
        if let Some(known) = self.algorithms.get(&key) {
            return Ok(*known);
        }
        let least = Plan::new(&Shape { n: key.n.min(shape.least), ..key })?;
        // What suits many rows may refuse few, and then what suits few may do many.
        let most = Plan::new(&key)?;
        let mut candidates = self.candidates(&most)?;
        candidates.extend(self.candidates(&least)?);
        let fits = |a: &&sys::cublasLtMatmulAlgo_t| self.can(&most, a) && self.can(&least, a);
        let found = candidates.iter().find(fits).copied().ok_or_else(|| {
            Error::failure(format!("cuBLASLt has no algorithm that keeps the order of sums of {key:?}"))
        })?;
        self.algorithms.insert(key, found);
        Ok(found)
    }

    /// Whether an algorithm can do what a plan describes.
    fn can(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        let mut result = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: descriptions that are alive; an out-parameter.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.product,
                plan.left,
                plan.right,
                plan.result,
                plan.result,
                algorithm,
                result.as_mut_ptr(),
            )
        };
        // SAFETY: zeroed before, and filled in on success.
        status == Status::CUBLAS_STATUS_SUCCESS
            && unsafe { result.assume_init() }.workspaceSize <= WORKSPACE_BYTES
    }

    /// Algorithms for a plan, the best first; none that splits sums over blocks.
    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        const MOST: usize = 16;
        let mut preference = std::ptr::null_mut();
        let mut results = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed(); MOST];
        let mut found = 0;
        // SAFETY: out-parameters; the preference is destroyed once; values of the sizes given.
        let status = unsafe {
            check(sys::cublasLtMatmulPreferenceCreate(&mut preference), "make a preference")?;
            let no_reduction = 0u32;
            let alignment = plan.alignment_bytes;
            let aligned = [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ]
            .map(|what| (what, (&raw const alignment).cast::<c_void>(), size_of::<u32>()));
            for (what, value, size) in aligned.into_iter().chain([
                (
                    Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    (&raw const WORKSPACE).cast::<c_void>(),
                    size_of::<usize>(),
                ),
                (
                    Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    (&raw const no_reduction).cast::<c_void>(),
                    size_of::<u32>(),
                ),
            ]) {
                let set = sys::cublasLtMatmulPreferenceSetAttribute(preference, what, value, size);
                check(set, "set a preference")?;
            }
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.product,
                plan.left,
                plan.right,
                plan.result,
                plan.result,
                preference,
                MOST as i32,
                results[0].as_mut_ptr(),
                &mut found,
            );
            sys::cublasLtMatmulPreferenceDestroy(preference);
            status
        };
        if status == Status::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(Vec::new());
        }
        check(status, "choose an algorithm")?;
        let found = usize::try_from(found).unwrap_or(0).min(MOST);
        // SAFETY: so many are filled in by cuBLASLt, and all were zeroed before.
        let results = results[..found].iter().map(|r| unsafe { r.assume_init() });
        Ok(results.filter(|r| r.state == Status::CUBLAS_STATUS_SUCCESS).map(|r| r.algo).collect())
    }
}

/// `cublasOperation_t`, which the bindings leave to cuBLAS proper.
const CUBLAS_OP_N: i32 = 0;
/// As above.
const CUBLAS_OP_T: i32 = 1;

/// [`WORKSPACE_BYTES`] with an address.
static WORKSPACE: usize = WORKSPACE_BYTES;

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

impl Plan {
    fn new(s: &Shape) -> Result<Plan> {
        let Shape { n, out, in_, .. } = *s;
        let of = data_type(s.dtype);
        let result_type = if s.form == Form::GradWeight { DataType::CUDA_R_32F } else { of };
        let (no, transposed) = (CUBLAS_OP_N, CUBLAS_OP_T);
        // Row-major [rows, cols] is column-major [cols, rows].
        let (left, left_op, right, right_op, result) = match s.form {
            Form::Forward => ((in_, out), transposed, (in_, n), no, (out, n)),
            Form::GradInput => ((in_, out), no, (out, n), no, (in_, n)),
            Form::GradWeight => ((in_, n), no, (out, n), transposed, (in_, out)),
        };
        let mut product = std::ptr::null_mut();
        // SAFETY: an out-parameter.
        let made = unsafe {
            sys::cublasLtMatmulDescCreate(&mut product, Compute::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F)
        };
        check(made, "describe a product")?;
        let plan = Plan {
            product,
            left: layout(of, left)?,
            right: layout(of, right)?,
            result: layout(result_type, result)?,
            alignment_bytes: if out.is_multiple_of(8) && in_.is_multiple_of(8) {
                16
            } else {
                s.dtype.bytes() as u32
            },
        };
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &left_op)?;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &right_op)?;
        if s.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &of)?;
        }
        Ok(plan)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made once in `new`.
        unsafe {
            sys::cublasLtMatmulDescDestroy(self.product);
            for layout in [self.left, self.right, self.result] {
                sys::cublasLtMatrixLayoutDestroy(layout);
            }
        }
    }
}

fn data_type(dtype: DType) -> DataType {
    if dtype == DType::Bf16 { DataType::CUDA_R_16BF } else { DataType::CUDA_R_32F }
}

fn layout(of: DataType, (rows, cols): (usize, usize)) -> Result<sys::cublasLtMatrixLayout_t> {
    let mut made = std::ptr::null_mut();
    // SAFETY: an out-parameter.
    let status =
        unsafe { sys::cublasLtMatrixLayoutCreate(&mut made, of, rows as u64, cols as u64, rows as i64) };
    check(status, "describe a matrix")?;
    Ok(made)
}

fn set<T>(product: sys::cublasLtMatmulDesc_t, what: Attribute, value: &T) -> Result<()> {
    // SAFETY: a value of the size given, read at once.
    let status = unsafe {
        sys::cublasLtMatmulDescSetAttribute(product, what, std::ptr::from_ref(value).cast(), size_of::<T>())
    };
    check(status, "describe a product")
}

fn check(status: Status, doing: &str) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: cuBLASLt gives a static string for any number.
    let says = unsafe { CStr::from_ptr(sys::cublasLtGetStatusString(status)) };
    Err(Error::failure(format!("cuBLASLt: {doing}: {}", says.to_string_lossy())))
}
