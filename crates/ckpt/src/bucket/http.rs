//! HTTP/1.1 to an object store, over TLS without any C, with limits on how long a silence may last.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::{Client, Error as ClientError, connect::HttpConnector as Tcp};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpResponseBody, HttpService,
};
use tokio::time::{Instant, Sleep, sleep, timeout};

/// A host that is there answers a SYN well within this.
const CONNECT: Duration = Duration::from_secs(5);

/// From the request to the first line of the answer, a part of an upload included.
const ANSWER: Duration = Duration::from_secs(60);

/// Between two pieces of an answer's body.
const SILENCE: Duration = Duration::from_secs(30);

/// A connection that has been unused for so long may have been closed by the other side.
const IDLE: Duration = Duration::from_secs(20);

type Inner = Client<HttpsConnector<Tcp>, HttpRequestBody>;

/// Makes the clients that [`object_store`] speaks through.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        let client =
            client().map_err(|why| object_store::Error::Generic { store: "TLS", source: why.into() })?;
        Ok(HttpClient::new(Service(client)))
    }
}

fn client() -> Result<Inner, String> {
    check_cpu()?;
    let tls = rustls::ClientConfig::builder_with_provider(rustls_graviola::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    // No certificates at all is no error yet: an endpoint without TLS needs none.
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let tls = tls.with_root_certificates(roots).with_no_client_auth();
    let mut tcp = Tcp::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_nodelay(true);
    let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_idle_timeout(IDLE).pool_timer(TokioTimer::new());
    Ok(builder.build(https.wrap_connector(tcp)))
}

/// TLS is computed with instructions that every server's processor of the last ten years has.
pub(super) fn check_cpu() -> Result<(), String> {
    if graviola::util::is_cpu_supported() {
        return Ok(());
    }
    Err("this processor lacks instructions that TLS is computed with (AES, ADX and BMI2, or those of ARMv8)"
        .into())
}

#[derive(Debug)]
struct Service(Inner);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = match timeout(ANSWER, self.0.request(request)).await {
            Ok(answer) => answer.map_err(refused)?,
            Err(_) => return Err(silent(ANSWER)),
        };
        let (head, body) = answer.into_parts();
        let body = Timed { body, silence: Box::pin(sleep(SILENCE)) };
        Ok(HttpResponse::from_parts(head, HttpResponseBody::new(body)))
    }
}

/// A body that fails when nothing comes for too long.
struct Timed {
    body: Incoming,
    silence: Pin<Box<Sleep>>,
}

impl Body for Timed {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.silence.as_mut().reset(Instant::now() + SILENCE);
            let broken = |e: hyper::Error| HttpError::new(HttpErrorKind::Interrupted, e);
            return Poll::Ready(frame.map(|f| f.map_err(broken)));
        }
        self.silence.as_mut().poll(cx).map(|()| Some(Err(silent(SILENCE))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn silent(limit: Duration) -> HttpError {
    let why = format!("nothing came for {} s", limit.as_secs());
    HttpError::new_boxed(HttpErrorKind::Timeout, why.into())
}

/// Which failures may be tried again: those that another connection may not meet.
fn refused(e: ClientError) -> HttpError {
    let mut kind = if e.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Unknown };
    let mut inner: Option<&(dyn StdError + 'static)> = Some(&e);
    while let Some(error) = inner {
        let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if io.is_some_and(|e| e.is::<rustls::Error>()) {
            // A certificate does not get better by asking again.
            kind = HttpErrorKind::Unknown;
            break;
        }
        if kind != HttpErrorKind::Connect && (error.is::<hyper::Error>() || error.is::<std::io::Error>()) {
            kind = HttpErrorKind::Interrupted;
        }
        inner = error.source();
    }
    HttpError::new(kind, e)
}
