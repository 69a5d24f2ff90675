//! The links between ranks that talk over TCP: all go through a proxy in this process, which can cut, silence and slow them.

use std::io::{Read, Result, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What a slow link adds to each piece that goes through it.
const DELAY: Duration = Duration::from_millis(20);
/// So much goes through a link at once.
const PIECE_BYTES: usize = 64 << 10;

/// How a link is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// What comes goes.
    #[default]
    Open,
    /// What comes goes a little later.
    Slow,
    /// What comes stays here, and nobody is told.
    Silent,
    /// Both ends are told that it is gone.
    Cut,
}

/// A SOCKS proxy of this process (RFC 1928), and the links that go through it.
pub(crate) struct Links {
    shared: Arc<Shared>,
    pub(crate) addr: SocketAddr,
}

#[derive(Default)]
struct Shared {
    links: Mutex<Vec<Link>>,
    changed: Condvar,
}

struct Link {
    number: usize,
    state: State,
    ends: [TcpStream; 2],
}

impl Links {
    /// Opens the proxy on a port of the loopback address.
    pub(crate) fn open() -> Result<Links> {
        let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = door.local_addr()?;
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        // It ends with the process: who comes is served, at whatever time.
        thread::Builder::new().name("links".to_owned()).spawn(move || {
            for (number, caller) in door.incoming().flatten().enumerate() {
                let shared = for_thread.clone();
                // A caller that is none, or goes, has lost nothing but its call.
                let _ = thread::Builder::new().spawn(move || shared.carry(number, &caller));
            }
        })?;
        Ok(Links { shared, addr })
    }

    /// Makes the link that `choice` picks, of those there are, be in `state`; false if there are none.
    pub(crate) fn set(&self, choice: u64, state: State) -> bool {
        let mut links = self.shared.links();
        if links.is_empty() {
            return false;
        }
        let at = (choice % links.len() as u64) as usize;
        links[at].state = state;
        if state == State::Cut {
            links[at].shut();
        }
        self.shared.changed.notify_all();
        true
    }

    /// All links are as they were.
    pub(crate) fn mend(&self) {
        self.shared.links().iter_mut().for_each(|link| link.state = State::Open);
        self.shared.changed.notify_all();
    }
}

impl Link {
    fn shut(&self) {
        // What is closed already need not be.
        self.ends.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
    }
}

impl Shared {
    fn links(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries what a caller and the one that it asks for say to each other, until one hangs up.
    fn carry(self: Arc<Shared>, number: usize, caller: &TcpStream) -> Result<()> {
        let called = answer(caller)?;
        let ends = [caller.try_clone()?, called.try_clone()?];
        self.links().push(Link { number, state: State::Open, ends });
        let back = (self.clone(), called.try_clone()?, caller.try_clone()?);
        let other = thread::Builder::new().spawn(move || back.0.pump(number, &back.1, &back.2))?;
        self.pump(number, caller, &called);
        let _ = other.join();
        self.links().retain(|link| link.number != number);
        Ok(())
    }

    fn pump(&self, number: usize, mut from: &TcpStream, mut to: &TcpStream) {
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(n @ 1..) = from.read(&mut piece) {
            match self.state(number) {
                State::Slow => thread::sleep(DELAY),
                State::Cut => break,
                State::Open | State::Silent => {}
            }
            if to.write_all(&piece[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
        // Whoever is still spoken to by the other side hears to the end.
        if self.state(number) == State::Cut {
            let _ = from.shutdown(Shutdown::Both);
        }
    }

    /// How the link is, once it is not silent: it may be mended.
    fn state(&self, number: usize) -> State {
        let mut links = self.links();
        loop {
            let state = links.iter().find(|link| link.number == number).map_or(State::Cut, |l| l.state);
            if state != State::Silent {
                return state;
            }
            links = self.changed.wait(links).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Hears where the caller wants to go, and connects.
fn answer(mut caller: &TcpStream) -> Result<TcpStream> {
    caller.set_nodelay(true)?;
    caller.read_exact(&mut [0; 3])?;
    caller.write_all(&[5, 0])?;
    let mut request = [0; 10];
    caller.read_exact(&mut request)?;
    let [_, _, _, _, a, b, c, d, high, low] = request;
    let to = SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]));
    let called = TcpStream::connect(to)?;
    called.set_nodelay(true)?;
    caller.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    Ok(called)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ends of a link through the proxy.
    fn link(links: &Links) -> (TcpStream, TcpStream) {
        let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut near = TcpStream::connect(links.addr).unwrap();
        near.write_all(&[5, 1, 0]).unwrap();
        let port = door.local_addr().unwrap().port().to_be_bytes();
        near.read_exact(&mut [0; 2]).unwrap();
        near.write_all(&[5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]]).unwrap();
        near.read_exact(&mut [0; 10]).unwrap();
        (near, door.accept().unwrap().0)
    }

    #[test]
    fn a_link_carries_waits_and_ends() {
        let links = Links::open().unwrap();
        assert!(!links.set(3, State::Cut), "nobody is there");
        let (mut near, mut far) = link(&links);
        let mut hear = [0; 4];
        near.write_all(b"some").unwrap();
        far.read_exact(&mut hear).unwrap();
        assert_eq!(&hear, b"some");
        assert!(links.set(7, State::Slow));
        far.write_all(b"more").unwrap();
        near.read_exact(&mut hear).unwrap();
        assert_eq!(&hear, b"more");

        assert!(links.set(0, State::Silent));
        near.write_all(b"late").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(far.read(&mut hear).is_err(), "nothing passes");
        far.set_read_timeout(None).unwrap();
        links.mend();
        far.read_exact(&mut hear).unwrap();
        assert_eq!(&hear, b"late");

        assert!(links.set(0, State::Cut));
        assert!(matches!(near.read(&mut hear), Ok(0) | Err(_)));
        assert!(matches!(far.read(&mut hear), Ok(0) | Err(_)));
    }
}
