//! Checkpoints in an object store: one in memory that counts what is asked of it, and fails when it is told to.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetRange, GetResult, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::{
    Checkpoint, FileRecord, Kind, Meta, Piece, Region, Saver, bucket, diff, keep, latest, list, reshard,
};

/// What happens to the operation at which a [`Watched`] store fails, and to those after it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// The process dies: none takes place.
    Crash,
    /// That one takes place, but its answer is lost; the rest is well.
    Lost,
    /// That one alone does not take place.
    Refused,
}

/// A store in memory that counts operations which change it, and notes what is read.
#[derive(Debug)]
struct Watched {
    inner: InMemory,
    armed: Mutex<Option<(Fault, usize)>>,
    done: AtomicUsize,
    read: Mutex<Vec<(Key, Range<u64>)>>,
}

impl std::fmt::Display for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("watched")
    }
}

impl Watched {
    /// A store of its own, and the URL of a prefix in it.
    fn new() -> (Arc<Watched>, PathBuf) {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let store = Arc::new(Watched {
            inner: InMemory::new(),
            armed: Mutex::default(),
            done: AtomicUsize::new(0),
            read: Mutex::default(),
        });
        let name = format!("memory://bucket{}", NEXT.fetch_add(1, Ordering::Relaxed));
        bucket::place(&name, Arc::clone(&store) as _);
        (store, PathBuf::from(name).join("of/a/run"))
    }

    fn arm(&self, fault: Option<(Fault, usize)>) {
        *self.armed.lock().unwrap() = fault;
        self.done.store(0, Ordering::Relaxed);
    }

    /// Counts an operation; whether it may take place, and whether its answer arrives.
    fn point(&self) -> (bool, bool) {
        let done = self.done.fetch_add(1, Ordering::Relaxed);
        match *self.armed.lock().unwrap() {
            Some((Fault::Crash, at)) if done >= at => (false, false),
            Some((Fault::Refused, at)) if done == at => (false, false),
            Some((Fault::Lost, at)) if done == at => (true, false),
            _ => (true, true),
        }
    }

    async fn change<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let (takes_place, answers) = self.point();
        let done = if takes_place { work.await } else { Err(failed()) };
        if answers { done } else { done.and(Err(failed())) }
    }

    /// Everything in it, by name.
    fn names(&self) -> Vec<String> {
        let all = async {
            self.inner.list(None).map(|o| o.unwrap().location.to_string()).collect::<Vec<_>>().await
        };
        let mut names = futures(all);
        names.sort();
        names
    }
}

/// Waits for what is in memory.
fn futures<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

fn failed() -> StoreError {
    StoreError::Generic { store: "watched", source: "503 slow down".into() }
}

#[async_trait]
impl ObjectStore for Watched {
    async fn put_opts(&self, key: &Key, bytes: PutPayload, how: PutOptions) -> Result<PutResult> {
        self.change(self.inner.put_opts(key, bytes, how)).await
    }

    async fn put_multipart_opts(
        &self,
        key: &Key,
        how: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.change(self.inner.put_multipart_opts(key, how)).await
    }

    async fn get_opts(&self, key: &Key, how: GetOptions) -> Result<GetResult> {
        if let Some(GetRange::Bounded(range)) = &how.range {
            self.read.lock().unwrap().push((key.clone(), range.clone()));
        }
        self.inner.get_opts(key, how).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        let (takes_place, answers) = self.point();
        if !takes_place {
            return futures_util::stream::iter([Err(failed())]).boxed();
        }
        let done = self.inner.delete_stream(keys);
        if answers { done } else { done.map(|_| Err(failed())).boxed() }
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Key, to: &Key, how: CopyOptions) -> Result<()> {
        self.change(self.inner.copy_opts(from, to, how)).await
    }
}

/// Rows of the tensor that is saved: large enough for several parts of an upload from each rank.
const ROWS: usize = 64;
const COLS: usize = 48;

/// What `ranks` ranks write of a tensor whose elements begin at `value`, each some columns of it.
fn write(dir: &Path, step: u64, value: f32, ranks: usize) -> spec::Result<Vec<FileRecord>> {
    let write_rank = |rank: usize| {
        let (col0, cols) = (rank * COLS / ranks, COLS / ranks);
        let element = |i: usize| value + (i / cols * COLS + col0 + i % cols) as f32;
        let data: Vec<f32> = (0..ROWS * cols).map(element).collect();
        let boxes = vec![Region::rect(0, ROWS, col0, cols)];
        let piece = Piece { name: "w", kind: Kind::Param, global_shape: &[ROWS, COLS], boxes, data: &data };
        Saver::begin(dir, step)?.write_rank(rank, [piece])
    };
    (0..ranks).map(write_rank).collect()
}

fn save_as(dir: &Path, step: u64, value: f32, run: &str) -> spec::Result<PathBuf> {
    let meta = Meta { world: 4, fingerprint: run.to_owned(), ..Meta::default() };
    Saver::commit(dir, step, write(dir, step, value, 4)?, meta)
}

fn save(dir: &Path, step: u64, value: f32) -> spec::Result<PathBuf> {
    save_as(dir, step, value, "a")
}

fn steps(dir: &Path) -> Vec<u64> {
    list(dir).unwrap().into_iter().map(|(step, _)| step).collect()
}

/// The value of the newest checkpoint, which must be whole.
fn newest(dir: &Path) -> f32 {
    let checkpoint = Checkpoint::open(&latest(dir).unwrap().expect("a checkpoint")).unwrap();
    checkpoint.verify().unwrap();
    let mut out = vec![0.0; ROWS * COLS];
    checkpoint.read_box("w", Kind::Param, 0, ROWS, 0, COLS, &mut out).unwrap();
    assert!(out.iter().enumerate().all(|(i, x)| *x == out[0] + i as f32), "{out:?}");
    out[0]
}

#[test]
fn a_checkpoint_is_seen_when_its_manifest_is_there() {
    let (store, url) = Watched::new();
    assert_eq!(latest(&url).unwrap(), None);
    let records = write(&url, 7, 1.0, 4).unwrap();
    assert_eq!((steps(&url), store.names().len()), (vec![], 4), "half a checkpoint is none");
    let path = Saver::commit(&url, 7, records, Meta::default()).unwrap();
    assert_eq!(path, url.join("step-00000007"));
    assert_eq!((latest(&url).unwrap(), newest(&url)), (Some(path), 1.0));
    // A rank that fails takes nothing with it.
    write(&url, 8, 2.0, 4).unwrap();
    Saver::abort(&url, 8).unwrap();
    Saver::abort(&url, 7).unwrap();
    assert_eq!((steps(&url), store.names().len(), newest(&url)), (vec![7], 5, 1.0));
}

#[test]
fn a_step_is_replaced_by_its_own_run_alone() {
    let (store, url) = Watched::new();
    save(&url, 3, 1.0).unwrap();
    save(&url, 3, 2.0).unwrap();
    assert_eq!((newest(&url), store.names().len()), (2.0, 5), "files of the first are gone");
    let error = save_as(&url, 3, 4.0, "another").expect_err("refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains("it is there already, and of another run"), "{error}");
    assert_eq!((newest(&url), store.names().len()), (2.0, 5));
    // Where a step must be new, the store decides, not a look before.
    let saver = Saver::begin(&url, 3).unwrap();
    let error =
        saver.commit_only(&url, write(&url, 3, 5.0, 4).unwrap(), Meta::default()).expect_err("refused");
    assert!(error.to_string().contains("it is there already"), "{error}");
    assert_eq!((newest(&url), store.names().len()), (2.0, 5));
}

#[test]
fn layouts_move_between_stores_and_directories() {
    let (_, url) = Watched::new();
    let dir = tempfile::tempdir().unwrap();
    let there = save(&url, 3, 1.0).unwrap();
    let here = save(dir.path(), 3, 1.0).unwrap();
    assert!(diff(&there, &here).unwrap().bit_equal());
    let two = reshard(&there, &url.join("two"), 2).unwrap();
    let back = reshard(&two.path, &dir.path().join("back"), 3).unwrap();
    assert_eq!((two.files, back.files), (2, 3));
    for other in [&two.path, &back.path] {
        assert!(diff(&here, other).unwrap().bit_equal());
    }
    let error = reshard(&there, &url.join("two"), 5).expect_err("it is there");
    assert!(error.to_string().contains("step-00000003 is there already"), "{error}");
}

#[test]
fn retention_removes_the_commit_first() {
    let (store, url) = Watched::new();
    for step in 1..=4 {
        save(&url, step, step as f32).unwrap();
    }
    assert_eq!(keep(&url, 2, Some(2)).unwrap(), [1]);
    assert_eq!(steps(&url), [2, 3, 4]);
    store.arm(Some((Fault::Crash, 1)));
    keep(&url, 1, None).expect_err("it died");
    store.arm(None);
    assert_eq!(steps(&url), [3, 4], "the manifest went first");
    assert!(store.names().iter().any(|name| name.contains("step-00000002")), "its files are left");
    save(&url, 5, 5.0).unwrap();
    assert!(!store.names().iter().any(|name| name.contains("step-00000002")), "the next save clears them");
}

/// Saves value 1 at step 1, then value 2 at `step` with a fault at every operation in turn.
#[track_caller]
fn check_faults(step: u64, fault: Fault) {
    for at in 0.. {
        let (store, url) = Watched::new();
        save(&url, 1, 1.0).unwrap();
        store.arm(Some((fault, at)));
        let saved = save(&url, step, 2.0);
        let operations = store.done.load(Ordering::Relaxed);
        store.arm(None);
        if operations <= at {
            saved.expect("no fault was met");
            assert!(at > 4, "the save has more operations than {at}");
            return;
        }
        let found = newest(&url);
        assert!(found == 1.0 || found == 2.0, "{fault:?} at {at}: {found}");
        if saved.is_ok() {
            assert_eq!(found, 2.0, "{fault:?} at {at}: what is said to be saved is there");
        }
        save(&url, 3, 3.0).unwrap();
        assert_eq!(newest(&url), 3.0, "{fault:?} at {at}");
        keep(&url, 1, None).unwrap();
        assert_eq!(
            store.names().len(),
            5,
            "{fault:?} at {at}: the next save clears leftovers: {:?}",
            store.names()
        );
    }
}

#[test]
fn a_save_that_dies_anywhere_leaves_the_old_or_the_new() {
    check_faults(2, Fault::Crash);
    check_faults(1, Fault::Crash);
}

#[test]
fn an_answer_that_is_lost_loses_no_checkpoint() {
    check_faults(2, Fault::Lost);
    check_faults(1, Fault::Lost);
    check_faults(2, Fault::Refused);
    check_faults(1, Fault::Refused);
}

#[test]
fn a_rank_reads_the_chunks_that_it_needs_once() {
    let (store, url) = Watched::new();
    let elements = 4 * crate::manifest::CHUNK_BYTES;
    let data: Vec<f32> = (0..elements).map(|i| i as f32).collect();
    let piece = Piece {
        name: "w",
        kind: Kind::Param,
        global_shape: &[elements],
        boxes: vec![Region::range(0, elements)],
        data: &data,
    };
    let path = Saver::save(&url, 1, [piece], Meta::default()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (start, len) = (elements / 4 + 5, elements / 2);
    let mut out = vec![0.0; len];
    for (from, part) in [0, len / 2].into_iter().zip(out.chunks_mut(len / 2)) {
        let region = [Region::range(start + from, len / 2)];
        checkpoint.read_regions("w", Kind::Param, &region, part).unwrap();
    }
    assert!(out.iter().enumerate().all(|(i, x)| *x == (start + i) as f32));
    let mut read = store.read.lock().unwrap().clone();
    read.sort_by_key(|(_, range)| range.start);
    assert!(read.windows(2).all(|w| w[0].1.end <= w[1].1.start), "no byte twice: {read:?}");
    let bytes: u64 = read.iter().map(|(_, range)| range.end - range.start).sum();
    let needed = 4 * len as u64;
    assert!(
        (needed..=needed + 2 * crate::manifest::CHUNK_BYTES as u64).contains(&bytes),
        "{bytes} of {needed}"
    );
}

#[test]
fn damage_is_named() {
    let (store, url) = Watched::new();
    save(&url, 1, 1.0).unwrap();
    let path = save(&url, 2, 2.0).unwrap();
    let names = store.names();
    let name = names.iter().find(|n| n.contains("step-00000002/rank-00001")).expect("a file of rank 1");
    let key = Key::from(name.as_str());
    let mut bytes = futures(async { store.inner.get(&key).await.unwrap().bytes().await.unwrap().to_vec() });
    let put = |bytes: Vec<u8>| futures(async { store.inner.put(&key, bytes.into()).await.unwrap() });
    let check = |error: spec::Error, what: &str| {
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(what), "{error}");
        let hint = error.hint_text().unwrap_or_default();
        assert!(hint.contains("the previous checkpoint is") && hint.contains("step-00000001"), "{hint}");
    };
    *bytes.last_mut().unwrap() ^= 1;
    put(bytes.clone());
    check(Checkpoint::open(&path).unwrap().verify().expect_err("damaged"), "is damaged in chunk 0");
    bytes.pop();
    put(bytes);
    check(Checkpoint::open(&path).expect_err("short"), "is cut short");
    futures(async { store.inner.delete(&key).await.unwrap() });
    check(Checkpoint::open(&path).expect_err("gone"), "is not there");
}

#[test]
fn urls_that_name_no_store_are_refused() {
    let check = |url: &str, what: &str| {
        let error = list(Path::new(url)).expect_err("refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.hint_text().is_some(), "{error}");
    };
    check("ftp://host/x", "ftp is no kind of object store");
    check("https://host/x", "https is no kind of object store");
    check("s3:///x", "names no bucket");
    check("s3://bucket/a//b", "a//b");
}
