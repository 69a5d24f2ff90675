//! The socket between an agent and a worker: reports come up, orders go down, a line of JSON each (`elastic::Report`).

use elastic::{Orders, Report};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use spec::{Error, Result};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// No report is longer. What a worker says is not believed: a line without an end takes no more memory than this.
const LONGEST_LINE: usize = 64 << 10;
/// Bytes taken from one worker at a time, so that one that talks without end does not keep the agent from the others.
const TURN: usize = 256 << 10;

/// The agent's end.
pub(crate) struct Link {
    stream: UnixStream,
    rest: Vec<u8>,
    /// It has said something that is no report: what it says is read, so that it is not held up, and forgotten.
    deaf: bool,
}

/// The worker's end, as long as the worker has not been started.
pub(crate) struct WorkersEnd(UnixStream);

impl WorkersEnd {
    pub(crate) fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Link {
    pub(crate) fn pair() -> Result<(Link, WorkersEnd)> {
        let make = || -> std::io::Result<_> {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((Link { stream: ours, rest: Vec::new(), deaf: false }, WorkersEnd(theirs)))
        };
        make().map_err(|e| comm::os_error("make the socket between agent and worker", &e))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What came since the last look, and whether more can come.
    ///
    /// # Errors
    /// The worker says something that is no report; it is not listened to again.
    pub(crate) fn reports(&mut self) -> Result<(Vec<Report>, bool)> {
        let mut block = [0; 4096];
        let mut taken = 0;
        let mut open = true;
        while taken < TURN {
            match self.stream.read(&mut block) {
                Ok(0) => {
                    open = false;
                    break;
                }
                Ok(n) => {
                    self.rest.extend_from_slice(&block[..n]);
                    taken += n;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // A process that has died with orders unread resets the connection.
                Err(_) => {
                    open = false;
                    break;
                }
            }
        }
        let result = if self.deaf { Ok(Vec::new()) } else { self.lines() };
        if result.is_err() || self.deaf {
            (self.deaf, self.rest) = (true, Vec::new());
        }
        result.map(|reports| (reports, open))
    }

    /// The reports in what was read, but for an unfinished last one.
    fn lines(&mut self) -> Result<Vec<Report>> {
        let end = self.rest.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if self.rest.len() - end > LONGEST_LINE {
            return Err(Error::failure(format!("a line of more than {LONGEST_LINE} bytes")));
        }
        let whole: Vec<u8> = self.rest.drain(..end).collect();
        let text = String::from_utf8_lossy(&whole);
        text.lines().map(Report::read).collect()
    }

    /// No orders come any more: who waits for some as a spare is free to end.
    pub(crate) fn hang_up(&self) {
        // A worker that has closed its end knows.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }

    /// Sends orders; they fit into the socket's buffer unless the worker has left many unread.
    pub(crate) fn order(&self, orders: &Orders) -> std::io::Result<()> {
        (&self.stream).write_all(orders.line().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes up to the end of the stream; `None` if it is refused.
    fn check(sent: &[u8], expected: Option<&[Report]>) {
        let (mut link, end) = Link::pair().unwrap();
        let (mut theirs, sent) = (end.0, sent.to_vec());
        // What does not fit into the socket is sent while we read.
        let sender = std::thread::spawn(move || drop(theirs.write_all(&sent)));
        let mut found = Some(Vec::new());
        while let Some(reports) = &mut found {
            match link.reports() {
                Ok((more, open)) => {
                    reports.extend(more);
                    if !open {
                        break;
                    }
                }
                Err(_) => found = None,
            }
        }
        drop(link);
        sender.join().unwrap();
        assert_eq!(found.as_deref(), expected);
    }

    #[test]
    fn reports_come_whole_and_nothing_else_is_believed() {
        let (can, step) = (Report::CanRecover, Report::Step { step: 3 });
        let line = [can.line(), step.line()].concat();
        check(line.as_bytes(), Some(&[can.clone(), step.clone()]));
        check((line + "{\"step\":").as_bytes(), Some(&[can, step]));
        check(b"hello\n", None);
        check(&vec![b'x'; LONGEST_LINE + 8192], None);
        check(b"", Some(&[]));
    }
}
