//! Compiled kernels on a card, found by name and started with their parameters.

use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::sys;
use spec::{Error, Result};

use crate::compile::{SOURCES, Source, compile};
use crate::driver::{Stream, check, get};

/// Blocks and threads of a launch, and bytes of shared memory a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) grid: [usize; 3],
    pub(crate) block: usize,
    pub(crate) shared_bytes: usize,
}

impl Geometry {
    /// So many blocks of so many threads.
    pub(crate) fn line(blocks: usize, block: usize) -> Geometry {
        Geometry { grid: [blocks, 1, 1], block, shared_bytes: 0 }
    }
}

/// Bytes that a block may have beside its static ones without being asked for.
const PLAIN_SHARED_BYTES: usize = 48 << 10;

/// The kernels of a card.
pub(crate) struct Kernels {
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, (sys::CUfunction, usize)>,
}

// SAFETY: handles of a context, which may be used from any thread on which it is current.
unsafe impl Send for Kernels {}

impl Kernels {
    /// Compiles what is not kept on disk, on as many threads as there are sources, and loads all.
    ///
    /// # Errors
    /// If NVRTC or the driver refuses.
    pub(crate) fn load(arch: &str, extra: &[Source]) -> Result<Kernels> {
        let sources: Vec<Source> = SOURCES.iter().chain(extra).copied().collect();
        // The version loads the library before the threads race for it.
        crate::compile::version()?;
        let compiled: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = sources.iter().map(|s| scope.spawn(|| compile(*s, arch))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(Error::failure("the compiler of kernels panicked"))))
                .collect()
        });
        let mut modules = Vec::new();
        for (source, code) in sources.iter().zip(compiled) {
            let mut code = code?;
            code.push(0);
            let doing = || format!("load the kernels of {}.cu for {arch}", source.name);
            let mut module = std::ptr::null_mut();
            // SAFETY: machine code as NVRTC made it, or as it was kept under the hash of its source.
            check(unsafe { sys::cuModuleLoadData(&mut module, code.as_ptr().cast()) }, doing)?;
            modules.push(module);
        }
        Ok(Kernels { modules, functions: HashMap::new() })
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// If there is no such kernel, or the driver refuses.
    pub(crate) fn launch(
        &mut self,
        stream: &Stream,
        name: &'static str,
        geometry: Geometry,
        params: &mut Params,
    ) -> Result<()> {
        let Geometry { grid: [x, y, z], block, shared_bytes } = geometry;
        if x * y * z == 0 {
            return Ok(());
        }
        let function = self.function(name, shared_bytes)?;
        let n = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // SAFETY: the parameters are those of the kernel's declaration, in order (see `table`), and they outlive the
        // call, which copies them.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                n(x),
                n(y),
                n(z),
                n(block),
                1,
                1,
                n(shared_bytes),
                stream.0,
                params.pointers().as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(result, || format!("start {name} ({x} x {y} x {z} blocks of {block}, {shared_bytes} bytes)"))
    }

    /// A kernel by name, allowed as much shared memory as it wants.
    fn function(&mut self, name: &'static str, shared_bytes: usize) -> Result<sys::CUfunction> {
        if let Some((function, allowed)) = self.functions.get(name)
            && *allowed >= shared_bytes
        {
            return Ok(*function);
        }
        let function = self.find(name)?;
        if shared_bytes > PLAIN_SHARED_BYTES {
            let what = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is alive.
            let result = unsafe { sys::cuFuncSetAttribute(function, what, shared_bytes as i32) };
            check(result, || format!("give {name} {shared_bytes} bytes of shared memory"))?;
        }
        self.functions.insert(name, (function, shared_bytes.max(PLAIN_SHARED_BYTES)));
        Ok(function)
    }

    fn find(&self, name: &str) -> Result<sys::CUfunction> {
        let c = CString::new(name).map_err(|_| Error::failure("a kernel's name with a zero byte"))?;
        for module in &self.modules {
            let found = get("find a kernel", |out| {
                // SAFETY: the module is alive; an out-parameter.
                unsafe { sys::cuModuleGetFunction(out, *module, c.as_ptr()) }
            });
            if found.is_ok() {
                return found;
            }
        }
        Err(Error::failure(format!("no kernel is called {name}")))
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        for module in &self.modules {
            // SAFETY: loaded once; nothing of it runs any more.
            unsafe { sys::cuModuleUnload(*module) };
        }
    }
}

/// The most parameters that a kernel has.
const MOST: usize = 24;

/// Parameters of a kernel, each kept at an address of its own.
#[repr(align(64))]
pub(crate) struct Params {
    words: [u64; 128],
    used: usize,
    at: [usize; MOST],
    count: usize,
}

impl Params {
    pub(crate) fn new() -> Params {
        Params { words: [0; 128], used: 0, at: [0; MOST], count: 0 }
    }

    /// Adds one, as the kernel declares it.
    pub(crate) fn with<T: Copy>(mut self, value: T) -> Params {
        let words = size_of::<T>().div_ceil(8);
        self.used = self.used.next_multiple_of((align_of::<T>() / 8).max(1));
        assert!(self.used + words <= self.words.len() && self.count < MOST && align_of::<T>() <= 64);
        // SAFETY: room was checked; a plain value without a destructor.
        unsafe { self.words[self.used..].as_mut_ptr().cast::<T>().write(value) };
        self.at[self.count] = self.used;
        self.count += 1;
        self.used += words;
        self
    }

    fn pointers(&mut self) -> [*mut c_void; MOST] {
        let base = self.words.as_mut_ptr();
        std::array::from_fn(|i| {
            let used = i < self.count;
            if used { base.wrapping_add(self.at[i]).cast() } else { std::ptr::null_mut() }
        })
    }
}
