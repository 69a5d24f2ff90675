//! Stands for object stores in a program that was built without them: none can be opened.

use std::convert::Infallible;
use std::ops::Range;
use std::path::Path;

use spec::{Error, Result};

/// A prefix in an object store; there is none.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    // Private, so that callers do not see that there is none, and read as they do where there is one.
    never: Infallible,
}

/// An object on its way; there is none.
pub(crate) struct Upload {
    never: Infallible,
}

/// Which writing of an object it is; there is none.
pub(crate) struct Version {
    _never: Infallible,
}

impl Bucket {
    pub(crate) fn at(url: &Path) -> Result<Bucket> {
        Err(Error::user(format!("{}: this phalanx was built without object stores", url.display()))
            .hint("build it with its default features: cargo build --release; or name a directory"))
    }
    pub(crate) fn inside(&self, _: &str) -> Bucket {
        match self.never {}
    }
    pub(crate) fn url(&self) -> &Path {
        match self.never {}
    }
    pub(crate) fn folders(&self) -> Result<Vec<String>> {
        match self.never {}
    }
    pub(crate) fn files(&self) -> Result<Vec<(String, u64)>> {
        match self.never {}
    }
    pub(crate) fn have(&self, _: &[String]) -> Result<Vec<bool>> {
        match self.never {}
    }
    pub(crate) fn read(&self, _: &str, _: usize) -> Result<Option<(Vec<u8>, Version)>> {
        match self.never {}
    }
    pub(crate) fn ranges(&self, _: &str, _: &[Range<u64>]) -> Result<Vec<Vec<u8>>> {
        match self.never {}
    }
    pub(crate) fn create(&self, _: &str, _: &[u8]) -> Result<bool> {
        match self.never {}
    }
    pub(crate) fn replace(&self, _: &str, _: &[u8], _: Version) -> Result<bool> {
        match self.never {}
    }
    pub(crate) fn upload(&self, _: &str, _: u64) -> Upload {
        match self.never {}
    }
    pub(crate) fn remove(&self, _: &[String]) -> Result<()> {
        match self.never {}
    }
}

impl Upload {
    pub(crate) fn write_all(&mut self, _: &[u8]) -> Result<()> {
        match self.never {}
    }
    pub(crate) fn finish(self) -> Result<()> {
        match self.never {}
    }
}
