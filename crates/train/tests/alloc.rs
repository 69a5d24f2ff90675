//! Nothing is allocated in the step loop after the first step, and the arena is what placement said.

mod common;

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use comm::World;
use common::{SEQUENCE, fill, inputs, model};
use program::{Mode, Request};
use spec::{DType, Layout, Recompute, Zero};
use train::{Executor, Mesh};

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

/// What the transport allocates for a message that goes on beside others: it is a future of its own.
const FUTURE: usize = 4;

/// Trains five steps on as many threads as the layout has ranks: the last four allocate nothing, but for the futures of
/// `begun` messages in a step of each rank.
fn check(gpt2: bool, precision: DType, layout: &Layout, begun: usize) {
    let m = model(2, true, gpt2);
    let worlds = World::threads(layout.world()).expect("ranks");
    let together = Barrier::new(layout.world());
    let rank = |world: World| {
        let rank = world.rank();
        let mesh = Mesh::new(world, layout).expect("groups");
        let (sequence, mode) = (SEQUENCE, Mode::Train);
        let request = Request {
            model: &m,
            layout,
            sequence,
            sequences: 8,
            precision,
            rank,
            mode,
            loss: Default::default(),
            documents: false,
        };
        let mut exec = Executor::new(&request, 2, mesh, false).expect("a program");
        exec.initialise(&m, 11).expect("weights");
        assert_eq!(exec.allocated_bytes(), exec.program.memory.total);
        let mut step = |k| {
            let valid = fill(&mut exec, m.vocab, k);
            exec.step(&inputs(k, valid)).expect("a step");
        };
        step(1);
        // A queue of messages grows when a rank is further ahead than ever before, which no later window repeats.
        let windows = [2, 6, 10].map(|first| {
            together.wait();
            let before = CALLS.load(Ordering::Relaxed);
            together.wait();
            (first..first + 4).for_each(&mut step);
            together.wait();
            CALLS.load(Ordering::Relaxed) - before
        });
        together.wait();
        windows.into_iter().min().expect("three windows")
    };
    let calls = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|w| scope.spawn(|| rank(w))).collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).max().expect("a rank")
    });
    let most = 4 * layout.world() * begun * FUTURE;
    assert!(calls <= most, "{calls} allocations in four steps of {layout:?}, expected at most {most}");
}

#[test]
fn steps_after_the_first_allocate_nothing() {
    let one = Layout { micro_batch: 2, ..Layout::default() };
    check(false, DType::F32, &one, 0);
    check(true, DType::Bf16, &Layout { recompute: Recompute::Full, ..one.clone() }, 0);
    check(false, DType::F32, &Layout { recompute: Recompute::Selective, ..one.clone() }, 0);
    check(false, DType::F32, &Layout { tp: 2, ..one.clone() }, 0);
    check(false, DType::F32, &Layout { tp: 2, sequence_parallel: true, ..one.clone() }, 0);
    check(false, DType::F32, &Layout { dp: 2, zero: Zero::Gradients, ..one.clone() }, 0);
    check(false, DType::F32, &Layout { pp: 2, ..one.clone() }, 0);
    // Alignment leaves gaps between some of this small model's gradients: three runs of them are summed, each exactly.
    check(false, DType::F32, &Layout { dp: 2, ..one }, 3);
}
