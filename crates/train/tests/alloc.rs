//! Nothing is allocated in the step loop after the first step, and the arena is what placement said.

mod common;

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{executor, fill, inputs, model};
use spec::{DType, Layout, Recompute};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: forwards to the system's allocator; the counter changes nothing about the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(at, block) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn steps_after_the_first_allocate_nothing() {
    for (gpt2, precision, recompute) in [
        (false, DType::F32, Recompute::None),
        (true, DType::Bf16, Recompute::Full),
        (false, DType::F32, Recompute::Selective),
    ] {
        let m = model(2, true, gpt2);
        let layout = Layout { micro_batch: 2, recompute, ..Layout::default() };
        let mut exec = executor(&m, &layout, 8, precision, 2);
        assert_eq!(exec.allocated_bytes(), exec.program.memory.total);
        let mut step = |k| {
            let valid = fill(&mut exec, m.vocab, k);
            exec.step(&inputs(k, valid)).expect("a step");
        };
        step(1);
        let before = CALLS.load(Ordering::Relaxed);
        for k in 2..6 {
            step(k);
        }
        assert_eq!(CALLS.load(Ordering::Relaxed) - before, 0, "allocations in four steps");
    }
}
