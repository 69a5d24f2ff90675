use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use spec::{Error, Result};
use xxhash_rust::xxh3::xxh3_64;

use crate::bucket::Bucket;
use crate::dir;
use crate::header::Header;
use crate::input::{self, shown};
use crate::manifest::{FileEntry, Kind, MANIFEST, Manifest, TensorEntry};
use crate::place::Place;
use crate::region::{Region, Run, for_each_copy, matrix};

/// A committed checkpoint, open for reading.
///
/// Data are read chunk by chunk into buffers of a few chunks, and every byte handed out was hashed there. The
/// files are not mapped: a mapping would count as resident memory of the trainer, and a file cut short while mapped
/// kills the process instead of giving an error.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// Where the files lie if not in the directory `path`.
    bucket: Option<Bucket>,
    manifest: Manifest,
    index: HashMap<(Kind, String), usize>,
    cache: Mutex<Cache>,
}

/// What [`Checkpoint::verify`] read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Data files.
    pub files: usize,
    /// Checksummed chunks.
    pub chunks: usize,
    /// Bytes of data files.
    pub bytes: u64,
}

/// More than the manifest of a million pieces.
pub(crate) const MAX_MANIFEST_BYTES: usize = 4 << 30;

/// Chunks kept: one for a parameter, each of its moments, and the piece that follows. Neighbouring rows and small
/// tensors mostly lie in the same chunk.
const CACHED_CHUNKS: usize = 4;

/// Bytes of chunks that are asked of an object store at the same time: enough that round trips do not show.
const AHEAD_BYTES: usize = 32 << 20;

/// The chunks read last, most recent first, and the file they came from.
#[derive(Debug, Default)]
struct Cache {
    file: Option<(usize, File)>,
    chunks: Vec<Chunk>,
}

/// A verified chunk of a file.
#[derive(Debug)]
struct Chunk {
    file: usize,
    index: u64,
    bytes: Vec<u8>,
}

impl Checkpoint {
    /// Opens the checkpoint directory `path` (`.../step-00000123`): checks the manifest, that it describes every element
    /// of every tensor exactly once, and that all files are there at their full length. Reads no tensor data.
    ///
    /// # Errors
    /// A user error naming the file at fault; the hint names the previous checkpoint that opens, if there is one.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_alone(path).map_err(|e| hint_previous(e, path))
    }

    fn open_alone(path: &Path) -> Result<Self> {
        let bucket = match Place::of(path)? {
            Place::Folder(_) => None,
            Place::Bucket(bucket) => Some(bucket),
        };
        let file = path.join(MANIFEST);
        let text = match &bucket {
            None => input::read_text("open checkpoint: read", &file, MAX_MANIFEST_BYTES)?,
            Some(bucket) => text_of(bucket, &file)?,
        };
        let manifest = Manifest::from_text(&text, &file)?;
        match &bucket {
            None => manifest.files.iter().try_for_each(|file| check_file(&path.join(&file.name), file))?,
            Some(bucket) => check_objects(bucket, &manifest)?,
        }
        let index = manifest.tensors.iter().enumerate().map(|(i, t)| ((t.kind, t.name.clone()), i)).collect();
        Ok(Checkpoint { path: path.to_owned(), bucket, manifest, index, cache: Mutex::default() })
    }

    /// The directory, or the URL.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the checkpoint says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Optimiser steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The tensor's entry.
    ///
    /// # Errors
    /// When the checkpoint has no such tensor.
    pub fn tensor(&self, name: &str, kind: Kind) -> Result<&TensorEntry> {
        // The key is owned because HashMap looks up tuples only whole; names are short and lookups rare.
        let at = self.index.get(&(kind, name.to_owned()));
        at.map(|i| &self.manifest.tensors[*i])
            .ok_or_else(|| Error::user(format!("checkpoint {} has no {kind} {name}", self.path.display())))
    }

    /// Reads a rectangle of a tensor seen as a matrix (`shape[0]` rows; a vector has one row) into `out`, row-major.
    ///
    /// # Errors
    /// When the tensor or the rectangle does not exist, or a chunk that holds a part of it does not match its checksum.
    pub fn read_box(
        &self,
        name: &str,
        kind: Kind,
        row0: usize,
        rows: usize,
        col0: usize,
        cols: usize,
        out: &mut [f32],
    ) -> Result<()> {
        self.read_regions(name, kind, &[Region::rect(row0, rows, col0, cols)], out)
    }

    /// Reads parts of a tensor, one after the other, into `out`: the counterpart of [`crate::Piece`].
    ///
    /// # Errors
    /// As [`Checkpoint::read_box`].
    pub fn read_regions(&self, name: &str, kind: Kind, regions: &[Region], out: &mut [f32]) -> Result<()> {
        let tensor = self.tensor(name, kind)?;
        let (rows, cols) = matrix(&tensor.shape)
            .ok_or_else(|| Error::user(format!("{kind} {name}: shape {:?} is too large", tensor.shape)))?;
        if let Some(outside) = regions.iter().find(|r| !r.fits(rows, cols)) {
            return Err(Error::user(format!(
                "checkpoint {} holds {kind} {name} of shape {:?}; {outside} are outside",
                self.path.display(),
                tensor.shape
            )));
        }
        let expected: usize = regions.iter().map(Region::len).sum();
        if expected != out.len() {
            return Err(Error::failure(format!(
                "read {kind} {name}: room for {} elements, expected {expected}",
                out.len()
            )));
        }
        let mut out = out;
        for region in regions {
            let (now, later) = out.split_at_mut(region.len());
            self.read_region(tensor, region, cols, now)?;
            out = later;
        }
        Ok(())
    }

    fn read_region(&self, tensor: &TensorEntry, region: &Region, cols: usize, out: &mut [f32]) -> Result<()> {
        // A panic while the lock was held leaves at worst a chunk less in the list.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in &tensor.pieces {
            let at = |run: &Run| {
                let start = piece.offset + (run.from * size_of::<f32>()) as u64;
                start..start + (run.len * size_of::<f32>()) as u64
            };
            let mut ahead = BTreeSet::new();
            if self.bucket.is_some() {
                let note = |run| {
                    ahead.extend(self.chunks_of(piece.file, at(&run)));
                    Ok::<(), Error>(())
                };
                for_each_copy(&piece.region, region, cols, note)?;
            }
            for_each_copy(&piece.region, region, cols, |run| {
                let range = at(&run);
                let bytes = bytemuck::cast_slice_mut(&mut out[run.to..run.to + run.len]);
                self.read_bytes(&mut cache, piece.file, range.start, &ahead, bytes)
            })
            .map_err(|e| hint_previous(e, &self.path))?;
        }
        Ok(())
    }

    /// Copies verified bytes of a file into `out`.
    fn read_bytes(
        &self,
        cache: &mut Cache,
        file: usize,
        offset: u64,
        ahead: &BTreeSet<u64>,
        out: &mut [u8],
    ) -> Result<()> {
        let mut done = 0;
        self.visit(cache, file, offset..offset + out.len() as u64, ahead, &mut |bytes| {
            out[done..done + bytes.len()].copy_from_slice(bytes);
            done += bytes.len();
            Ok(())
        })
    }

    /// Hands out bytes of a file in order, verified, in parts of at most a chunk.
    ///
    /// # Errors
    /// When a chunk cannot be read or does not match its checksum; what `each` fails with.
    pub(crate) fn stream(
        &self,
        file: usize,
        range: Range<u64>,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = match self.bucket {
            None => BTreeSet::new(),
            Some(_) => self.chunks_of(file, range.clone()).collect(),
        };
        self.visit(&mut cache, file, range, &ahead, each)
    }

    /// The chunks that a range of a file lies in.
    fn chunks_of(&self, file: usize, range: Range<u64>) -> Range<u64> {
        let chunk_bytes = self.manifest.files[file].chunk_bytes as u64;
        range.start / chunk_bytes..range.end.div_ceil(chunk_bytes)
    }

    fn visit(
        &self,
        cache: &mut Cache,
        file: usize,
        range: Range<u64>,
        ahead: &BTreeSet<u64>,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let chunk_bytes = self.manifest.files[file].chunk_bytes as u64;
        let mut offset = range.start;
        while offset < range.end {
            let (chunk, within) = (offset / chunk_bytes, (offset % chunk_bytes) as usize);
            let available = &self.chunk(cache, file, chunk, ahead)?[within..];
            let n = (available.len() as u64).min(range.end - offset);
            each(&available[..n as usize])?;
            offset += n;
        }
        Ok(())
    }

    /// The bytes of a chunk, read and checked unless they are in the cache; `ahead` says which chunks of the file will be
    /// wanted beside it.
    fn chunk<'c>(
        &self,
        cache: &'c mut Cache,
        file: usize,
        chunk: u64,
        ahead: &BTreeSet<u64>,
    ) -> Result<&'c [u8]> {
        if let Some(at) = cache.chunks.iter().position(|c| (c.file, c.index) == (file, chunk)) {
            cache.chunks[..=at].rotate_right(1);
            return Ok(&cache.chunks[0].bytes);
        }
        match &self.bucket {
            None => self.read_chunk(cache, file, chunk)?,
            Some(bucket) => self.fetch_chunks(bucket, cache, file, chunk, ahead)?,
        }
        Ok(&cache.chunks[0].bytes)
    }

    /// Reads a chunk from its file to the front of the cache.
    fn read_chunk(&self, cache: &mut Cache, file: usize, chunk: u64) -> Result<()> {
        // Out of the list while it is filled: what fails to verify must not stay.
        let mut bytes = match cache.chunks.len() {
            CACHED_CHUNKS => cache.chunks.pop().map(|c| c.bytes).unwrap_or_default(),
            _ => Vec::new(),
        };
        let path = self.path.join(&self.manifest.files[file].name);
        let io = |e| Error::io("read checkpoint", &path, &e);
        if cache.file.as_ref().is_none_or(|(open, _)| *open != file) {
            cache.file = Some((file, input::open("read checkpoint", &path)?));
        }
        let Some((_, handle)) = &cache.file else { unreachable!("opened above") };
        let at = self.bytes_of(file, chunk);
        bytes.resize((at.end - at.start) as usize, 0);
        handle.read_exact_at(&mut bytes, at.start).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::user(format!("checkpoint file {} was cut short", path.display()))
            }
            _ => io(e),
        })?;
        self.check_chunk(file, chunk, &bytes)?;
        cache.chunks.insert(0, Chunk { file, index: chunk, bytes });
        Ok(())
    }

    /// Fetches a chunk, and some of those wanted after it at the same time, to the front of the cache.
    fn fetch_chunks(
        &self,
        bucket: &Bucket,
        cache: &mut Cache,
        file: usize,
        chunk: u64,
        ahead: &BTreeSet<u64>,
    ) -> Result<()> {
        let entry = &self.manifest.files[file];
        let at_once = (AHEAD_BYTES / entry.chunk_bytes).max(1);
        let known = |c: &u64| cache.chunks.iter().any(|k| (k.file, k.index) == (file, *c));
        let later = ahead.range(chunk + 1..).filter(|c| !known(c)).take(at_once - 1).copied();
        let wanted: Vec<u64> = std::iter::once(chunk).chain(later).collect();
        let ranges: Vec<Range<u64>> = wanted.iter().map(|c| self.bytes_of(file, *c)).collect();
        cache.chunks.truncate(CACHED_CHUNKS);
        let fetched = bucket.ranges(&entry.name, &ranges)?;
        // The first is needed now; what is wrong with a later one is told when it is.
        for (index, bytes) in wanted.into_iter().zip(fetched).rev() {
            match self.check_chunk(file, index, &bytes) {
                Ok(()) => cache.chunks.insert(0, Chunk { file, index, bytes }),
                Err(e) if index == chunk => return Err(e),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Where a chunk lies in its file.
    fn bytes_of(&self, file: usize, chunk: u64) -> Range<u64> {
        let entry = &self.manifest.files[file];
        let start = chunk * entry.chunk_bytes as u64;
        start..entry.bytes.min(start + entry.chunk_bytes as u64)
    }

    fn check_chunk(&self, file: usize, chunk: u64, bytes: &[u8]) -> Result<()> {
        let (entry, at) = (&self.manifest.files[file], self.bytes_of(file, chunk));
        let (found, expected) = (xxh3_64(bytes), entry.checksums[chunk as usize]);
        if found == expected && bytes.len() as u64 == at.end - at.start {
            return Ok(());
        }
        Err(Error::user(format!(
            "checkpoint file {} is damaged in chunk {chunk} (bytes {}..{}): checksum {found:016x}, expected {expected:016x}",
            self.path.join(&entry.name).display(),
            at.start,
            at.end
        )))
    }

    /// Reads every byte and compares all checksums; also that the files' own headers agree with the manifest.
    ///
    /// # Errors
    /// A user error naming the first damaged file and chunk, and how many more there are.
    pub fn verify(&self) -> Result<Verified> {
        let (mut chunks, mut bad) = (0, 0);
        let mut first: Option<Error> = None;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        // What is in memory was right when it was read; the question is what is on the disk now.
        *cache = Cache::default();
        for (i, file) in self.manifest.files.iter().enumerate() {
            let all: BTreeSet<u64> = (0..file.checksums.len() as u64).collect();
            for chunk in &all {
                if let Err(e) = self.chunk(&mut cache, i, *chunk, &all) {
                    bad += 1;
                    first.get_or_insert(e);
                }
                chunks += 1;
            }
        }
        drop(cache);
        if let Some(e) = first {
            let e = if bad > 1 { e.context(format!("{bad} of {chunks} chunks are damaged")) } else { e };
            return Err(hint_previous(e, &self.path));
        }
        for i in 0..self.manifest.files.len() {
            self.verify_header(i).map_err(|e| hint_previous(e, &self.path))?;
        }
        let bytes = self.manifest.files.iter().map(|f| f.bytes).sum();
        Ok(Verified { files: self.manifest.files.len(), chunks, bytes })
    }

    fn verify_header(&self, file: usize) -> Result<()> {
        let path = self.path.join(&self.manifest.files[file].name);
        let header = match &self.bucket {
            None => Header::read(&input::open("read checkpoint", &path)?, &path)?,
            Some(bucket) => {
                let entry = &self.manifest.files[file];
                Header::read_with(entry.bytes, &path, |range| {
                    let mut found = bucket.ranges(&entry.name, &[range])?;
                    Ok(found.pop().unwrap_or_default())
                })?
            }
        };
        for tensor in &self.manifest.tensors {
            for piece in tensor.pieces.iter().filter(|p| p.file == file) {
                let agrees = header.tensors.get(&piece.key).is_some_and(|info| {
                    let elements: usize = info.shape.iter().product();
                    let place = header.offset(info) == piece.offset;
                    place && info.dtype == "F32" && elements == piece.region.len()
                });
                if !agrees {
                    return Err(Error::user(format!(
                        "checkpoint file {}: piece {} is not where the manifest says",
                        path.display(),
                        shown(&piece.key)
                    )));
                }
            }
        }
        Ok(())
    }
}

/// A manifest's text in an object store.
fn text_of(bucket: &Bucket, file: &Path) -> Result<String> {
    let Some((text, _)) = bucket.read(MANIFEST, MAX_MANIFEST_BYTES)? else {
        return Err(Error::user(format!("open checkpoint: {} is not there", file.display()))
            .hint("phalanx ckpt ls lists those of a run"));
    };
    String::from_utf8(text).map_err(|_| {
        Error::user(format!("checkpoint manifest {} is damaged: it is not UTF-8", file.display()))
    })
}

/// A data file is there at its full length.
fn check_file(path: &Path, file: &FileEntry) -> Result<()> {
    let found = fs::metadata(path).map_err(|e| Error::io("open checkpoint: find", path, &e))?;
    if !found.is_file() {
        return Err(Error::user(format!("checkpoint file {} is not a regular file", path.display())));
    }
    check_bytes(path, found.len(), file)
}

/// All data files are there at their full lengths.
fn check_objects(bucket: &Bucket, manifest: &Manifest) -> Result<()> {
    let found: HashMap<String, u64> = bucket.files()?.into_iter().collect();
    for file in &manifest.files {
        let path = bucket.url().join(&file.name);
        let Some(bytes) = found.get(&file.name) else {
            return Err(Error::user(format!("checkpoint file {} is not there", path.display())));
        };
        check_bytes(&path, *bytes, file)?;
    }
    Ok(())
}

fn check_bytes(path: &Path, found: u64, file: &FileEntry) -> Result<()> {
    if found == file.bytes {
        return Ok(());
    }
    let how = if found < file.bytes { "cut short" } else { "too long" };
    Err(Error::user(format!(
        "checkpoint file {} is {how}: {found} bytes, the manifest says {}",
        path.display(),
        file.bytes
    )))
}

/// Points to the newest older checkpoint beside `path` that opens.
fn hint_previous(error: Error, path: &Path) -> Error {
    let Some(parent) = path.parent() else { return error };
    let Ok(all) = dir::list(parent) else { return error };
    let older = all.iter().rev().skip_while(|(_, p)| p != path).skip(1);
    match older.map(|(_, p)| p).find(|p| Checkpoint::open_alone(p).is_ok()) {
        Some(good) => error.hint(format!("the previous checkpoint is {}", good.display())),
        None => error,
    }
}

#[cfg(test)]
#[path = "read_test.rs"]
mod tests;
