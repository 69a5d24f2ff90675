//! Tests with a neighbour whose memory and messages say what no rank would say: an error that names it, and never a
//! byte read or written outside what is shared.

use crate::connect::host_id;
use crate::control::MAX_SENDS;
use crate::element::{ElementType, OpTag, Order, RawSlice};
use crate::header::{Header, Space};
use crate::inner::{Core, Location, PeerSegment};
use crate::memory::Mapping;
use crate::op::Op;
use crate::{Bootstrap, StoreClient, StoreServer, World};
use rustix::fs::{MemfdFlags, SealFlags};
use spec::Result;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::time::Duration;

const TAG: OpTag = OpTag(9);
const COUNT: usize = 50_000;

/// Lets rank 1 do `attack` and then rank 0 `act`, which must fail with `expected` and name rank 1.
#[track_caller]
fn check(attack: impl Fn(&World) + Sync, act: impl Fn(&World) -> Result<()> + Sync, expected: &str) {
    let server = StoreServer::start(std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let attacked = Barrier::new(2);
    let rank = |rank: usize| {
        let store = StoreClient::connect(&server.addr().to_string(), Duration::from_secs(30)).unwrap();
        let mut b = Bootstrap::new(rank, 2, store, "hostile");
        b.timeout = Duration::from_secs(30);
        World::connect(&b).unwrap()
    };
    let said = std::thread::scope(|s| {
        s.spawn(|| {
            let world = rank(1);
            attack(&world);
            attacked.wait();
            attacked.wait();
        });
        let world = rank(0);
        attacked.wait();
        let said = act(&world).expect_err("an attack was not noticed").to_string();
        attacked.wait();
        said
    });
    assert!(said.contains(&format!("rank 1 (pid {} on ", std::process::id())), "{said}");
    assert!(said.contains(expected), "{expected} is not in {said}");
    assert!(host_id().starts_with(said.split(" on ").nth(1).unwrap().split(')').next().unwrap()));
}

/// What the header of a first operation of all ranks says.
fn header(op: &Op<'_>) -> Header {
    let (summary, group) = (op.summary(), crate::header::GroupKey { id: u32::MAX, space: Space::Collective });
    let crate::op::Summary { element, count, order, root, detail } = summary;
    let kind = op.kind();
    Header {
        kind,
        element,
        order,
        root,
        group,
        channel: 0,
        seq: 0,
        tag: TAG,
        count,
        detail,
        message: 0,
        part: 0,
    }
}

fn message(count: usize) -> Header {
    let mut header = header(&Op::Send { buffer: span(count), to: 0, channel: 0 });
    header.group.space = Space::User;
    Header { part: count as u64, ..header }
}

fn span(count: usize) -> RawSlice {
    RawSlice::new(std::ptr::NonNull::<u8>::dangling().as_ptr(), count, ElementType::F32)
}

/// Posts `words` as a message to rank 0 in `slot`, as the ring entry after `tail` earlier ones.
fn post(core: &Core, slot: u32, words: [u64; 10], tail: u64) {
    let at = (slot as usize).min(MAX_SENDS - 1);
    core.control.send_header(at).write(&words);
    core.control.ring_entry(0, 0).store(slot, Ordering::Relaxed);
    core.control.ring_tail(0).store(tail, Ordering::Release);
}

fn words(header: &Header, location: Location) -> [u64; 10] {
    let mut words = [0; 10];
    words[..8].copy_from_slice(&header.encode());
    words[8..].copy_from_slice(&[location.segment, location.offset]);
    words
}

fn receive(world: &World) -> Result<()> {
    world.all().recv(TAG, 1, 0, &mut vec![0f32; COUNT])
}

#[test]
fn a_message_must_be_one() {
    let good = |core: &Core| {
        let (id, _, _) = core.share(4 * COUNT).unwrap();
        words(&message(COUNT), Location { segment: id, offset: 0 })
    };
    let damaged = "sent a message that cannot be read";
    for slot in [MAX_SENDS as u32, 0x00ff_ffff, u32::MAX] {
        check(|w| post(&w.core, slot, good(&w.core), 1), receive, damaged);
    }
    check(|w| post(&w.core, 0, [u64::MAX; 10], 1), receive, damaged);
    let many = "has more messages on their way than it may";
    for tail in [u64::MAX, MAX_SENDS as u64 + 1] {
        check(|w| post(&w.core, 0, good(&w.core), tail), receive, many);
    }
}

#[test]
fn a_message_lies_in_memory_of_its_sender() {
    for offset in [4, 4096 * COUNT as u64, u64::MAX - 3, u64::MAX] {
        let attack = |w: &World| {
            let (id, _, _) = w.core.share(4 * COUNT).unwrap();
            post(&w.core, 0, words(&message(COUNT), Location { segment: id, offset }), 1);
        };
        check(attack, receive, "named 200000 bytes outside its shared memory");
    }
}

/// Rank 1 comes to the first meeting of all with `op`'s header, `location`, and a table row for rank 0.
fn come(core: &Core, words: [u64; 10], row: [u64; 2]) {
    core.control.header(0, 1).write(&words);
    for (word, value) in core.control.table(0, 1, 0).into_iter().zip(row) {
        word.store(value, Ordering::Relaxed);
    }
    core.control.step(0).store(1, Ordering::Release);
}

#[test]
fn buffers_of_a_meeting_lie_in_memory_of_their_members() {
    let op = || Op::AllReduce { buffer: span(COUNT), order: Order::Tree };
    let act = |w: &World| {
        let arena = w.alloc_shared(4 * COUNT)?;
        let buffer = arena.span(0, COUNT, ElementType::F32)?;
        // SAFETY: the arena outlives the call.
        unsafe { w.all().run(TAG, Op::AllReduce { buffer, order: Order::Tree }) }
    };
    for offset in [4, u64::MAX - 3] {
        let attack = |w: &World| {
            let (id, _, _) = w.core.share(4 * COUNT).unwrap();
            come(&w.core, words(&header(&op()), Location { segment: id, offset }), [0; 2]);
        };
        check(attack, act, "named 200000 bytes outside its shared memory");
    }
    check(|w| come(&w.core, [u64::MAX; 10], [0; 2]), act, "with a header that cannot be read");
}

#[test]
fn runs_of_an_all_to_all_are_checked_as_they_are_used() {
    let run = COUNT / 2;
    let op = |input: RawSlice, output: RawSlice| Op::AllToAll {
        input,
        input_ranges: crate::even_ranges(COUNT, 2).into(),
        output,
        output_ranges: crate::even_ranges(COUNT, 2).into(),
    };
    let act = |w: &World| {
        let arena = w.alloc_shared(8 * COUNT)?;
        let half = |at: usize| arena.span(4 * COUNT * at, COUNT, ElementType::F32);
        let (input, output) = (half(0)?, half(1)?);
        // SAFETY: the arena outlives the call.
        unsafe { w.all().run(TAG, op(input, output)) }
    };
    let attack = |row: [u64; 2]| {
        move |w: &World| {
            let (id, _, _) = w.core.share(4 * COUNT).unwrap();
            let header = header(&op(span(COUNT), span(COUNT)));
            come(&w.core, words(&header, Location { segment: id, offset: 0 }), row);
        }
    };
    // Sums and products of these overflow, some to something small.
    for start in [u64::MAX, u64::MAX - run as u64 + 1, 1 << 62, 1 << 40, COUNT as u64 - run as u64 + 1] {
        check(attack([start, run as u64]), act, "outside its shared memory");
    }
    // A mismatch is no damage, but it is the sender who is named first.
    let server = "sends 7 f32 to rank 0, which expects 25000";
    let named = |w: &World| act(w).map_err(|e| e.context(format!("rank 1 ({})", w.core.peers[1].place)));
    check(attack([0, 7]), named, server);
}

#[test]
fn a_file_is_mapped_only_if_it_cannot_shrink() {
    let check = |file: &dyn Fn() -> rustix::fd::OwnedFd, bytes: usize, expected: Option<&str>| {
        let said = Mapping::of_file(file(), bytes).err().map(|e| e.to_string());
        match expected {
            None => assert_eq!(said, None),
            Some(part) => {
                assert!(said.as_ref().is_some_and(|s| s.contains(part)), "{part} is not in {said:?}")
            }
        }
    };
    let memory = |seals: SealFlags| {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let sealed = || memory(SealFlags::SHRINK);
    check(&sealed, 4096, None);
    check(&sealed, 4097, Some("shared memory of 4096 bytes, expected 4097"));
    for bytes in [usize::MAX, usize::MAX / 2 + 1, usize::MAX / 2] {
        check(&sealed, bytes, Some("expected"));
    }
    check(&|| memory(SealFlags::GROW), 4096, Some("not sealed against shrinking"));
    check(&|| std::fs::File::open("/proc/self/exe").unwrap().into(), 64, Some("not sealed"));
    check(&|| std::os::unix::net::UnixStream::pair().unwrap().0.into(), 0, Some("not sealed"));
}

#[test]
fn memory_that_is_taken_back_stays_mapped_while_it_is_touched() {
    let server = StoreServer::start(std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let store = StoreClient::connect(&server.addr().to_string(), Duration::from_secs(30)).unwrap();
    let world = World::connect(&Bootstrap::new(0, 1, store, "alone")).unwrap();
    let segments = &world.core.segments;
    let kept = |touching: usize| {
        let (mapping, _) = Mapping::shared("test", 4096).unwrap();
        let at = mapping.ptr();
        segments.add_peer(PeerSegment { rank: 7, id: 3, mapping });
        let touches: Vec<_> = (0..touching).map(|_| world.core.touch().unwrap()).collect();
        segments.drop_peer(7, 3);
        for touch in touches {
            // SAFETY: the mapping stays while it is touched, which is what is tested.
            assert_eq!(unsafe { at.read_volatile() }, 0);
            assert_eq!(segments.retired(), 1);
            drop(touch);
        }
        assert_eq!(segments.retired(), 0);
    };
    kept(0);
    kept(1);
    kept(2);
}
