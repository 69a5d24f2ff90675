//! Sends and receives: order, depth, channels, mismatches.

mod common;

use comm::{Bootstrap, ElementType, Op, OpTag, Order, RawSlice, World};
use common::{Kind, run, serve, values};
use std::time::{Duration, Instant};

const TAG: OpTag = OpTag(5);
const KINDS: [Kind; 4] = [Kind::Threads, Kind::Shm, Kind::Tcp, Kind::Hosts(1)];

#[test]
fn messages_come_in_order_on_each_channel() {
    for kind in KINDS {
        run(kind, 2, |world| {
            let group = world.all();
            let sizes = [1, 0, 3000, 17, 200_000];
            if world.rank() == 0 {
                for (i, size) in sizes.into_iter().enumerate() {
                    group.send(TAG, 1, 1, &values(i, size)).unwrap();
                    group.send(TAG, 1, 2, &values(i + 100, size)).unwrap();
                }
            } else {
                // The second channel first: channels do not wait for each other.
                for (channel, seed) in [(2, 100), (1, 0)] {
                    for (i, size) in sizes.into_iter().enumerate() {
                        let mut x = vec![0.0; size];
                        group.recv(TAG, 0, channel, &mut x).unwrap();
                        assert_eq!(x, values(i + seed, size), "{kind:?}");
                    }
                }
            }
            world.barrier().unwrap();
        });
    }
}

#[test]
fn mpi_carries_messages_in_order() {
    common::mpi::under_mpiexec("mpi_carries_messages_in_order", &[2], |n| {
        run(Kind::Mpi, n, |world| {
            let group = world.all();
            let sizes = [1, 0, 3000, 17, 900_000];
            for (i, size) in sizes.into_iter().enumerate() {
                let mut x = vec![0.0; size];
                if world.rank() == 0 {
                    group.send(TAG, 1, 1, &values(i, size)).unwrap();
                    group.send(TAG, 1, 2, &values(i + 100, size)).unwrap();
                } else {
                    group.recv(TAG, 0, 2, &mut x).unwrap();
                    assert_eq!(x, values(i + 100, size));
                    group.recv(TAG, 0, 1, &mut x).unwrap();
                    assert_eq!(x, values(i, size));
                }
            }
            world.barrier().unwrap();
        });
    });
}

/// Members that do not agree hear of it, and of both versions; the first one that gives up ends all.
#[test]
fn mpi_ranks_fail_together() {
    let name = "mpi_ranks_fail_together";
    if !common::mpi::is_rank(name) {
        let Some(ended) = common::mpi::start(name, 2) else { return };
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(ended.status.code(), Some(7), "{said}{}", String::from_utf8_lossy(&ended.stderr));
        assert!(said.contains("of 3 f32") && said.contains("of 4 f32"), "{said}");
        return;
    }
    let world = common::mpi::world(Kind::Mpi, 2, "apart");
    let count = 3 + world.rank();
    let error = world.all().all_reduce(TAG, &mut [0.0f32; 4][..count], Order::Tree).unwrap_err();
    println!("\n{error}");
    comm::Mpi::abort(7);
}

/// A rank that stands still is named at the deadline; who names it ends the job, and says with which code.
#[test]
fn mpi_waits_have_deadlines() {
    let name = "mpi_waits_have_deadlines";
    if !common::mpi::is_rank(name) {
        let Some(ended) = common::mpi::start(name, 3) else { return };
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert_eq!(ended.status.code(), Some(7), "{said}{}", String::from_utf8_lossy(&ended.stderr));
        assert!(said.contains("waited 2.0 s for rank 1 (pid"), "{said}");
        assert!(said.contains("rank 1 (pid") && said.contains("has given no sign of life"), "{said}");
        return;
    }
    let world = common::mpi::world(Kind::Mpi, 3, "still");
    world.barrier().unwrap();
    if world.rank() == 1 {
        // SAFETY: stops this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
        loop {
            std::thread::park();
        }
    }
    let error = world.all().all_reduce(TAG, &mut [0.0f32; 50_000], Order::Tree).unwrap_err();
    println!("\n{error}");
    comm::Mpi::abort(7);
}

#[test]
fn a_full_channel_holds_the_sender_and_loses_nothing() {
    for kind in KINDS {
        run(kind, 2, |world| {
            let group = world.group(&[1, 0], 9).unwrap();
            group.set_depth(2).unwrap();
            assert!(group.set_depth(0).is_err());
            for i in 0..200u32 {
                if world.rank() == 1 {
                    group.send(TAG, 1, 0, &[i; 64]).unwrap();
                } else {
                    let mut x = [0u32; 64];
                    group.recv(TAG, 0, 0, &mut x).unwrap();
                    assert_eq!(x, [i; 64]);
                }
            }
            world.barrier().unwrap();
        });
    }
}

/// Every stage of a pipeline ring sends before it receives, and collectives of another group go on meanwhile.
#[test]
fn started_messages_and_collectives_overlap() {
    for kind in [Kind::Threads, Kind::Shm, Kind::Tcp, Kind::Hosts(2)] {
        run(kind, 4, |world| {
            let (me, n) = (world.rank(), world.size());
            let ring = world.group(&[0, 1, 2, 3], 1).unwrap();
            let pairs = world.group(if me < 2 { &[0, 1] } else { &[2, 3] }, 2).unwrap();
            let count = 50_000;
            let arena = world.alloc_shared(8 * count).unwrap();
            let out = arena.span(0, count, ElementType::F32).unwrap();
            let inn = arena.span(4 * count, count, ElementType::F32).unwrap();
            for round in 0..3usize {
                let mut reduced = values(me, 1000);
                // SAFETY: the two halves of the arena and `reduced` are left alone until the handles are done.
                unsafe {
                    let values = values(me + round, count);
                    std::ptr::copy_nonoverlapping(values.as_ptr().cast(), out.as_ptr(), out.bytes());
                    let recv = ring
                        .start(TAG, Op::Recv { buffer: inn, from: (me + n - 1) % n, channel: 0 })
                        .unwrap();
                    let reduce = Op::AllReduce { buffer: RawSlice::of(&mut reduced), order: Order::Tree };
                    let reduce = pairs.start(OpTag(round as u64), reduce).unwrap();
                    let send =
                        ring.start(TAG, Op::Send { buffer: out, to: (me + 1) % n, channel: 0 }).unwrap();
                    let mut small = [me as f32];
                    pairs.all_reduce(TAG, &mut small, Order::Tree).unwrap();
                    let times = reduce.wait().unwrap();
                    assert!(times.posted <= times.began && times.began <= times.ended);
                    recv.wait().unwrap();
                    send.wait().unwrap();
                }
                let mut got = vec![0.0f32; count];
                // SAFETY: the receive is done.
                unsafe { std::ptr::copy_nonoverlapping(inn.as_ptr().cast(), got.as_mut_ptr(), count) };
                assert_eq!(got, values((me + n - 1) % n + round, count), "{kind:?}");
            }
            world.barrier().unwrap();
        });
    }
}

/// Ranks that start operations of two groups in different orders do not wait in a circle.
#[test]
fn groups_do_not_wait_for_each_other() {
    for kind in [Kind::Threads, Kind::Shm, Kind::Tcp, Kind::Hosts(2)] {
        run(kind, 4, |world| {
            let everyone = world.group(&[0, 1, 2, 3], 1).unwrap();
            let reversed = world.group(&[3, 2, 1, 0], 2).unwrap();
            for round in 0..20u64 {
                let mut buffers = [values(world.rank(), 5000), values(world.rank(), 5000)];
                let mut groups = [&everyone, &reversed];
                let spans = buffers.each_mut().map(|b| RawSlice::of(b));
                if world.rank() % 2 == 1 {
                    groups.reverse();
                }
                // SAFETY: the buffers are left alone until the handles are done.
                let handles = [0, 1].map(|i| unsafe {
                    let op = Op::AllReduce { buffer: spans[i], order: Order::Tree };
                    groups[i].start(OpTag(round), op).unwrap()
                });
                for handle in handles {
                    handle.wait().unwrap();
                }
            }
            world.barrier().unwrap();
        });
    }
}

/// What all ranks report when each does its own thing; they must name both ranks.
fn disagree(kind: Kind, n: usize, work: impl Fn(&World) -> spec::Result<()> + Sync) -> Vec<String> {
    run(kind, n, |world| {
        let began = Instant::now();
        // A rank that only sends may be done before the mismatch is found; then its next operation fails.
        let error =
            work(&world).and_then(|()| world.barrier()).expect_err("a mismatch was not noticed").to_string();
        assert!(began.elapsed() < common::TIMEOUT, "{error}");
        // Everything fails for the same reason from now on.
        assert!(world.barrier().is_err());
        error
    })
}

#[test]
fn disagreements_name_both_ranks() {
    for kind in [Kind::Threads, Kind::Shm, Kind::Tcp] {
        let check = |what: &str, parts: [&str; 2], work: &(dyn Fn(&World) -> spec::Result<()> + Sync)| {
            for error in disagree(kind, 2, work) {
                let both = error.contains("rank 0") && error.contains("rank 1");
                assert!(both && parts.iter().all(|p| error.contains(p)), "{kind:?}, {what}: {error}");
            }
        };
        check("count", ["f32", "group"], &|w| {
            w.all().all_reduce(TAG, &mut vec![0.0f32; 1000 + w.rank()], Order::Tree)
        });
        check("tag", ["op 0", "op 1"], &|w| {
            w.all().all_reduce(OpTag(w.rank() as u64), &mut [0.0f32], Order::Tree)
        });
        check("element", ["f32", "u32"], &|w| match w.rank() {
            0 => w.all().broadcast(TAG, &mut [0.0f32; 8], 0),
            _ => w.all().broadcast(TAG, &mut [0u32; 8], 0),
        });
        check("kind", ["barrier", "all_reduce"], &|w| match w.rank() {
            0 => w.all().barrier(TAG),
            _ => w.all().all_reduce(TAG, &mut [0.0f32; 8], Order::Tree),
        });
        check("message", ["send of 3 f32", "send of 4 f32"], &|w| match w.rank() {
            0 => w.all().send(TAG, 1, 0, &[0.0f32; 3]),
            _ => w.all().recv(TAG, 0, 0, &mut [0.0f32; 4]),
        });
        check("ranges", ["reduce_scatter", "other ranges"], &|w| {
            let cut = 1 + w.rank();
            w.all().reduce_scatter(TAG, &mut [0.0f32; 4], &[0..cut, cut..4], Order::Tree)
        });
        check("members", ["group", "other ranges"], &|w| {
            w.group(if w.rank() == 0 { &[0, 1] } else { &[1, 0] }, 5).map(drop)
        });
    }
}

#[test]
fn wrong_calls_are_refused_without_harm() {
    run(Kind::Threads, 2, |world| {
        let all = world.all();
        assert!(all.broadcast(TAG, &mut [0.0f32], 2).is_err());
        assert!(all.send(TAG, world.rank(), 0, &[0.0f32]).is_err());
        assert!(all.reduce_scatter(TAG, &mut [0.0f32; 4], &[0..2, 2..5], Order::Tree).is_err());
        assert!(all.reduce_scatter(TAG, &mut [0.0f32; 4], &comm::even_ranges(4, 1), Order::Tree).is_err());
        for (ranks, part) in
            [(&[0, 0][..], "twice"), (&[0, 7], "no rank 7"), (&[1 - world.rank()], "not a member")]
        {
            let error = world.group(ranks, 1).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
        let arena = world.alloc_shared(64).unwrap();
        assert!(arena.span(0, 17, ElementType::F32).is_err() && arena.span(2, 1, ElementType::F32).is_err());
        world.barrier().unwrap();
    });
}

#[test]
fn a_late_rank_is_named_at_the_deadline() {
    for kind in [Kind::Threads, Kind::Shm, Kind::Tcp] {
        let (_server, store) = serve();
        let connect = |rank: usize| {
            let mut b = common::bootstrap(kind, rank, 2, store.clone(), "late");
            b.timeout = Duration::from_millis(300);
            World::connect(&b).unwrap()
        };
        let worlds = match kind {
            Kind::Threads => World::threads_with(2, Duration::from_millis(300)).unwrap(),
            _ => std::thread::scope(|s| {
                let other = s.spawn(|| connect(1));
                vec![connect(0), other.join().unwrap()]
            }),
        };
        let error = worlds[0].barrier().unwrap_err().to_string();
        assert!(error.contains("waited 0.3 s for rank 1"), "{kind:?}: {error}");
        // Rank 0 did come to the barrier, so the news may reach the late rank only in its next operation.
        let error = worlds[1].barrier().and_then(|()| worlds[1].barrier()).unwrap_err().to_string();
        assert!(error.contains("rank 0: waited 0.3 s for rank 1"), "{kind:?}: {error}");
    }
}

#[test]
fn a_rank_that_leaves_or_aborts_is_named() {
    for kind in KINDS {
        let errors = run(kind, 3, |world| match world.rank() {
            1 => String::new(),
            0 => world.barrier().unwrap_err().to_string(),
            _ => world.all().recv(TAG, 1, 0, &mut [0u8]).unwrap_err().to_string(),
        });
        assert!(errors[0].contains("rank 1 left"), "{kind:?}: {}", errors[0]);
        assert!(errors[2].contains("rank 1 left"), "{kind:?}: {}", errors[2]);

        let errors = run(kind, 3, |world| {
            if world.rank() == 2 {
                world.abort("disk full");
            }
            world.barrier().unwrap_err().to_string()
        });
        assert!(errors.iter().all(|e| e == "rank 2 gave up: disk full"), "{kind:?}: {errors:?}");
    }
}

#[test]
fn ranks_meet_only_their_own_kind() {
    let (_server, store) = serve();
    let join = |session: &'static str, change: &(dyn Fn(usize, &mut Bootstrap) + Sync)| -> Vec<String> {
        std::thread::scope(|s| {
            let threads: Vec<_> = (0..2)
                .map(|rank| {
                    let mut b = Bootstrap::new(rank, 2, store.clone(), session);
                    b.timeout = Duration::from_secs(10);
                    change(rank, &mut b);
                    s.spawn(move || World::connect(&b).err().unwrap().to_string())
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    };
    for error in join("fingerprint", &|rank, b| b.fingerprint[0] = rank as u8) {
        assert!(error.contains("rank 0 (pid") && error.contains("rank 1 (pid"), "{error}");
        assert!(error.contains("different configurations or binaries"), "{error}");
    }
    let errors = join("twice", &|_, b| {
        b.rank = 0;
        b.timeout = Duration::from_millis(500);
    });
    assert!(errors.iter().any(|e| e.contains("rank 0 of session twice was already taken")), "{errors:?}");
    let errors = join("missing", &|rank, b| {
        b.world = 4;
        b.rank = rank * 2;
        b.timeout = Duration::from_millis(500);
    });
    assert!(errors.iter().all(|e| e.contains("rank 1, rank 3 to come")), "{errors:?}");
    let errors = join("hosts", &|rank, b| {
        b.host = format!("h{rank}/x");
        b.transport = comm::TransportChoice::Shm;
    });
    assert!(errors.iter().all(|e| e.contains("transport shm")), "{errors:?}");
}
