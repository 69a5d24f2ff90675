//! Which run: its file, and what goes over it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use clap::builder::{OsStringValueParser, TypedValueParser as _};

/// A run file and what overrides it.
#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct RunArgs {
    /// Run file (TOML); every key has a default
    #[arg(value_name = "RUN.toml")]
    pub(crate) file: Option<PathBuf>,
    /// Override a key, for example --set train.steps=200; see `phalanx keys`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Model of the catalogue to start from; the same as --set model.preset=NAME
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<String>,
    /// Text to train on: file, folder or glob; the same as --set data.text=PATH
    #[arg(long, value_name = "PATH", value_parser = OsStringValueParser::new().try_map(in_utf8))]
    pub(crate) text: Option<String>,
}

fn in_utf8(path: OsString) -> Result<String, String> {
    path.into_string().map_err(|path| {
        format!(
            "{} is not UTF-8, and a run file is: give a link or a folder with another name",
            path.display()
        )
    })
}
