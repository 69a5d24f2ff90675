//! Where a job's secret is from, and what may be done without one.
//!
//! The agent makes it and hands it to its workers in their environment, which no other user can read. Where agents or
//! ranks are on several machines somebody must share it: a file that all see, or a variable that a batch system passes on.

use crate::net;
use comm::Secret;
use spec::{Error, Result};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The secret itself. Set for workers; a person may set it too.
const TEXT: &str = "PHALANX_SECRET";
/// A file that holds it.
const FILE: &str = "PHALANX_SECRET_FILE";
/// Set to go without one.
const INSECURE: &str = "PHALANX_INSECURE";
/// Most of a file that is read: what is longer is none.
const FILE_BYTES_MAX: u64 = 8192;

/// The job's secret, and how it goes on to other processes.
#[derive(Clone, Debug)]
pub(crate) struct Trust {
    pub(crate) secret: Secret,
    /// Its text, kept from `Debug`.
    text: Hidden,
    is_insecure: bool,
}

#[derive(Clone, Default)]
struct Hidden(Option<String>);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "..." } else { "none" })
    }
}

impl Trust {
    /// What this process was given: by `file` (a flag) or its environment.
    ///
    /// # Errors
    /// A file that cannot be read, that others can read, or that holds no secret.
    pub(crate) fn given(file: Option<&Path>, is_insecure: bool) -> Result<Trust> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
        let is_insecure = is_insecure || var(INSECURE).is_some_and(|v| v.trim() != "0");
        let (text, source) = match (file, var(TEXT), var(FILE)) {
            (Some(path), _, _) => (Some(read_or_make(path)?), format!("--secret {}", path.display())),
            (None, Some(text), _) => (Some(text), TEXT.to_owned()),
            (None, None, Some(path)) => (Some(read_or_make(Path::new(&path))?), format!("{FILE}={path}")),
            (None, None, None) => (None, String::new()),
        };
        match text {
            Some(text) => Trust::of(text, &source),
            None => Ok(Trust { secret: Secret::none(), text: Hidden(None), is_insecure }),
        }
    }

    fn of(text: String, source: &str) -> Result<Trust> {
        Ok(Trust { secret: Secret::parse(&text, source)?, text: Hidden(Some(text)), is_insecure: false })
    }

    /// One made for this job alone, unless one was given. For jobs all of whose processes this one starts.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub(crate) fn or_random(self) -> Result<Trust> {
        if self.secret.is_none() && !self.is_insecure {
            return Trust::of(Secret::random_text()?, "made for this job");
        }
        Ok(self)
    }

    /// The text to hand on, if there is a secret.
    pub(crate) fn text(&self) -> Option<&str> {
        self.text.0.as_deref()
    }

    /// Refuses to meet at `host` without a secret, where others than this machine's can reach that.
    ///
    /// # Errors
    /// No secret was given, `host` is not this machine alone, and nobody said that this is all right.
    pub(crate) fn check(&self, host: &str, port: u16) -> Result<()> {
        let is_here = net::is_loopback(host, port);
        if is_here || self.is_insecure || !self.secret.is_none() {
            return Ok(());
        }
        Err(Error::user(format!(
            "the processes of this job meet at {}, where others can reach them, and no secret was given",
            net::join_endpoint(host, port)
        ))
        .hint(
            "give all of them one: export PHALANX_SECRET=$(openssl rand -hex 32) where a batch system passes it on, or \
             phalanx launch --secret FILE with a file that all machines see (it is made if there is none); on a network \
             that you trust: --insecure, or PHALANX_INSECURE=1",
        ))
    }

    /// Variables for workers. What is left over of another job must not be taken for this one's.
    pub(crate) fn variables(&self) -> [(&'static str, String); 2] {
        let insecure = if self.is_insecure { "1" } else { "0" };
        [(TEXT, self.text().unwrap_or_default().to_owned()), (INSECURE, insecure.to_owned())]
    }
}

/// The secret of the job that this process belongs to, as its environment has it; none if nobody gave one.
///
/// # Errors
/// What is there is no secret, or in a file that cannot be read or that others can read.
pub fn from_env() -> Result<Secret> {
    Ok(Trust::given(None, false)?.secret)
}

/// Whether a variable must not be shown.
pub(crate) fn is_secret(name: &str) -> bool {
    name == TEXT
}

/// The text in `path`; a new secret if there is no such file. Of several processes that come at once all get the same one.
fn read_or_make(path: &Path) -> Result<String> {
    match read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        read => {
            return read
                .map_err(|e| Error::io("read the job's secret in", path, &e))
                .and_then(|text| check_file(path, text));
        }
    }
    let failed = |e: std::io::Error| Error::io("make a file for the job's secret,", path, &e);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Whole from its first moment: others may read it at once. The name of who writes it makes it their own.
    let name = format!(
        ".{}.{}-{}",
        path.file_name().unwrap_or_default().display(),
        net::host_name(),
        std::process::id()
    );
    let own = folder.join(name);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own).map_err(failed)?;
    let text = Secret::random_text()? + "\n";
    let written = (&made).write_all(text.as_bytes()).and_then(|()| made.sync_all());
    // A link does not replace what another process has made meanwhile.
    let linked = written.and_then(|()| std::fs::hard_link(&own, path));
    let _ = std::fs::remove_file(&own);
    match linked {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(failed(e)),
        _ => {
            let text = read(path).map_err(|e| Error::io("read the job's secret in", path, &e))?;
            check_file(path, text)
        }
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    OpenOptions::new().read(true).open(path)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// A file that others can read holds no secret.
fn check_file(path: &Path, text: String) -> Result<String> {
    const OTHERS: u32 = 0o077;
    let meta = std::fs::metadata(path).map_err(|e| Error::io("look at the job's secret in", path, &e))?;
    if meta.mode() & OTHERS != 0 {
        let (shown, mode) = (path.display(), meta.mode() & 0o777);
        return Err(Error::user(format!(
            "the job's secret in {shown} is none: others may read or write the file (its mode is {mode:o})"
        ))
        .hint(format!("chmod 600 {shown}, and a new secret if somebody may have read this one")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_is_made_once_for_all_who_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("job.secret");
        let texts: Vec<String> = std::thread::scope(|s| {
            // Processes in truth; threads share their number, so they take turns to make their own file.
            (0..4).map(|_| s.spawn(|| read_or_make(&path).unwrap()).join().unwrap()).collect()
        });
        assert!(texts.iter().all(|t| *t == texts[0]));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        Secret::parse(&texts[0], "a file").unwrap();
    }

    #[test]
    fn a_file_that_others_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let check = |mode: u32, expected: Option<&str>| {
            std::fs::write(&path, "0123456789abcdef0123456789abcdef").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = Trust::given(Some(&path), false).err().map(|e| (e.exit_code(), e.to_string()));
            assert_eq!(error.as_ref().map(|(code, _)| *code), expected.map(|_| 2));
            assert!(error.is_none_or(|(_, said)| said.contains(expected.unwrap())));
        };
        check(0o600, None);
        check(0o400, None);
        check(0o640, Some("its mode is 640"));
        check(0o604, Some("its mode is 604"));
        check(0o620, Some("its mode is 620"));
    }

    #[test]
    fn beyond_this_machine_a_secret_is_needed() {
        let none = || Trust { secret: Secret::none(), text: Hidden(None), is_insecure: false };
        none().check("127.0.0.1", 1).unwrap();
        none().check("::1", 1).unwrap();
        let error = none().check("192.0.2.1", 29400).unwrap_err();
        assert!(error.to_string().contains("meet at 192.0.2.1:29400") && error.exit_code() == 2, "{error}");
        assert!(error.hint_text().is_some_and(|h| h.contains("PHALANX_INSECURE=1")));
        Trust { is_insecure: true, ..none() }.check("192.0.2.1", 1).unwrap();
        let made = none().or_random().unwrap();
        made.check("192.0.2.1", 1).unwrap();
        assert!(!format!("{made:?}").contains(made.text().unwrap()));
        assert!(Trust { is_insecure: true, ..none() }.or_random().unwrap().secret.is_none());
    }
}
