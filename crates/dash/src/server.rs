//! Answers browsers and Prometheus, with a bound on everything that others decide.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use journal::Record;
use journal::prometheus::{Format, render};
use spec::{Error, Result};

use crate::access::{Access, Verdict};
use crate::http::{BODY_TIME, Request, Response, Status, head, write_by};
use crate::live::Cursor;
use crate::run::Run;
use crate::timeline::{Timeline, plan};
use crate::view;
use crate::watch::{Expected, Lookup, Shared, Watch};

/// Connections at once, and those of them that look on live: some room is left for Prometheus and for errors.
const CONNECTIONS_MAX: usize = 64;
const LIVE_MAX: usize = 48;

/// Stack of a connection's thread.
const STACK_BYTES: usize = 512 << 10;

/// A sign of life to those who look on, and how long they may take over an event.
const HEARTBEAT: Duration = Duration::from_secs(15);
const EVENT_TIME: Duration = Duration::from_secs(10);

/// Buckets of a curve that a page may ask for.
const BUCKETS_DEFAULT: u64 = 700;
const BUCKETS_MAX: u64 = 2048;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
const CHARTS: &str = include_str!("charts.js");

/// What to serve, where and to whom.
pub struct Options {
    /// Directories of runs.
    pub dirs: Vec<PathBuf>,
    /// Address; port 0 takes a free one.
    pub bind: SocketAddr,
    /// Asked of everybody if given; needed wherever others than this machine can connect.
    pub token: Option<String>,
    /// What else is known of runs.
    pub lookup: Arc<dyn Lookup>,
}

/// A server under way. Dropping it ends it.
pub struct Server {
    inner: Arc<Inner>,
    accepting: Option<JoinHandle<()>>,
    _watch: Watch,
}

struct Inner {
    access: Access,
    addr: SocketAddr,
    shared: Arc<Shared>,
    lookup: Arc<dyn Lookup>,
    connections: AtomicUsize,
    live: AtomicUsize,
    refused: AtomicU64,
    over: AtomicBool,
    /// What was planned of a run's ops since a start of it.
    expected: Mutex<BTreeMap<(usize, u64), Arc<Planned>>>,
}

/// What the planner says of a run's ops, or why it cannot.
type Planned = std::result::Result<Vec<Expected>, String>;

/// Follows runs and serves them.
///
/// # Errors
/// If a directory holds no run, the address cannot be served, or it can be reached by others and there is no token.
pub fn serve(options: Options) -> Result<Server> {
    let Options { dirs, bind, token, lookup } = options;
    if token.is_none() && !bind.ip().is_loopback() {
        return Err(Error::user(format!(
            "{bind} can be reached from other machines, and no token is asked for"
        )));
    }
    let fail = |e: io::Error| {
        let hint = match e.kind() {
            io::ErrorKind::AddrInUse => "choose another --port, or 0 for a free one",
            io::ErrorKind::AddrNotAvailable => "--bind must be an address of this machine; see ip addr",
            _ => "choose another --bind or --port",
        };
        Error::user(format!("serve at {bind}: {e}")).hint(hint)
    };
    let watch = Watch::new(&dirs, &lookup)?;
    let listener = TcpListener::bind(bind).map_err(fail)?;
    let addr = listener.local_addr().map_err(fail)?;
    let inner = Arc::new(Inner {
        access: Access::new(addr, token),
        addr,
        shared: watch.shared(),
        lookup,
        connections: AtomicUsize::new(0),
        live: AtomicUsize::new(0),
        refused: AtomicU64::new(0),
        over: AtomicBool::new(false),
        expected: Mutex::new(BTreeMap::new()),
    });
    let accepting = {
        let inner = inner.clone();
        let thread =
            std::thread::Builder::new().name("accept".to_owned()).spawn(move || accept(&inner, &listener));
        thread.map_err(|e| Error::failure(format!("start a thread: {e}")))?
    };
    Ok(Server { inner, accepting: Some(accepting), _watch: watch })
}

impl Server {
    /// The address to open, with the token if one is asked for.
    pub fn url(&self) -> String {
        self.inner.access.url()
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.inner.addr
    }

    /// Serves until the process ends.
    pub fn forever(mut self) {
        if let Some(accepting) = self.accepting.take() {
            // A thread that panicked has said so.
            let _ = accepting.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.inner.over.store(true, Ordering::Relaxed);
        // Wakes it up.
        let _ = TcpStream::connect_timeout(&self.inner.addr, Duration::from_secs(1));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// One of a bounded number of places.
struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(places: &'a AtomicUsize, max: usize) -> Option<Place<'a>> {
        let taken = places.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max).then_some(n + 1));
        taken.ok().map(|_| Place(places))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(inner: &Arc<Inner>, listener: &TcpListener) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Out of files, or a connection that broke off: others must not make this loop spin.
                std::thread::park_timeout(Duration::from_millis(50));
                continue;
            }
        };
        if inner.over.load(Ordering::Relaxed) {
            return;
        }
        let inner = inner.clone();
        if inner.connections.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            inner.refuse_quickly(stream);
            continue;
        }
        let serve = move || {
            let Some(_place) = Place::take(&inner.connections, CONNECTIONS_MAX) else {
                return inner.refuse_quickly(stream);
            };
            // The other side is gone or too slow: nobody is left to tell.
            let _ = inner.connection(stream);
        };
        // Without a thread the connection closes, which is all that can be said.
        let _ =
            std::thread::Builder::new().name("connection".to_owned()).stack_size(STACK_BYTES).spawn(serve);
    }
}

impl Inner {
    fn refuse_quickly(&self, mut stream: TcpStream) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let refusal = Response::refusal(Status::Unavailable, "too many connections: close some pages");
        let _ = stream.set_nonblocking(true);
        let _ = refusal.send(&mut stream, true);
    }

    fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let request = match Request::read(&mut stream)? {
            None => return Ok(()),
            Some(Ok(request)) => request,
            Some(Err(status)) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Response::refusal(status, "this server answers short GET requests only")
                    .send(&mut stream, true)?;
                return drain(&mut stream);
            }
        };
        let with_body = request.method == "GET";
        if let Some(refusal) = self.refusal(&request) {
            return refusal.send(&mut stream, with_body);
        }
        if request.path == "/api/live" && with_body {
            return self.live(&request, &mut stream);
        }
        self.answer(&request).send(&mut stream, with_body)
    }

    /// What somebody gets who may not look, or not yet.
    fn refusal(&self, request: &Request) -> Option<Response> {
        let refusal = match self.access.judge(request) {
            Verdict::Pass => return None,
            Verdict::Welcome { cookie } => {
                let again = Response::refusal(Status::SeeOther, "");
                return Some(again.with("Location", request.path.clone()).with("Set-Cookie", cookie));
            }
            Verdict::WrongHost => Response::refusal(
                Status::Forbidden,
                "this server is known as localhost and by its address; serve with --token-file to use other names",
            ),
            Verdict::NoToken => Response::refusal(
                Status::Unauthorized,
                "open the address that phalanx dash printed, with its token; programs send Authorization: Bearer TOKEN",
            )
            .with("WWW-Authenticate", "Bearer".to_owned()),
        };
        self.refused.fetch_add(1, Ordering::Relaxed);
        Some(refusal)
    }

    fn answer(&self, request: &Request) -> Response {
        match request.path.as_str() {
            "/" => Response::new("text/html; charset=utf-8", PAGE),
            "/page.css" => Response::new("text/css; charset=utf-8", STYLE),
            "/page.js" => Response::new("text/javascript; charset=utf-8", SCRIPT),
            "/charts.js" => Response::new("text/javascript; charset=utf-8", CHARTS),
            "/healthz" => Response::new("text/plain", "ok\n"),
            "/metrics" => self.metrics(Format::accepted(request.header("accept").unwrap_or_default())),
            "/api/runs" => {
                let runs = self.shared.runs();
                let all: Vec<_> = runs.iter().map(|r| view::facts(r, now_us())).collect();
                Response::json(&all)
            }
            "/api/curves" => self.curves(request).unwrap_or_else(|refusal| refusal),
            "/api/timeline" => self.timeline(request).unwrap_or_else(|refusal| refusal),
            _ => Response::refusal(Status::NotFound, "nothing here: the page is at /, metrics at /metrics"),
        }
    }

    fn curves(&self, request: &Request) -> std::result::Result<Response, Response> {
        let from = request.number("from").unwrap_or(0);
        let to = request.number("to").unwrap_or(u64::MAX);
        let zoom = self.of_run(request, |run, _| run.zoom(from, to, buckets(request)))?;
        Ok(Response::json(&zoom.look()))
    }

    fn timeline(&self, request: &Request) -> std::result::Result<Response, Response> {
        let taken =
            self.of_run(request, |run, index| Some((plan(run)?, index, start(run), run.dir.clone())))?;
        let Some((plan, index, start, dir)) = taken else { return Ok(Response::json(&Timeline::default())) };
        let expected = self.expected(index, start, &dir);
        let planned = (*expected).as_ref().map(Vec::as_slice).map_err(String::as_str);
        Ok(Response::json(&plan.draw(planned)))
    }

    /// What an answer needs of the run that a request names, taken under the lock; files are read without it.
    fn of_run<T>(
        &self,
        request: &Request,
        take: impl FnOnce(&Run, usize) -> T,
    ) -> std::result::Result<T, Response> {
        let index = usize::try_from(request.number("run").unwrap_or(0)).unwrap_or(usize::MAX);
        let runs = self.shared.runs();
        let run = runs.get(index).ok_or_else(|| Response::refusal(Status::NotFound, "no such run"))?;
        Ok(take(run, index))
    }

    /// What was planned of a run's ops; asked once for each of its starts.
    fn expected(
        &self,
        index: usize,
        (start_us, threads): (u64, Option<usize>),
        dir: &std::path::Path,
    ) -> Arc<Planned> {
        let mut known = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        // Of a run that starts over and over, the last is kept.
        known.retain(|(run, start), _| *run != index || *start == start_us);
        known
            .entry((index, start_us))
            .or_insert_with(|| Arc::new(self.lookup.expected(dir, threads).map_err(|e| told(&e))))
            .clone()
    }

    fn metrics(&self, format: Format) -> Response {
        let runs = view::metrics(&self.shared.runs(), now_us());
        let served = [
            ("phalanx_dash_clients", self.connections.load(Ordering::Relaxed) as f64),
            ("phalanx_dash_refused_total", self.refused.load(Ordering::Relaxed) as f64),
        ];
        Response::new(format.content_type(), render(&runs, &served, format))
    }

    /// Tells of what happens until the other side is gone.
    fn live(&self, request: &Request, stream: &mut TcpStream) -> io::Result<()> {
        let Some(_place) = Place::take(&self.live, LIVE_MAX) else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let refusal = Response::refusal(Status::Unavailable, "too many pages look on: close some");
            return refusal.with("Retry-After", "5".to_owned()).send(stream, true);
        };
        let _viewer = self.shared.view();
        let mut cursor = Cursor::new(buckets(request));
        let start = head(Status::Ok, "text/event-stream", None, &[]);
        write_by(stream, &start, Instant::now() + BODY_TIME)?;
        let mut said = Instant::now();
        while !self.over.load(Ordering::Relaxed) && !self.shared.is_over() {
            let mut events = {
                let runs = self.shared.runs();
                let events = cursor.next(&runs, Instant::now(), now_us());
                if events.is_empty() {
                    // Facts that came too soon after others are told then.
                    drop(self.shared.wait(runs, Duration::from_millis(250)));
                }
                events
            };
            if events.is_empty() && said.elapsed() >= HEARTBEAT {
                events.push_str(": still here\n\n");
            }
            if !events.is_empty() {
                write_by(stream, events.as_bytes(), Instant::now() + EVENT_TIME)?;
                said = Instant::now();
            }
        }
        Ok(())
    }
}

fn told(e: &Error) -> String {
    let hint = e.hint_text().map(|h| format!("; {h}")).unwrap_or_default();
    format!("{e}{hint}")
}

/// Which start of a run its journal is at, and on how many threads.
fn start(run: &Run) -> (u64, Option<usize>) {
    match &run.started {
        Some(Record::RunStarted { time_us, threads, .. }) => (*time_us, *threads),
        _ => (0, None),
    }
}

fn buckets(request: &Request) -> usize {
    request.number("points").unwrap_or(BUCKETS_DEFAULT).clamp(1, BUCKETS_MAX) as usize
}

/// Lets one who is refused finish writing, for a moment: a reset would take away the answer.
fn drain(stream: &mut TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut block = [0; 4096];
    for _ in 0..16 {
        if io::Read::read(stream, &mut block)? == 0 {
            break;
        }
    }
    Ok(())
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64)
}
