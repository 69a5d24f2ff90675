//! The store over real sockets: values, waits, races, and servers and clients that go away.

use comm::{StoreClient, StoreServer};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(50);

fn start() -> (StoreServer, StoreClient) {
    let server = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let client = StoreClient::connect(&server.addr().to_string(), LONG).unwrap();
    (server, client)
}

#[test]
fn values_numbers_and_lists() {
    let (_server, store) = start();
    assert_eq!(store.try_get("a").unwrap(), None);
    store.set("a", b"1").unwrap();
    store.set("a", b"").unwrap();
    assert_eq!(store.try_get("a").unwrap(), Some(vec![]));
    assert_eq!(store.add("n", 5).unwrap(), 5);
    assert_eq!(store.add("n", -7).unwrap(), -2);
    assert_eq!(store.get("n", SHORT).unwrap(), b"-2");
    store.set("dir/b", b"x").unwrap();
    store.set("dir/a", b"x").unwrap();
    store.set("dis", b"x").unwrap();
    assert_eq!(store.keys("dir/").unwrap(), ["dir/a", "dir/b"]);
    assert!(store.delete("dir/a").unwrap());
    assert!(!store.delete("dir/a").unwrap());
    let error = store.add("dis", 1).unwrap_err().to_string();
    assert!(error.contains("not a whole number"), "{error}");
    assert!(store.set(&"k".repeat(2000), b"").is_err());
}

#[test]
fn compare_set_lets_one_of_many_win() {
    let (_server, store) = start();
    let seen: Vec<Vec<u8>> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..8u8)
            .map(|i| {
                let store = store.clone();
                s.spawn(move || store.compare_set("leader", None, [i]).unwrap())
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(seen.iter().all(|v| *v == seen[0] && v.len() == 1));
    assert_eq!(store.compare_set("leader", Some(b"wrong"), b"x").unwrap(), seen[0]);
    assert_eq!(store.compare_set("leader", Some(&seen[0]), b"x").unwrap(), b"x");
    assert_eq!(store.compare_set("unset", Some(b"y"), b"x").unwrap(), b"");
}

#[test]
fn a_waiting_get_neither_blocks_others_nor_misses_the_value() {
    let (_server, store) = start();
    std::thread::scope(|s| {
        let waiting = s.spawn(|| store.get("late", LONG));
        let both = s.spawn(|| store.wait(&["late", "later"], LONG));
        for i in 1..=100 {
            assert_eq!(store.add("busy", 1).unwrap(), i);
        }
        store.set("late", b"here").unwrap();
        store.set("later", b"").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"here");
        both.join().unwrap().unwrap();
    });
}

#[test]
fn deadlines_name_what_is_missing() {
    let (_server, store) = start();
    store.set("there", b"").unwrap();
    let error = store.wait(&["there", "rank/3"], SHORT).unwrap_err().to_string();
    assert!(error.contains("rank/3") && !error.contains("there,"), "{error}");
    let error = store.get("nothing", SHORT).unwrap_err().to_string();
    assert!(error.contains("waited 0.1 s for key nothing"), "{error}");
}

#[test]
fn a_stopped_server_ends_waits_at_once() {
    let (server, store) = start();
    let (asked, asking) = std::sync::mpsc::channel();
    let (waiter, clone) = (store.clone(), store.clone());
    let waiting = std::thread::spawn(move || {
        asked.send(()).unwrap();
        let began = Instant::now();
        (waiter.get("never", LONG), began.elapsed())
    });
    asking.recv().unwrap();
    clone.set("x", b"").unwrap();
    drop(server);
    let (result, waited) = waiting.join().unwrap();
    assert!(result.is_err() && waited < LONG / 2);
    assert!(clone.set("x", b"").unwrap_err().to_string().contains("lost the store"));
}

#[test]
fn what_cannot_be_reached_is_named() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = StoreClient::connect(&free.to_string(), SHORT).unwrap_err();
    assert!(error.to_string().contains(&free.to_string()), "{error}");
    assert!(error.hint_text().is_some());
    assert!(StoreClient::connect("nowhere", SHORT).unwrap_err().to_string().contains("host:port"));

    let server = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let error = StoreServer::start(server.addr()).unwrap_err();
    assert!(error.to_string().contains(&server.addr().to_string()), "{error}");
}

#[test]
fn a_client_may_come_before_the_server() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let early = std::thread::spawn(move || StoreClient::connect(&free.to_string(), LONG));
    let _server = StoreServer::start(free).unwrap();
    early.join().unwrap().unwrap().set("k", b"v").unwrap();
}

#[test]
fn a_stranger_on_the_port_harms_nobody() {
    let (server, store) = start();
    let mut stranger = std::net::TcpStream::connect(server.addr()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    store.set("k", b"v").unwrap();

    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = other.local_addr().unwrap().to_string();
    let talk = std::thread::spawn(move || {
        let (mut s, _) = other.accept().unwrap();
        s.write_all(b"SSH-2.0-something\r\n").unwrap();
        let _ = s.read(&mut [0; 64]);
    });
    let error = StoreClient::connect(&addr, LONG).unwrap_err().to_string();
    assert!(error.contains("not a store"), "{error}");
    talk.join().unwrap();
}

#[test]
fn what_can_be_no_address_is_refused_at_once() {
    for (addr, part) in [("256.1.1.1:1", "256.1.1.1 is no IPv4 address"), ("head", "host:port")] {
        let error = StoreClient::connect(addr, LONG).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A server that waits for a whole request before it answers, as those of the web do.
#[test]
fn a_foreign_server_is_recognised_by_its_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            request.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let error = StoreClient::connect(&addr, LONG).unwrap_err();
    assert!(error.to_string().contains("what listens there is not a store"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert!(error.hint_text().is_some_and(|hint| hint.contains("port")), "{error}");
}

#[test]
fn a_port_that_is_taken_and_an_address_that_is_not_ours_are_told_apart() {
    let check = |bind: SocketAddr, hint: &str| {
        let e = StoreServer::start(bind).err().unwrap();
        assert!(format!("{e:?}").contains(hint), "{e:?}");
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    check(taken.local_addr().unwrap(), "another program has this port");
    // Kept for documentation (RFC 5737).
    check("192.0.2.1:0".parse().unwrap(), "must be one of this machine's");
}
