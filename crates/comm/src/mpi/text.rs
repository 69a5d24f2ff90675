//! A few words between ranks before they have a store: where it is.

use super::{Mpi, Request};
use spec::{Error, Result};
use std::ffi::c_int;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Longest text.
const TEXT_BYTES: usize = 16 << 10;
/// Tags of what is gathered and what is given out; those of worlds begin above them.
const GATHER: c_int = 1;
const GIVE: c_int = 2;
/// Between two looks; a start has time.
const LOOK: Duration = Duration::from_micros(200);

impl Mpi {
    /// Rank 0 makes one text of everybody's and gives it to all. Collective.
    ///
    /// # Errors
    /// A text is longer than 16 KiB, `make` fails (on rank 0; the others wait until their deadline), or ranks do not come within
    /// `timeout`.
    pub fn agree(
        &self,
        own: &str,
        timeout: Duration,
        make: impl FnOnce(&[String]) -> Result<String>,
    ) -> Result<String> {
        let until = Instant::now() + timeout;
        if self.rank() > 0 {
            self.send_text(own, 0, GATHER, until)?;
            return self.receive_text(0, GIVE, until);
        }
        let mut all = vec![own.to_owned()];
        for rank in 1..self.size() {
            all.push(self.receive_text(rank, GATHER, until)?);
        }
        let text = make(&all)?;
        for rank in 1..self.size() {
            self.send_text(&text, rank, GIVE, until)?;
        }
        Ok(text)
    }

    fn send_text(&self, text: &str, to: usize, tag: c_int, until: Instant) -> Result<()> {
        if text.len() > TEXT_BYTES {
            return Err(Error::failure(format!("{} bytes for rank {to}, at most {TEXT_BYTES}", text.len())));
        }
        // Kept if the message does not end: the library may still read it.
        let text: &'static [u8] = Vec::leak(text.as_bytes().to_vec());
        // SAFETY: the bytes stay for ever.
        let request = unsafe { self.send(text.as_ptr(), text.len(), to, tag)? };
        self.wait(request, until, || format!("rank {to} to take a message")).map(|_| ())
    }

    fn receive_text(&self, from: usize, tag: c_int, until: Instant) -> Result<String> {
        let mut buffer = std::mem::ManuallyDrop::new(vec![0u8; TEXT_BYTES]);
        // SAFETY: the bytes stay until the request has ended.
        let request = unsafe { self.receive(buffer.as_mut_ptr(), TEXT_BYTES, Some(from), tag)? };
        let bytes = self.wait(request, until, || format!("rank {from} to come"))?;
        let mut buffer = std::mem::ManuallyDrop::into_inner(buffer);
        buffer.truncate(bytes);
        String::from_utf8(buffer).map_err(|_| Error::failure(format!("rank {from} sent no text")))
    }

    fn wait(&self, mut request: Request, until: Instant, what: impl Fn() -> String) -> Result<usize> {
        loop {
            if let Some((_, bytes)) = self.test(&mut request)? {
                return Ok(bytes);
            }
            if Instant::now() >= until {
                return Err(Error::failure(format!("rank {} waited in vain for {}", self.rank(), what())));
            }
            std::thread::park_timeout(LOOK);
        }
    }
}

/// Last words, for people; nobody is left to tell when stderr is closed.
pub(super) fn say(words: &str) {
    if !words.is_empty() {
        let _ = writeln!(std::io::stderr(), "error: {words}");
    }
}

/// Waits until nobody has anything left to read of what this process has said, for `timeout` at most: launchers that are
/// told to end all ranks close their pipes on what is still in them.
pub(super) fn wait_until_read(timeout: Duration) {
    let _ = std::io::stdout().flush();
    let until = Instant::now() + timeout;
    // SAFETY: asks how many bytes a pipe or socket holds; other files know no answer, or have none to wait for.
    let unread = |fd| unsafe {
        let (mut bytes, mut is) = (0, std::mem::zeroed::<libc::stat>());
        libc::fstat(fd, &raw mut is) == 0
            && is.st_mode & libc::S_IFMT == libc::S_IFIFO
            && libc::ioctl(fd, libc::FIONREAD, &raw mut bytes) == 0
            && bytes > 0
    };
    while [libc::STDOUT_FILENO, libc::STDERR_FILENO].into_iter().any(unread) && Instant::now() < until {
        std::thread::park_timeout(LOOK);
    }
}
