//! What this binary is, and what shells and manuals know of it.

use std::path::Path;
use std::sync::OnceLock;

use clap::CommandFactory as _;
use spec::{Error, Result};

use crate::args::{Args, Completions, Man};
use crate::output;

/// The commit that it was built from. Whoever builds for others sets it; no build script asks git, so that a build
/// depends on what is in the tree alone and a commit rebuilds nothing (decision 020).
const COMMIT: Option<&str> = option_env!("PHALANX_COMMIT");

/// `--version`: version, commit, what it can run on.
pub(crate) fn long() -> &'static str {
    static LONG: OnceLock<String> = OnceLock::new();
    LONG.get_or_init(|| {
        let commit =
            COMMIT.filter(|c| !c.is_empty()).unwrap_or("not recorded; build with PHALANX_COMMIT set");
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        format!(
            "{}\ncommit: {commit}\nfeatures: {}\ntarget: {}-{}, {profile}",
            env!("CARGO_PKG_VERSION"),
            features(IS_STATIC).join(", "),
            std::env::consts::ARCH,
            std::env::consts::OS,
        )
    })
}

/// Linked to a C library that cannot load others (musl's `dlopen` in a static program always fails).
pub(crate) const IS_STATIC: bool = cfg!(all(target_env = "musl", target_feature = "crt-static"));

/// What is built in; libraries of GPUs and MPI are looked for when they are wanted.
fn features(is_static: bool) -> Vec<&'static str> {
    let loaded =
        if is_static { vec![] } else { vec!["cuda (loaded at run time)", "mpi (loaded at run time)"] };
    let stores = cfg!(feature = "object-store").then_some("object stores");
    let last = is_static.then_some("static, so no cuda and no mpi");
    ["cpu", "shared memory", "tcp"]
        .into_iter()
        .chain(loaded)
        .chain(["dash"])
        .chain(stores)
        .chain(last)
        .collect()
}

/// Refuses what needs a library of the machine, which a static program cannot load, wherever it lies.
pub(crate) fn loads(is_static: bool) -> Result<()> {
    if !is_static {
        return Ok(());
    }
    Err(Error::user("this program is static: it loads no libraries, so neither a GPU's driver nor an MPI")
        .hint("take one that is linked to the C library (cargo install, or the wheel); Containerfile says how for pods with GPUs"))
}

pub(crate) fn completions(args: &Completions) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "phalanx", &mut script);
    output::print(&String::from_utf8_lossy(&script));
    Ok(0)
}

/// Writes a page for the program and each of its commands.
pub(crate) fn man(args: &Man) -> Result<u8> {
    std::fs::create_dir_all(&args.dir).map_err(|e| {
        Error::io("create directory", &args.dir, &e).hint("name a writable directory with --dir")
    })?;
    let mut root = Args::command();
    root.build();
    pages(&args.dir, &root, "phalanx")?;
    output::print(&args.dir.display().to_string());
    Ok(0)
}

fn pages(dir: &Path, command: &clap::Command, name: &str) -> Result<()> {
    let path = dir.join(format!("{name}.1"));
    let io = |e: std::io::Error| Error::io("write manual page", &path, &e).hint("free space there");
    let mut page = Vec::new();
    let named = command.clone().name(name.to_owned()).bin_name(name.replace('-', " "));
    clap_mangen::Man::new(named).render(&mut page).map_err(io)?;
    std::fs::write(&path, page).map_err(io)?;
    let below = command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help");
    below.into_iter().try_for_each(|c| pages(dir, c, &format!("{name}-{}", c.get_name())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_program_says_what_it_cannot_do() {
        assert!(loads(false).is_ok());
        let e = loads(true).unwrap_err();
        assert!(e.exit_code() == 2 && e.hint_text().is_some(), "{e}");
        let shown = |is_static| features(is_static).join(", ");
        assert!(shown(false).contains("mpi (loaded at run time)") && !shown(false).contains("static"));
        assert!(shown(true).ends_with("static, so no cuda and no mpi"), "{}", shown(true));
        assert!(!shown(true).contains("loaded"), "{}", shown(true));
    }
}
