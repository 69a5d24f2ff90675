//! How an agent's death is known at once: each holds a door open, its neighbours hold a connection to it, and the kernel
//! closes both however the process ends.
//!
//! Nothing is said over these connections. A connection that breaks proves nothing; that the door is shut as well, where
//! it was open before, does.
//!
//! Nobody is asked who he is, because nothing can be had or done here: what a visitor says is not read but ends the visit,
//! and strangers who take the place of neighbours make them knock once more.

use crate::net::ip_of;
use elastic::rendezvous::{Agreed, NodeId};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// A neighbour answers within this, or is asked again later: the thread has other things to do.
const ASK_TIMEOUT: Duration = Duration::from_millis(200);
/// Between two attempts to reach a neighbour that does not answer.
const ASK_PAUSE: Duration = Duration::from_secs(2);
/// Visitors that are held: neighbours come and go, and each has two.
const MOST_VISITORS: usize = 64;

/// This agent's door, and its connections to those of others.
pub(crate) struct Doors {
    door: Option<TcpListener>,
    visitors: Vec<TcpStream>,
    visits: BTreeMap<NodeId, Visit>,
}

enum Visit {
    Held(TcpStream, SocketAddr),
    /// It has not answered; not asked again before.
    Waits(Instant),
}

impl Doors {
    /// Opens a door at `ip`, which other nodes reach this one by. Without one the others wait for signs of life.
    pub(crate) fn open(ip: Option<IpAddr>) -> Doors {
        let door = ip.and_then(|ip| TcpListener::bind((ip, 0)).ok());
        let door = door.filter(|d| d.set_nonblocking(true).is_ok());
        Doors { door, visitors: Vec::new(), visits: BTreeMap::new() }
    }

    /// The door's port; 0 if there is none.
    pub(crate) fn port(&self) -> u16 {
        self.door.as_ref().and_then(|d| d.local_addr().ok()).map_or(0, |a| a.port())
    }

    /// Lets visitors in, and names the nodes of `watched` whose agents have died.
    pub(crate) fn look(&mut self, shared: &Agreed, watched: &[NodeId]) -> Vec<NodeId> {
        self.let_in();
        self.visits.retain(|id, _| watched.contains(id));
        let mut dead = Vec::new();
        for id in watched {
            let member = shared.members.iter().chain(&shared.waiting).find(|m| m.id == *id);
            // Between rounds a node is known by its id alone.
            let door = member.and_then(|m| address(&m.id.addr, m.door));
            let now = Instant::now();
            let visit = match (self.visits.remove(id), door) {
                (Some(Visit::Held(stream, door)), _) if is_closed(&stream) => {
                    Some(match TcpStream::connect_timeout(&door, ASK_TIMEOUT) {
                        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                            dead.push(id.clone());
                            // Asked again at the next look, should the news be lost.
                            Visit::Held(stream, door)
                        }
                        again => held(again, door, now),
                    })
                }
                (Some(Visit::Waits(until)), _) if now < until => Some(Visit::Waits(until)),
                (Some(Visit::Held(stream, door)), _) => Some(Visit::Held(stream, door)),
                (_, Some(door)) => Some(held(TcpStream::connect_timeout(&door, ASK_TIMEOUT), door, now)),
                (_, None) => None,
            };
            self.visits.extend(visit.map(|v| (id.clone(), v)));
        }
        dead
    }

    fn let_in(&mut self) {
        let Some(door) = &self.door else { return };
        // No more at a time than are kept: whoever knocks without end must hold up nothing, and use up no files.
        let knocking = (0..MOST_VISITORS).map_while(|_| door.accept().ok());
        for (visitor, _) in knocking {
            if visitor.set_nonblocking(true).is_ok() {
                self.visitors.push(visitor);
            }
        }
        self.visitors.retain(|v| !is_closed(v));
        let excess = self.visitors.len().saturating_sub(MOST_VISITORS);
        self.visitors.drain(..excess);
    }
}

fn held(asked: std::io::Result<TcpStream>, door: SocketAddr, now: Instant) -> Visit {
    match asked.and_then(|stream| stream.set_nonblocking(true).map(|()| stream)) {
        Ok(stream) => Visit::Held(stream, door),
        Err(_) => Visit::Waits(now + ASK_PAUSE),
    }
}

fn address(addr: &str, port: u16) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip_of(addr)?, port)).filter(|_| port != 0)
}

/// Nobody says anything here, so what can be read is the end.
fn is_closed(stream: &TcpStream) -> bool {
    let mut byte = [0];
    !matches!(stream.peek(&mut byte), Err(e) if e.kind() == ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use elastic::rendezvous::Member;

    #[test]
    fn an_agent_that_dies_is_known_by_its_door_and_one_that_hangs_up_is_not() {
        let here = || Some(IpAddr::from([127, 0, 0, 1]));
        let mut theirs = Doors::open(here());
        let id = NodeId { node_rank: 0, addr: "127.0.0.1".into(), pid: 1, serial: 0 };
        let member = Member {
            id: id.clone(),
            host: "a".into(),
            nproc: 1,
            role: String::new(),
            master_port: 1,
            door: theirs.port(),
            standby: 0,
        };
        let shared = Agreed { members: vec![member], ..Agreed::default() };
        let watched = [id.clone()];
        let mut ours = Doors::open(here());
        let mut look = |theirs: Option<&mut Doors>| {
            theirs.into_iter().for_each(Doors::let_in);
            ours.look(&shared, &watched)
        };
        assert_eq!(look(None), []);
        assert_eq!(look(Some(&mut theirs)), []);
        // A connection lost on the way: the door is still open.
        theirs.visitors.clear();
        assert_eq!(look(Some(&mut theirs)), []);
        assert_eq!(look(Some(&mut theirs)), []);
        drop(theirs);
        assert_eq!(look(None).as_slice(), std::slice::from_ref(&id));
        assert_eq!(look(None), [id]);
        // Never seen open: a wall may stand before it.
        let mut others = Doors::open(here());
        assert_eq!(others.look(&shared, &watched), []);
    }

    #[test]
    fn strangers_take_little_and_nobody_for_dead() {
        let here = || Some(IpAddr::from([127, 0, 0, 1]));
        let mut theirs = Doors::open(here());
        let id = NodeId { node_rank: 0, addr: "127.0.0.1".into(), pid: 1, serial: 0 };
        let door = address("127.0.0.1", theirs.port()).unwrap();
        let mut ours = Doors::open(here());
        ours.visits.insert(id.clone(), held(TcpStream::connect(door), door, Instant::now()));
        theirs.let_in();
        let mut strangers = Vec::new();
        for _ in 0..MOST_VISITORS + MOST_VISITORS / 2 {
            strangers.push(TcpStream::connect(door).unwrap());
        }
        theirs.let_in();
        assert_eq!(theirs.visitors.len(), MOST_VISITORS, "no more at a time than are kept");
        theirs.let_in();
        assert_eq!(theirs.visitors.len(), MOST_VISITORS);
        // The neighbour was the oldest, and finds the door open when it looks.
        let Some(Visit::Held(stream, _)) = ours.visits.get(&id) else { panic!("no connection") };
        stream.set_nonblocking(false).unwrap();
        assert!(matches!(stream.peek(&mut [0]), Ok(0) | Err(_)), "it was sent away");
        stream.set_nonblocking(true).unwrap();
        assert_eq!(ours.look(&Agreed::default(), std::slice::from_ref(&id)), []);
        // What is said is not read, and ends the visit.
        for stranger in &mut strangers {
            let _ = std::io::Write::write_all(stranger, b"GET / HTTP/1.1");
        }
        while theirs.visitors.len() > 1 {
            theirs.let_in();
        }
        assert_eq!(ours.look(&Agreed::default(), &[id]), []);
    }
}
