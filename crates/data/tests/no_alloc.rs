//! Reading samples allocates nothing: the step loop relies on it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use data::{Blend, Epochs, GptDataset, IndexedWriter, Source, TokenStream, TokenType};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn check(stream: &dyn TokenStream, samples: u64) {
    let mut out = vec![0; stream.sequence() + 1];
    let before = ALLOCATIONS.with(Cell::get);
    for i in 0..samples {
        stream.sample(i, &mut out).unwrap();
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0);
}

#[test]
fn samples_do_not_allocate() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    let mut writer = IndexedWriter::create(&prefix, TokenType::U16).unwrap();
    for length in 0..200u32 {
        writer.push(&(0..length).collect::<Vec<_>>()).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
    let source = Arc::new(Source::open(&prefix).unwrap());
    let set = GptDataset::new(source.clone(), 0..200, 32, Some(2000), 1).unwrap().with_vocab(200);
    check(&set, 2000);
    // Several epochs, each of which is ordered anew in the memory of an earlier one.
    let epochs = || Epochs::new(source.clone(), 0..200, 32, 1, Some(200)).unwrap();
    check(&epochs(), 5000);
    let blend = Blend::new(vec![(Box::new(epochs()), 0.3), (Box::new(set), 0.7)], 2000).unwrap();
    check(&blend, 2000);
}
