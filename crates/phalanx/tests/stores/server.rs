//! An S3 server for the tests: moto, or the one that PHALANX_TEST_S3 names.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

/// The bucket that the tests write into.
pub(crate) const BUCKET: &str = "phalanx-tests";

pub(crate) struct Server {
    child: Option<Child>,
    /// Host and port.
    pub(crate) address: String,
}

impl Server {
    /// A server with an empty bucket; `None`, with the reason printed, where there is none.
    pub(crate) fn start() -> Option<Server> {
        let server = match std::env::var("PHALANX_TEST_S3") {
            Ok(url) => Server { child: None, address: url.trim_start_matches("http://").to_owned() },
            Err(_) => Server::moto()?,
        };
        let status = request(&server.address, &format!("PUT /{BUCKET} HTTP/1.1"));
        let made =
            [" 200 ", " 409 "].iter().any(|ok| status.lines().next().is_some_and(|line| line.contains(ok)));
        assert!(made, "make a bucket: {status}");
        Some(server)
    }

    fn moto() -> Option<Server> {
        let mut command = Command::new("moto_server");
        command.args(["-H", "127.0.0.1", "-p", "0"]).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(e) => {
                eprintln!("skipped: no S3 server: moto_server: {e}; python3 -m pip install 'moto[server]'");
                return None;
            }
        };
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut said = Vec::new();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let found = line.split_once("Running on http://").map(|(_, a)| a.trim().to_owned());
            said.push(line);
            found
        });
        let Some(address) = address else {
            eprintln!("skipped: moto_server does not start: {}", said.join(" | "));
            let _ = child.wait();
            return None;
        };
        // It logs every request.
        std::thread::spawn(move || lines.for_each(drop));
        Some(Server { child: Some(child), address })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The answer to a request without a body.
pub(crate) fn request(address: &str, line: &str) -> String {
    let mut to = TcpStream::connect(address).expect("connect to the store");
    write!(to, "{line}\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .expect("ask the store");
    let mut answer = String::new();
    to.read_to_string(&mut answer).expect("an answer");
    answer
}
