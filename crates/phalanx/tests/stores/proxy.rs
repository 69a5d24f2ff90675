//! A proxy before an S3 server that makes trouble.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};

use super::server::Server;

/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What is done to requests whose first line holds a text.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    None,
    /// So many are answered with this status and body.
    Answer {
        text: String,
        status: &'static str,
        times: usize,
    },
    /// They are never answered; that one came is told.
    Silence {
        text: String,
    },
}

/// Stands before the server.
pub(crate) struct Proxy {
    pub(crate) address: String,
    trouble: Arc<Mutex<Trouble>>,
    met: mpsc::Receiver<()>,
}

impl Proxy {
    pub(crate) fn before(server: &Server) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let trouble = Arc::new(Mutex::new(Trouble::None));
        let (tell, met) = mpsc::channel();
        let (upstream, shared) = (server.address.clone(), Arc::clone(&trouble));
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (upstream, trouble, tell) = (upstream.clone(), Arc::clone(&shared), tell.clone());
                std::thread::spawn(move || serve(client, &upstream, &trouble, &tell));
            }
        });
        Proxy { address, trouble, met }
    }

    pub(crate) fn set(&self, trouble: Trouble) {
        *self.trouble.lock().expect("a lock") = trouble;
    }

    /// Waits until a request has met the trouble.
    pub(crate) fn wait(&self) {
        self.met.recv().expect("the proxy runs");
    }
}

/// One request of a connection; the connection is closed after it.
fn serve(
    mut client: TcpStream,
    upstream: &str,
    trouble: &Mutex<Trouble>,
    tell: &mpsc::Sender<()>,
) -> Option<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
        client.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let (line, fields) = head.split_once("\r\n")?;
    let length =
        fields.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    client.read_exact(&mut body).ok()?;
    let mut now = trouble.lock().expect("a lock");
    match &mut *now {
        Trouble::Answer { text, status, times } if line.contains(text.as_str()) && *times > 0 => {
            *times -= 1;
            let _ = tell.send(());
            write!(client, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok()
        }
        Trouble::Silence { text } if line.contains(text.as_str()) => {
            let _ = tell.send(());
            drop(now);
            // Until the client goes away.
            client.read_exact(&mut byte).ok()
        }
        _ => {
            drop(now);
            let mut server = TcpStream::connect(upstream).ok()?;
            let head = format!("{line}\r\nConnection: close\r\n{fields}");
            server.write_all(head.as_bytes()).and_then(|()| server.write_all(&body)).ok()?;
            std::io::copy(&mut server, &mut client).ok().map(|_| ())
        }
    }
}
