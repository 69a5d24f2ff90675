//! What GPUs there are, and what is missing to use them.

use std::path::PathBuf;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use spec::{Error, Result};

use crate::driver::{Context, check, get};
use crate::libs::{LIBRARIES, Library, load};

/// The oldest driver that runs what NVRTC 12 and 13 compile: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;

/// The oldest architecture with bf16 products and asynchronous copies.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

/// A GPU of this machine.
#[derive(Clone, Debug)]
pub struct Card {
    /// Index among the cards that this process may see.
    pub ordinal: i32,
    /// For example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub processors: i32,
    /// Bytes of memory.
    pub total_bytes: usize,
}

/// A GPU, and what of it nobody holds.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Which.
    pub card: Card,
    /// Bytes; unknown where no context can be made, which is what it takes to ask.
    pub free_bytes: Option<usize>,
}

impl Card {
    /// Whether kernels are compiled for it.
    ///
    /// # Errors
    /// If it is older than sm_80.
    pub fn check(&self) -> Result<()> {
        if self.capability >= OLDEST_CAPABILITY {
            return Ok(());
        }
        let (major, minor) = self.capability;
        Err(Error::user(format!(
            "{} (card {}) is sm_{major}{minor}: bf16 products need sm_80 or later",
            self.name, self.ordinal
        ))
        .hint("use an A100 or newer, or run.device=cpu"))
    }
}

/// One library: where it was found, or why not.
#[derive(Debug)]
pub struct Found {
    /// Which.
    pub which: Library,
    /// Its file, and its version where it tells one.
    pub result: Result<(PathBuf, Option<String>)>,
}

/// Libraries and cards of this machine.
#[derive(Debug)]
pub struct Census {
    /// All libraries.
    pub libraries: Vec<Found>,
    /// The cards, or why there are none.
    pub cards: Result<Vec<Counted>>,
}

/// Looks at everything that training on GPUs needs.
pub fn census() -> Census {
    let find = |which| {
        let result = load(which).map(|path| (path, version(which)));
        Found { which, result }
    };
    Census { libraries: LIBRARIES.into_iter().map(find).collect(), cards: cards() }
}

fn version(library: Library) -> Option<String> {
    let dotted = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
    match library {
        Library::Driver => driver_version().ok().map(|v| format!("CUDA {}", dotted(v))),
        Library::Nvrtc => crate::compile::version().ok().map(|(major, minor)| format!("{major}.{minor}")),
        Library::CublasLt => Some(crate::gemm::version()),
        Library::Nccl => crate::nccl::found_version().ok().map(crate::nccl::dotted),
    }
}

/// Whether there is a driver at all.
pub fn has_driver() -> bool {
    load(Library::Driver).is_ok()
}

/// Loads and starts the driver.
///
/// # Errors
/// If there is none, it is too old, or it sees no card.
pub(crate) fn driver() -> Result<()> {
    load(Library::Driver)?;
    // SAFETY: the library is loaded; a call without preconditions.
    let result = unsafe { sys::cuInit(0) };
    if result == CUresult::CUDA_ERROR_NO_DEVICE {
        return Err(Error::user("the driver sees no GPU").hint(
            "nvidia-smi lists what there is; CUDA_VISIBLE_DEVICES may hide cards, and containers need --gpus all",
        ));
    }
    check(result, || "start the driver".into())?;
    let version = driver_version()?;
    if version < OLDEST_DRIVER {
        return Err(Error::user(format!(
            "the driver is for CUDA {}.{}, expected 12.0 or later",
            version / 1000,
            version % 1000 / 10
        ))
        .hint("install driver 525 or later, or run.device=cpu"));
    }
    Ok(())
}

fn driver_version() -> Result<i32> {
    // SAFETY: an out-parameter.
    get("ask the driver for its version", |out| unsafe { sys::cuDriverGetVersion(out) })
}

/// The cards that this process may see.
///
/// # Errors
/// As [`driver`].
pub(crate) fn cards() -> Result<Vec<Counted>> {
    driver()?;
    let counted = |ordinal| {
        let free_bytes = Context::new(ordinal).and_then(|c| c.memory()).ok().map(|(free, _)| free);
        Ok(Counted { card: card(ordinal)?, free_bytes })
    };
    (0..count()? as i32).map(counted).collect()
}

/// Which card of this machine one is, for comparison: NCCL tells cards apart by their place on the bus.
pub(crate) fn place(ordinal: i32) -> Result<String> {
    use Attribute::{
        CU_DEVICE_ATTRIBUTE_PCI_BUS_ID as BUS, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID as DEVICE,
        CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID as DOMAIN,
    };
    // SAFETY: out-parameters.
    let device = get("open the card", |out| unsafe { sys::cuDeviceGet(out, ordinal) })?;
    let part = |what: Attribute| {
        // SAFETY: an out-parameter.
        get("ask the card for its place", |out| unsafe { sys::cuDeviceGetAttribute(out, what, device) })
    };
    Ok(format!("{} {:x}:{:x}:{:x}", comm::host_id(), part(DOMAIN)?, part(BUS)?, part(DEVICE)?))
}

/// How many cards this process may see.
pub(crate) fn count() -> Result<usize> {
    // SAFETY: an out-parameter.
    let count = get("count the cards", |out| unsafe { sys::cuDeviceGetCount(out) })?;
    if count == 0 {
        return Err(Error::user("no GPU is visible").hint("CUDA_VISIBLE_DEVICES may hide them all"));
    }
    Ok(usize::try_from(count).unwrap_or(0))
}

/// A card's properties.
pub(crate) fn card(ordinal: i32) -> Result<Card> {
    // SAFETY: out-parameters of the sizes given.
    let device = get("open the card", |out| unsafe { sys::cuDeviceGet(out, ordinal) })?;
    let mut name = [0u8; 256];
    // SAFETY: as above.
    check(unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 255, device) }, || "name the card".into())?;
    let attribute = |what: Attribute| {
        // SAFETY: an out-parameter.
        get("ask the card what it can do", |out| unsafe { sys::cuDeviceGetAttribute(out, what, device) })
    };
    // SAFETY: an out-parameter.
    let total_bytes =
        get("ask the card for its memory", |out| unsafe { sys::cuDeviceTotalMem_v2(out, device) })?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Ok(Card {
        ordinal,
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        total_bytes,
    })
}
