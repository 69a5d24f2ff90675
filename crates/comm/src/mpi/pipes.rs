//! A pipe of bytes to every other rank, made of MPI's messages: what a socket is between hosts.
//!
//! Bytes pass through memory of the pipes on both sides. So the library never holds an address of the caller's, whose
//! buffers may go at any time when a job fails, and a frame's head travels with its body. Messages of one pair of ranks
//! arrive in the order in which they were sent (MPI 5.0, section 3.5), and receives are looked at in the order in which
//! they were posted.

use super::{Mpi, Request};
use spec::Result;
use std::collections::VecDeque;
use std::ffi::c_int;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of one message at most: so many that few messages make a buffer, so few that copies stay in a core's cache.
const MESSAGE_BYTES: usize = 256 << 10;
/// Messages up to this size get small buffers.
const SMALL_BYTES: usize = 4 << 10;
/// Receives that are posted, for whoever sends.
const RECEIVES: usize = 16;
/// Messages of one pipe that are on their way.
const ON_THEIR_WAY: usize = 8;
/// Of all pipes, those with large buffers: bounds the memory for a job of many ranks.
const LARGE_MAX: usize = 64;
/// Tags of worlds, one for each: below are those of [`Mpi::agree`], and the standard promises 32767.
const TAGS: std::ops::Range<u32> = 16..32_000;

/// The pipes of one world.
pub(crate) struct Pipes {
    mpi: &'static Mpi,
    tag: c_int,
    receives: Mutex<VecDeque<Slot>>,
    sends: Mutex<Sends>,
}

struct Slot {
    request: Request,
    buffer: Box<[u8]>,
}

struct Sends {
    /// By the rank they go to.
    on_their_way: Vec<VecDeque<Slot>>,
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    large_made: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipes {
    /// Pipes for the next world of this process. Worlds are joined in the same order on all ranks, so that their tags agree.
    pub(crate) fn new(mpi: &'static Mpi) -> Result<Pipes> {
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        let tags = TAGS.end - TAGS.start;
        let tag = (TAGS.start + WORLDS.fetch_add(1, Ordering::SeqCst) % tags) as c_int;
        let on_their_way = (0..mpi.size()).map(|_| VecDeque::new()).collect();
        let sends = Mutex::new(Sends { on_their_way, small: Vec::new(), large: Vec::new(), large_made: 0 });
        let pipes = Pipes { mpi, tag, receives: Mutex::default(), sends };
        for _ in 0..RECEIVES {
            let slot = pipes.post(vec![0; MESSAGE_BYTES].into())?;
            lock(&pipes.receives).push_back(slot);
        }
        Ok(pipes)
    }

    fn post(&self, mut buffer: Box<[u8]>) -> Result<Slot> {
        // SAFETY: a slot keeps its buffer until its request has ended, and for ever if it does not.
        let request = unsafe { self.mpi.receive(buffer.as_mut_ptr(), buffer.len(), None, self.tag)? };
        Ok(Slot { request, buffer })
    }

    /// Gives `take` what has arrived, with the rank that sent it; whether that was anything. If another thread is at it,
    /// nothing is done.
    pub(crate) fn receive(&self, mut take: impl FnMut(usize, &[u8])) -> Result<bool> {
        let Ok(mut receives) = self.receives.try_lock() else { return Ok(false) };
        let mut any = false;
        // No more than were posted at the start, so that the caller gets its turn.
        for _ in 0..RECEIVES {
            let Some(oldest) = receives.front_mut() else { break };
            let Some((from, bytes)) = self.mpi.test(&mut oldest.request)? else { break };
            any = true;
            if let Some(slot) = receives.pop_front() {
                take(from, &slot.buffer[..bytes.min(slot.buffer.len())]);
                receives.push_back(self.post(slot.buffer)?);
            }
        }
        Ok(any)
    }

    /// Begins to send a message of the first bytes of `parts` to rank `to`; how many, none if too many are on their way.
    pub(crate) fn send(&self, to: usize, parts: &[IoSlice<'_>]) -> Result<usize> {
        let mut sends = lock(&self.sends);
        sends.reap(self.mpi, to)?;
        if sends.on_their_way[to].len() >= ON_THEIR_WAY {
            return Ok(0);
        }
        let bytes = parts.iter().map(|p| p.len()).sum::<usize>().min(MESSAGE_BYTES);
        let Some(mut buffer) = sends.buffer(self.mpi, bytes)? else { return Ok(0) };
        let mut at = 0;
        for part in parts {
            let n = part.len().min(bytes - at);
            buffer[at..at + n].copy_from_slice(&part[..n]);
            at += n;
        }
        // SAFETY: a slot keeps its buffer until its request has ended, and for ever if it does not.
        let request = unsafe { self.mpi.send(buffer.as_ptr(), bytes, to, self.tag)? };
        sends.on_their_way[to].push_back(Slot { request, buffer });
        Ok(bytes)
    }

    /// Whether all that was sent has gone.
    pub(crate) fn is_drained(&self) -> bool {
        let mut sends = lock(&self.sends);
        for to in 0..sends.on_their_way.len() {
            if sends.reap(self.mpi, to).is_err() {
                return true;
            }
        }
        sends.on_their_way.iter().all(VecDeque::is_empty)
    }
}

impl Sends {
    /// Takes back the buffers of messages that have gone.
    fn reap(&mut self, mpi: &Mpi, to: usize) -> Result<()> {
        while let Some(oldest) = self.on_their_way[to].front_mut() {
            if mpi.test(&mut oldest.request)?.is_none() {
                break;
            }
            if let Some(slot) = self.on_their_way[to].pop_front() {
                let free = if slot.buffer.len() > SMALL_BYTES { &mut self.large } else { &mut self.small };
                free.push(slot.buffer);
            }
        }
        Ok(())
    }

    /// A buffer for so many bytes; none if all large ones are in use. Small ones are as many as pipes allow.
    fn buffer(&mut self, mpi: &Mpi, bytes: usize) -> Result<Option<Box<[u8]>>> {
        if bytes <= SMALL_BYTES {
            return Ok(Some(self.small.pop().unwrap_or_else(|| vec![0; SMALL_BYTES].into())));
        }
        if self.large.is_empty() && self.large_made == LARGE_MAX {
            for to in 0..self.on_their_way.len() {
                self.reap(mpi, to)?;
            }
        }
        if self.large.is_empty() && self.large_made < LARGE_MAX {
            self.large_made += 1;
            self.large.push(vec![0; MESSAGE_BYTES].into());
        }
        Ok(self.large.pop())
    }
}

impl Drop for Pipes {
    /// Receives are given up. What the library does not give back stays where it is: it may still be written.
    fn drop(&mut self) {
        const MOMENT: Duration = Duration::from_secs(1);
        let until = Instant::now() + MOMENT;
        let receives = std::mem::take(self.receives.get_mut().unwrap_or_else(PoisonError::into_inner));
        for mut slot in receives {
            self.mpi.cancel(&mut slot.request);
            while matches!(self.mpi.test(&mut slot.request), Ok(None)) {
                if Instant::now() >= until {
                    std::mem::forget(slot.buffer);
                    break;
                }
                std::thread::yield_now();
            }
        }
        let sends = self.sends.get_mut().unwrap_or_else(PoisonError::into_inner);
        for slot in sends.on_their_way.drain(..).flatten() {
            std::mem::forget(slot.buffer);
        }
    }
}
