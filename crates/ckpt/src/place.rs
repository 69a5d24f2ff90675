//! Where checkpoints lie: in a directory, or under a prefix of an object store.

use std::path::Path;

use spec::Result;

use crate::bucket::Bucket;

/// What a path of a checkpoint, or of a run's checkpoints, names.
pub(crate) enum Place<'a> {
    /// A directory.
    Folder(&'a Path),
    /// A prefix in an object store.
    Bucket(Bucket),
}

impl<'a> Place<'a> {
    /// A path that is a URL names an object store, any other a directory.
    ///
    /// # Errors
    /// When the URL names no store that can be reached from here.
    pub(crate) fn of(path: &'a Path) -> Result<Self> {
        if is_url(path) { Bucket::at(path).map(Place::Bucket) } else { Ok(Place::Folder(path)) }
    }
}

/// Whether a path is a URL, as `s3://bucket/prefix` is.
pub fn is_url(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    scheme.is_some_and(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_from_paths() {
        let check = |path: &str, expected| assert_eq!(is_url(Path::new(path)), expected, "{path}");
        check("s3://bucket/prefix", true);
        check("https://host/x", true);
        check("runs/s3:/bucket", false);
        check("runs/x://y", false);
        check("://x", false);
        check("/var/run", false);
    }
}
