//! What somebody without the job's secret may try, from the store's port to the middle of a connection between two ranks:
//! each ends in an error that names the peer, or is not noticed by the job at all.

mod common;

use comm::{Bootstrap, OpTag, Order, Secret, StoreClient, StoreServer, TransportChoice, World, store};
use common::TIMEOUT;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

const HELLO: &[u8] = b"PHXSTO03\r\n\r\n";

/// A job's store and its secret.
fn serve() -> (StoreServer, StoreClient, Secret) {
    let secret = Secret::random("this job's").unwrap();
    let server = StoreServer::start_with(SocketAddr::from(([127, 0, 0, 1], 0)), &secret).unwrap();
    let client = StoreClient::connect_with(&server.addr().to_string(), &secret, TIMEOUT).unwrap();
    (server, client, secret)
}

/// Rank `rank` of two, and what it says after three sums.
fn rank(rank: usize, store: StoreClient, session: &str, transport: TransportChoice) -> Result<(), String> {
    let mut b = Bootstrap::new(rank, 2, store, session);
    (b.timeout, b.transport) = (TIMEOUT, transport);
    let world = World::connect(&b).map_err(|e| e.to_string())?;
    for _ in 0..3 {
        let count = 3000;
        let mut x = common::values(rank, count);
        world.all().all_reduce(OpTag(1), &mut x, Order::Tree).map_err(|e| e.to_string())?;
        assert_eq!(x, common::summed(&[0, 1], count), "a sum that was tampered with came through");
    }
    Ok(())
}

/// Starts rank 0, lets `attack` at its card, starts rank 1; what both say.
fn under_attack(
    transport: TransportChoice,
    session: &str,
    attack: impl FnOnce(&StoreClient, Vec<String>),
) -> [Result<(), String>; 2] {
    let (_server, store, _) = serve();
    std::thread::scope(|s| {
        let (first, second) = (store.clone(), store.clone());
        let first = s.spawn(move || rank(0, first, session, transport));
        let card = store.get(&format!("{session}/rank/0"), TIMEOUT).unwrap();
        attack(&store, String::from_utf8(card).unwrap().lines().map(str::to_owned).collect());
        let second = rank(1, second, session, transport);
        [first.join().unwrap(), second]
    })
}

#[test]
fn without_the_secret_nothing_of_the_store_is_read_or_changed() {
    let (server, store, _) = serve();
    let addr = server.addr().to_string();
    store.set("s/rank/0", b"a card").unwrap();
    let check = |secret: &Secret, ours: &str| {
        let error = StoreClient::connect_with(&addr, secret, TIMEOUT).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains(&format!("the store at {addr}: its secret is not ours: it has the secret ")),
            "{said}"
        );
        assert!(said.contains(&format!("this process (pid {}) has {ours}", std::process::id())), "{said}");
        assert_eq!(error.exit_code(), 2);
        assert!(error.hint_text().is_some_and(|h| h.contains("PHALANX_SECRET_FILE")), "{error:?}");
    };
    check(&Secret::none(), "none");
    let guess = Secret::parse("a guess that is long enough to be one", "guess.txt").unwrap();
    check(&guess, "");
    // One that knows the protocol and sends its request all the same: reads a card, ends the job, claims a rank.
    let get = b"\x02\x08\0\0\0s/rank/0\0\0\0\0\0\0\0\0";
    let end = b"\x04\x09\0\0\0s/gave-up\0\0\0\0\0\x03\0\0\0bye";
    let claim = b"\x01\x08\0\0\0s/rank/1\x02\0\0\0me";
    for request in [&get[..], end, claim] {
        let mut stream = TcpStream::connect(&addr).unwrap();
        stream.write_all(HELLO).unwrap();
        let frame = [&(request.len() as u32).to_le_bytes()[..], request].concat();
        // As much as a proof takes, and more.
        let _ = stream.write_all(&frame.repeat(4)).and_then(|()| stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() <= HELLO.len() + 37, "{} bytes: {answer:?}", answer.len());
        assert!(!answer.windows(6).any(|w| w == b"a card"));
    }
    assert_eq!(store.keys("").unwrap(), ["s/rank/0"]);
    // Whoever holds no secret is refused by no store that has none either, and the other way round.
    let open = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let error = StoreClient::connect_with(&open.addr().to_string(), &guess, TIMEOUT).unwrap_err().to_string();
    assert!(error.contains("it has no secret, this process") && error.contains("(guess.txt)"), "{error}");
}

#[test]
fn a_store_that_only_says_it_is_the_jobs_is_found_out() {
    let (server, _, secret) = serve();
    // In the middle, with the true store's id and a challenge of its own.
    let mut real = TcpStream::connect(server.addr()).unwrap();
    real.write_all(HELLO).unwrap();
    let mut greeting = [0; 12 + 1 + 4 + 32];
    real.read_exact(&mut greeting).unwrap();
    let fake = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = fake.local_addr().unwrap().to_string();
    let talk = std::thread::spawn(move || {
        let (mut stream, _) = fake.accept().unwrap();
        stream.write_all(&greeting).unwrap();
        let mut shown = [0; 12 + 4 + 32 + 32];
        stream.read_exact(&mut shown).unwrap();
        // Turned around: the client's own proof.
        stream.write_all(&shown[shown.len() - 32..]).unwrap();
        let _ = stream.read(&mut [0; 64]);
    });
    let error = StoreClient::connect_with(&addr, &secret, TIMEOUT).unwrap_err().to_string();
    assert!(error.contains("it does not hold the job's secret"), "{error}");
    talk.join().unwrap();
}

#[test]
fn the_store_holds_so_much_and_says_so() {
    let (_server, store, _) = serve();
    let large = vec![7; 15 << 20];
    let refused: Vec<String> = (0..40)
        .filter_map(|i| store.set(&format!("large/{i}"), &large).err())
        .map(|e| e.to_string())
        .collect();
    assert_eq!(refused.len(), 40 - store::MAX_STORE_BYTES / large.len());
    assert!(refused.iter().all(|said| said.contains("more are over its most, 67108864")), "{}", refused[0]);
    // What is small goes on, and what is taken away makes room.
    store.set("small", b"1").unwrap();
    assert!(store.set("large/39", &large).is_err());
    assert!(store.delete("large/0").unwrap());
    store.set("large/39", &large).unwrap();
    store.set("large/39", &large).unwrap();
}

/// What people and their programs say to any port: nothing, a request of the web, a greeting of another protocol, noise.
fn strangers(n: usize) -> impl Iterator<Item = Vec<u8>> {
    let said: [&[u8]; 5] =
        [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-scan\r\n", &[0xff; 300], HELLO];
    said.into_iter().cycle().map(<[u8]>::to_vec).take(n)
}

#[test]
fn hundreds_of_strangers_at_the_store_keep_nobody_waiting() {
    let (server, store, secret) = serve();
    let mut held = Vec::new();
    for said in strangers(300) {
        let mut stream = TcpStream::connect(server.addr()).unwrap();
        let _ = stream.write_all(&said);
        held.push(stream);
        store.add("busy", 1).unwrap();
    }
    StoreClient::connect_with(&server.addr().to_string(), &secret, TIMEOUT).unwrap().set("k", b"v").unwrap();
}

#[test]
fn hundreds_of_strangers_at_a_ranks_doors_keep_nobody_waiting() {
    for transport in [TransportChoice::Tcp, TransportChoice::Shm] {
        let (enough, go) = std::sync::mpsc::channel();
        let said = under_attack(transport, "besieged", |_, card| {
            // A hundred are there before anybody else, as many as wait at a door that is not open yet. The others come
            // while the ranks meet.
            std::thread::spawn(move || {
                let mut held: (Vec<TcpStream>, Vec<UnixStream>) = Default::default();
                for (n, said) in strangers(300).enumerate() {
                    let Ok(mut far) = TcpStream::connect(&card[4]) else { break };
                    let near = UnixAddr::from_abstract_name(&card[3]).unwrap();
                    let Ok(mut near) = UnixStream::connect_addr(&near) else { break };
                    let _ = (far.write_all(&said), near.write_all(&said));
                    held.0.push(far);
                    held.1.push(near);
                    if n == 100 {
                        enough.send(()).unwrap();
                    }
                }
            });
            go.recv().unwrap();
        });
        assert_eq!(said, [Ok(()), Ok(())], "{transport:?}");
    }
}

#[test]
fn a_rank_cannot_be_claimed_at_the_door() {
    let mut claim = None;
    let said = under_attack(TransportChoice::Tcp, "claimed", |_, card| {
        // As rank 1 would call rank 0, and before it.
        let mut stream = TcpStream::connect(&card[4]).unwrap();
        let call = [&b"PHXCOM\0\x02"[..], &1u32.to_le_bytes(), &0u32.to_le_bytes(), &[9; 32]].concat();
        stream.write_all(&call).unwrap();
        claim = Some(std::thread::spawn(move || {
            let mut answer = [0; 72];
            stream.read_exact(&mut answer).unwrap();
            // The door's own proof, turned around.
            let _ = stream.write_all(&answer[40..]);
            stream.read(&mut [0; 8]).unwrap_or(0)
        }));
    });
    assert_eq!(said, [Ok(()), Ok(())]);
    assert_eq!(claim.unwrap().join().unwrap(), 0, "the door welcomes whoever repeats its proof");
}

/// What is done to the frames of rank 1 on their way to rank 0: given one, what goes on, and what goes back.
type Tamper = fn(usize, Vec<u8>, &mut Vec<Vec<u8>>) -> (Vec<Vec<u8>>, Vec<Vec<u8>>);

const HEAD_BYTES: usize = 80;
const TAG_BYTES: usize = 16;

/// Stands between two ranks: reads frames, which are not secret, and sends on what `tamper` makes of messages.
fn stand_between(target: String, tamper: Tamper) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (caller, _) = listener.accept().unwrap();
        let door = TcpStream::connect(target).unwrap();
        let (mut back_from, mut back_to) = (door.try_clone().unwrap(), caller.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let _ = pass(&caller, &door, tamper);
        let _ = (caller.shutdown(Shutdown::Both), door.shutdown(Shutdown::Both));
    });
    addr
}

fn pass(mut caller: &TcpStream, mut door: &TcpStream, tamper: Tamper) -> std::io::Result<()> {
    // The call and the proof.
    let mut hello = [0; 48 + 32];
    caller.read_exact(&mut hello[..48])?;
    door.write_all(&hello[..48])?;
    caller.read_exact(&mut hello[48..])?;
    door.write_all(&hello[48..])?;
    let (mut messages, mut kept) = (0, Vec::new());
    loop {
        let mut frame = vec![0; HEAD_BYTES + TAG_BYTES];
        caller.read_exact(&mut frame)?;
        let word = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap());
        let (kind, bytes) = (word(0), word(8) as usize);
        if bytes > 0 {
            let at = frame.len();
            frame.resize(at + bytes + TAG_BYTES, 0);
            caller.read_exact(&mut frame[at..])?;
        }
        let (on, back) = if kind == 1 {
            messages += 1;
            tamper(messages, frame, &mut kept)
        } else {
            let mut on = vec![frame];
            on.append(&mut kept);
            (on, Vec::new())
        };
        on.iter().try_for_each(|frame| door.write_all(frame))?;
        back.iter().try_for_each(|frame| caller.write_all(frame))?;
    }
}

#[track_caller]
fn check_tampered(name: &str, tamper: Tamper) {
    let said = under_attack(TransportChoice::Tcp, name, |store, mut card| {
        card[4] = stand_between(card[4].clone(), tamper).to_string();
        store.set(&format!("{name}/rank/0"), card.join("\n")).unwrap();
    });
    let said = said.map(|s| s.expect_err("what was tampered with was not noticed"));
    let named = |s: &String| {
        s.contains(&format!("(pid {} on ", std::process::id()))
            && s.contains("does not carry the job's seal")
            && (s.contains("rank 0 (") || s.contains("rank 1 ("))
    };
    assert!(said.iter().any(named), "{name}: {said:?}");
}

#[test]
fn who_stands_between_two_ranks_changes_nothing_unnoticed() {
    check_tampered("sign", |_, mut frame, _| {
        // Negates the last float.
        let at = frame.len() - TAG_BYTES - 1;
        frame[at] ^= 0x80;
        (vec![frame], vec![])
    });
    check_tampered("late", |n, mut frame, _| {
        let at = HEAD_BYTES + TAG_BYTES + 3;
        frame[at] ^= if n == 3 { 0x80 } else { 0 };
        (vec![frame], vec![])
    });
    check_tampered("head", |_, mut frame, _| {
        frame[40] ^= 1;
        (vec![frame], vec![])
    });
    check_tampered("length", |_, mut frame, _| {
        frame[8..16].copy_from_slice(&(4u64 << 30).to_le_bytes());
        (vec![frame[..HEAD_BYTES + TAG_BYTES].to_vec()], vec![])
    });
    check_tampered("again", |_, frame, _| (vec![frame.clone(), frame], vec![]));
    check_tampered("left-out", |n, frame, _| (if n == 1 { vec![] } else { vec![frame] }, vec![]));
    check_tampered("order", |n, frame, kept| {
        if n == 1 {
            kept.push(frame);
            return (vec![], vec![]);
        }
        (vec![frame], vec![])
    });
    check_tampered("turned-around", |_, frame, _| (vec![], vec![frame]));
    check_tampered("forged", |_, frame, _| {
        let text = b"rank 1 gave up: so says somebody";
        let mut forged = vec![0; HEAD_BYTES + TAG_BYTES];
        forged[..8].copy_from_slice(&4u64.to_le_bytes());
        forged[8..16].copy_from_slice(&(text.len() as u64).to_le_bytes());
        forged.extend_from_slice(text);
        forged.extend_from_slice(&[0; TAG_BYTES]);
        (vec![forged, frame], vec![])
    });
}

/// No test of its own: serves a store under a limit, if this process is one that [`limited`] started.
#[test]
fn served() {
    if std::env::var_os("COMM_SERVED").is_none() {
        return;
    }
    let server = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    println!("\naddr {}", server.addr());
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}

/// How many clients a store serves at once under `ulimit -n` (soft, hard), and what the one after them hears.
fn limited(soft: usize, hard: usize, most: usize) -> (usize, Option<String>) {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -n {hard} && ulimit -Sn {soft} && exec \"$@\"")).arg("sh");
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "served", "--nocapture"]);
    command.env("COMM_SERVED", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let addr = loop {
        let mut line = String::new();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0);
        if let Some(addr) = line.trim().strip_prefix("addr ") {
            break addr.to_owned();
        }
    };
    let mut clients = Vec::new();
    let refused = loop {
        match StoreClient::connect(&addr, TIMEOUT) {
            Ok(client) => clients.push(client),
            Err(e) => break Some(format!("{e}; {}", e.hint_text().unwrap_or_default())),
        }
        if clients.len() == most {
            break None;
        }
    };
    let served = clients.len();
    clients.iter().for_each(|client| client.set("k", b"v").unwrap());
    drop((child.stdin.take(), clients));
    child.wait().unwrap();
    (served, refused)
}

#[test]
fn a_store_raises_its_limit_and_names_it_where_it_ends() {
    let (served, refused) = limited(24, 200, 100);
    assert_eq!((served, refused), (100, None), "the soft limit is no limit");
    let (served, refused) = limited(24, 40, 100);
    let said = refused.expect("more clients than the limit lets in");
    assert!(served > 20, "{served}");
    assert!(said.contains("the store cannot take one more connection: process "), "{said}");
    assert!(said.contains("its limit (ulimit -n) is 40") && said.contains("raise the limit"), "{said}");
}

#[test]
fn a_door_is_closed_once_all_have_met() {
    let mut door = String::new();
    let said = under_attack(TransportChoice::Tcp, "closed", |_, card| door = card[4].clone());
    assert_eq!(said, [Ok(()), Ok(())]);
    let error = TcpStream::connect_timeout(&door.parse().unwrap(), Duration::from_secs(5)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}
