use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spec::{DType, Error, Result};
use xxhash_rust::xxh3::Xxh3;

use crate::bucket::{Bucket, Upload};
use crate::dir;
use crate::disk::{Folder, NewFile};
use crate::header;
use crate::manifest::{CHUNK_BYTES, FileEntry, Kind, MANIFEST, Manifest, Meta, PieceEntry, TensorEntry, key};
use crate::place::Place;
use crate::region::{Region, matrix};
use crate::save_bucket;

/// What one rank holds of one tensor.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// Logical name, for example `layers.3.attn.q.weight`.
    pub name: &'a str,
    /// Which of the parameter's tensors.
    pub kind: Kind,
    /// Shape of the whole tensor.
    pub global_shape: &'a [usize],
    /// The parts, in the order in which they follow each other in `data`.
    pub boxes: Vec<Region>,
    /// The elements of all parts, each part row-major.
    pub data: &'a [f32],
}

/// What a rank wrote: sent to rank 0, which commits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    step: u64,
    rank: usize,
    file: FileEntry,
    /// The `file` of each piece is 0 until commit gives the files their order.
    tensors: Vec<TensorEntry>,
}

impl FileRecord {
    /// JSON, to be sent to the committing rank.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record is plain data")
    }

    /// Reads what [`FileRecord::to_bytes`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map_err(|e| Error::failure(format!("read checkpoint record of a rank: {e}")))
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.file.bytes
    }
}

/// A checkpoint being written.
///
/// Every rank begins and writes its own file; when all records are with rank 0 it commits. Saves into one directory must
/// not overlap in time.
#[derive(Debug)]
pub struct Saver {
    to: To,
    step: u64,
}

#[derive(Debug)]
enum To {
    /// A directory, and the temporary one in it.
    Folder { folder: Folder, temp: Folder },
    /// The prefix that holds a run's checkpoints.
    Bucket(Bucket),
}

impl Saver {
    /// Makes room for the checkpoint of `step` under `dir`. Every rank may call it, in any order.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn begin(dir: &Path, step: u64) -> Result<Self> {
        let to = match Place::of(dir)? {
            Place::Bucket(bucket) => To::Bucket(bucket),
            Place::Folder(dir) => {
                let folder = Folder::create(dir).map_err(|e| save_error("create", dir, &e, dir))?;
                let name = dir::temporary_name(step);
                let temp = folder.make(&name).map_err(|e| save_error("create", &dir.join(&name), &e, dir))?;
                To::Folder { folder, temp }
            }
        };
        Ok(Saver { to, step })
    }

    /// Streams the parts that `rank` holds into its file and syncs it. Rank 0 first clears what interrupted saves left.
    /// Nothing is copied; beyond the file's header no memory is used.
    ///
    /// # Errors
    /// When writing fails (the rank's file is removed again), or a piece contradicts itself.
    pub fn write_rank<'a>(
        &self,
        rank: usize,
        pieces: impl IntoIterator<Item = Piece<'a>>,
    ) -> Result<FileRecord> {
        let pieces: Vec<Piece<'a>> = pieces.into_iter().collect();
        for p in &pieces {
            let expected: usize = p.boxes.iter().map(Region::len).sum();
            if expected != p.data.len() {
                let given = p.data.len();
                return Err(bug(p.kind, p.name, &format!("{given} elements given for boxes of {expected}")));
            }
        }
        let outlines: Vec<Outline<'_>> = pieces.iter().map(Outline::of).collect();
        self.write_streamed(rank, &outlines, |out| {
            pieces.iter().try_for_each(|p| out(bytemuck::cast_slice(p.data)))
        })
    }

    /// The same for data that are not in memory: `data` gives them to its argument in order, in parts of any size.
    ///
    /// # Errors
    /// As [`Saver::write_rank`]; when `data` fails.
    pub(crate) fn write_streamed(
        &self,
        rank: usize,
        outlines: &[Outline<'_>],
        data: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<FileRecord> {
        if rank == 0 {
            self.clear_leftovers()?;
        }
        let (mut tensors, header) = plan(outlines)?;
        let total = (header.len() + 4 * outlines.iter().map(Outline::elements).sum::<usize>()) as u64;
        let write = |out: &mut Checksummed| -> Result<()> {
            out.write(&header)?;
            data(&mut |bytes| out.write(bytes))
        };
        let (name, (bytes, checksums)) = match &self.to {
            To::Folder { folder, temp } => {
                let name = format!("rank-{rank:05}.safetensors");
                let written = write_file(folder, temp, &name, write).inspect_err(|_| {
                    // The error to report is the first one; what cannot be removed now is cleared by the next save.
                    folder.discard(&dir::temporary_name(self.step), name.as_ref());
                })?;
                (name, written)
            }
            To::Bucket(bucket) => {
                let name = save_bucket::file_name(rank)?;
                let upload = save_bucket::folder(bucket, self.step).upload(&name, total);
                let mut out = Checksummed::new(Sink::Upload(upload));
                write(&mut out)?;
                (name, out.finish()?)
            }
        };
        for piece in tensors.iter_mut().flat_map(|t| &mut t.pieces) {
            piece.offset += header.len() as u64;
        }
        let file = FileEntry { name, bytes, chunk_bytes: CHUNK_BYTES, checksums };
        Ok(FileRecord { step: self.step, rank, file, tensors })
    }

    fn clear_leftovers(&self) -> Result<()> {
        match &self.to {
            To::Folder { folder, .. } => dir::clear_leftovers(folder, self.step)
                .map_err(|e| Error::io("clear leftovers of an interrupted save in", folder.path(), &e)),
            To::Bucket(bucket) => {
                save_bucket::clear_leftovers(bucket, self.step);
                Ok(())
            }
        }
    }

    /// Checks that the records cover every tensor exactly once, writes the manifest and moves the checkpoint to its
    /// final name, `dir/step-00000123`, which it returns. An earlier checkpoint of the same step is replaced.
    ///
    /// # Errors
    /// When the records do not fit together or writing fails; the temporary directory is removed then and earlier
    /// checkpoints are as they were.
    pub fn commit(dir: &Path, step: u64, records: Vec<FileRecord>, meta: Meta) -> Result<PathBuf> {
        if let Place::Bucket(bucket) = Place::of(dir)? {
            return save_bucket::commit(&bucket, &merge(step, records, meta)?, save_bucket::There::Replace);
        }
        let folder = Folder::open(dir).map_err(|e| Error::io("commit checkpoint in", dir, &e))?;
        let temp = dir::temporary_name(step);
        let prepared = merge(step, records, meta).and_then(|manifest| prepare(&folder, &temp, &manifest));
        let published = prepared.and_then(|()| publish(&folder, &temp, step));
        if let Err(e) = published {
            let _ = folder.remove(&temp);
            return Err(e);
        }
        let path = dir.join(dir::committed_name(step));
        let settle = || -> io::Result<()> {
            folder.sync()?;
            // Either name now holds what had the step's name before, if there was anything.
            folder.remove(&temp)?;
            folder.remove(&dir::old_name(step))
        };
        settle().map_err(|e| Error::io("checkpoint is written, but settle", &path, &e))?;
        Ok(path)
    }

    /// Removes what the ranks wrote for `step`; for rank 0 when a rank failed.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn abort(dir: &Path, step: u64) -> Result<()> {
        if let Place::Bucket(bucket) = Place::of(dir)? {
            return save_bucket::abort(&bucket, step);
        }
        let temp = dir::temporary_name(step);
        let removed = match Folder::open(dir) {
            Ok(folder) => folder.remove(&temp),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        };
        removed.map_err(|e| Error::io("remove unfinished checkpoint", &dir.join(&temp), &e))
    }

    /// Commits a checkpoint that was not there when [`Saver::only`] looked.
    ///
    /// # Errors
    /// As [`Saver::commit`]; in an object store also when somebody else has committed that step since.
    pub(crate) fn commit_only(&self, dir: &Path, records: Vec<FileRecord>, meta: Meta) -> Result<PathBuf> {
        match &self.to {
            To::Folder { .. } => Saver::commit(dir, self.step, records, meta),
            To::Bucket(bucket) => {
                save_bucket::commit(bucket, &merge(self.step, records, meta)?, save_bucket::There::Refuse)
            }
        }
    }

    /// Writes a checkpoint that `dir` does not have yet; `write` commits it. A failure leaves nothing behind.
    ///
    /// # Errors
    /// A user error if the step is there already, or as `write`.
    pub(crate) fn only<T>(dir: &Path, step: u64, write: impl FnOnce(&Saver) -> Result<T>) -> Result<T> {
        if let Some((_, there)) = dir::list(dir)?.into_iter().find(|(s, _)| *s == step) {
            return Err(Error::user(format!("{} is there already", there.display()))
                .hint("name another directory, or remove that checkpoint first"));
        }
        let saver = Saver::begin(dir, step)?;
        write(&saver).inspect_err(|_| {
            // What cannot be removed is cleared by the next save; the error to tell is the first.
            let _ = Saver::abort(dir, step);
        })
    }

    /// Writes and commits a checkpoint of a single rank.
    ///
    /// # Errors
    /// As [`Saver::write_rank`] and [`Saver::commit`].
    pub fn save<'a>(
        dir: &Path,
        step: u64,
        pieces: impl IntoIterator<Item = Piece<'a>>,
        meta: Meta,
    ) -> Result<PathBuf> {
        let record = Saver::begin(dir, step)?.write_rank(0, pieces)?;
        Saver::commit(dir, step, vec![record], meta)
    }
}

/// What a rank holds of one tensor, without the data.
pub(crate) struct Outline<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: Kind,
    pub(crate) shape: &'a [usize],
    pub(crate) boxes: &'a [Region],
}

impl<'a> Outline<'a> {
    fn elements(&self) -> usize {
        self.boxes.iter().map(Region::len).sum()
    }

    fn of(piece: &'a Piece<'_>) -> Self {
        Outline { name: piece.name, kind: piece.kind, shape: piece.global_shape, boxes: &piece.boxes }
    }
}

fn bug(kind: Kind, name: &str, what: &str) -> Error {
    Error::failure(format!("checkpoint {kind} {name}: {what}"))
}

/// The tensor entries of a rank's pieces, with offsets from the end of the header, and the safetensors header.
fn plan(outlines: &[Outline<'_>]) -> Result<(Vec<TensorEntry>, Vec<u8>)> {
    let mut tensors: Vec<TensorEntry> = Vec::new();
    let mut index = HashMap::new();
    let mut entries = Vec::new();
    let mut offset = 0;
    for o in outlines {
        let (shape, bug) = (o.shape, |what: String| bug(o.kind, o.name, &what));
        let (rows, cols) = matrix(shape).ok_or_else(|| bug(format!("shape {shape:?} is too large")))?;
        if let Some(outside) = o.boxes.iter().find(|b| !b.fits(rows, cols)) {
            return Err(bug(format!("{outside} reach outside of shape {shape:?}")));
        }
        let at = *index.entry((o.kind, o.name)).or_insert_with(|| {
            tensors.push(TensorEntry {
                name: o.name.to_owned(),
                kind: o.kind,
                dtype: DType::F32,
                shape: shape.to_vec(),
                pieces: Vec::new(),
            });
            tensors.len() - 1
        });
        if tensors[at].shape != shape {
            return Err(bug(format!("shape {shape:?} after {:?}", tensors[at].shape)));
        }
        for region in o.boxes.iter().filter(|b| !b.is_empty()) {
            let key = key(o.name, o.kind, shape, region);
            let stored = match *region {
                r if r == Region::whole(shape) => shape.to_vec(),
                Region::Range { len, .. } => vec![len],
                Region::Box { rows, cols, .. } => vec![rows, cols],
            };
            entries.push(header::Entry {
                name: key.clone(),
                dtype: "F32",
                shape: stored,
                bytes: 4 * region.len(),
            });
            tensors[at].pieces.push(PieceEntry { file: 0, key, offset, region: *region });
            offset += (4 * region.len()) as u64;
        }
    }
    let mut keys = HashSet::new();
    if let Some(twice) = entries.iter().find(|e| !keys.insert(e.name.as_str())) {
        return Err(Error::failure(format!("checkpoint piece {} is written twice by one rank", twice.name)));
    }
    let header = header::encode(&entries);
    Ok((tensors, header))
}

/// Streams a rank's file into the temporary directory and syncs it.
fn write_file(
    folder: &Folder,
    temp: &Folder,
    name: &str,
    write: impl FnOnce(&mut Checksummed) -> Result<()>,
) -> Result<(u64, Vec<u64>)> {
    let (path, dir) = (temp.path().join(name), folder.path());
    let failed = |e: io::Error| save_error("write", &path, &e, dir);
    let file = temp.new_file(name.as_ref()).map_err(failed)?;
    let mut out = Checksummed::new(Sink::File { file, path: &path, dir });
    write(&mut out)?;
    let sums = out.finish()?;
    temp.sync().map_err(failed)?;
    Ok(sums)
}

/// Where a rank's bytes go.
enum Sink<'a> {
    File { file: NewFile, path: &'a Path, dir: &'a Path },
    Upload(Upload),
}

impl Sink<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Sink::File { file, path, dir } => {
                file.write_all(bytes).map_err(|e| save_error("write", path, &e, dir))
            }
            Sink::Upload(upload) => upload.write_all(bytes),
        }
    }

    fn finish(self) -> Result<()> {
        match self {
            Sink::File { file, path, dir } => file.sync().map_err(|e| save_error("write", path, &e, dir)),
            Sink::Upload(upload) => upload.finish(),
        }
    }
}

/// A file whose chunks are hashed on the way out.
struct Checksummed<'a> {
    to: Sink<'a>,
    bytes: u64,
    hash: Xxh3,
    sums: Vec<u64>,
}

impl<'a> Checksummed<'a> {
    fn new(to: Sink<'a>) -> Self {
        Checksummed { to, bytes: 0, hash: Xxh3::new(), sums: Vec::new() }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = CHUNK_BYTES - (self.bytes % CHUNK_BYTES as u64) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.hash.update(now);
            self.to.write_all(now)?;
            self.bytes += now.len() as u64;
            if now.len() == room {
                self.sums.push(self.hash.digest());
                self.hash.reset();
            }
            bytes = later;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(u64, Vec<u64>)> {
        if !self.bytes.is_multiple_of(CHUNK_BYTES as u64) {
            self.sums.push(self.hash.digest());
        }
        self.to.finish()?;
        Ok((self.bytes, self.sums))
    }
}

/// One manifest of all ranks' records.
fn merge(step: u64, mut records: Vec<FileRecord>, meta: Meta) -> Result<Manifest> {
    records.sort_by_key(|r| r.rank);
    let mut files = Vec::with_capacity(records.len());
    let mut tensors: Vec<TensorEntry> = Vec::new();
    let mut index: HashMap<(Kind, String), usize> = HashMap::new();
    for record in records {
        if record.step != step {
            return Err(Error::failure(format!(
                "commit checkpoint of step {step}: rank {} wrote step {}",
                record.rank, record.step
            )));
        }
        for mut tensor in record.tensors {
            tensor.pieces.iter_mut().for_each(|p| p.file = files.len());
            let name = (tensor.kind, tensor.name.clone());
            let Some(&at) = index.get(&name) else {
                index.insert(name, tensors.len());
                tensors.push(tensor);
                continue;
            };
            if tensors[at].shape != tensor.shape {
                return Err(Error::failure(format!(
                    "commit checkpoint of step {step}: rank {} holds {} {} of shape {:?}, others {:?}",
                    record.rank, tensor.kind, tensor.name, tensor.shape, tensors[at].shape
                )));
            }
            tensors[at].pieces.append(&mut tensor.pieces);
        }
        if files.iter().any(|f: &FileEntry| f.name == record.file.name) {
            return Err(Error::failure(format!(
                "commit checkpoint of step {step}: two records of rank {}",
                record.rank
            )));
        }
        files.push(record.file);
    }
    let manifest = Manifest::new(step, meta, files, tensors);
    manifest.check().map_err(|why| Error::failure(format!("commit checkpoint of step {step}: {why}")))?;
    Ok(manifest)
}

/// Makes the temporary directory complete: exactly the recorded files, and the manifest last.
fn prepare(folder: &Folder, temp: &OsStr, manifest: &Manifest) -> Result<()> {
    let path = folder.path().join(temp);
    let temp = folder.inside(temp).map_err(|e| not_here(&path, &e))?;
    for file in &manifest.files {
        let found = temp.file_bytes(file.name.as_ref()).map_err(|e| not_here(&path.join(&file.name), &e))?;
        if found != file.bytes {
            return Err(Error::failure(format!(
                "commit checkpoint: {} has {found} bytes, its rank wrote {}",
                path.join(&file.name).display(),
                file.bytes
            )));
        }
    }
    let text = manifest.to_text()?;
    let write = || -> io::Result<()> {
        for name in temp.names()? {
            if !manifest.files.iter().any(|f| *name == *f.name) {
                temp.remove(&name)?;
            }
        }
        let mut file = temp.new_file(MANIFEST.as_ref())?;
        file.write_all(text.as_bytes())?;
        file.sync()?;
        temp.sync()
    };
    write().map_err(|e| save_error("write manifest in", &path, &e, folder.path()))
}

fn not_here(path: &Path, e: &io::Error) -> Error {
    Error::failure(format!("commit checkpoint: {} is not here: {e}", path.display()))
        .hint("every rank must see the same run.dir")
}

/// Moves the complete temporary directory to its final name.
fn publish(folder: &Folder, temp: &OsStr, step: u64) -> Result<()> {
    let name = dir::committed_name(step);
    let swap = || -> io::Result<()> {
        if folder.kind(&name)?.is_none() {
            return folder.rename(temp, &name);
        }
        if folder.exchange(temp, &name)? {
            return Ok(());
        }
        // Two renames; between them the put-aside name stands for the step.
        let old = dir::old_name(step);
        folder.remove(&old)?;
        folder.rename(&name, &old)?;
        folder.rename(temp, &name).inspect_err(|_| {
            let _ = folder.rename(&old, &name);
        })
    };
    swap().map_err(|e| save_error("move into place", &folder.path().join(&name), &e, folder.path()))
}

fn save_error(doing: &str, path: &Path, e: &io::Error, dir: &Path) -> Error {
    let error = Error::io(&format!("save checkpoint: {doing}"), path, e);
    let full = matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    );
    if !full {
        return error;
    }
    match dir::latest(dir) {
        Ok(Some(last)) => error.hint(format!(
            "free space under {} or lower checkpoint.keep; the last checkpoint is {}",
            dir.display(),
            last.display()
        )),
        _ => error.hint(format!("free space under {}", dir.display())),
    }
}
