//! Records as OpenTelemetry's metrics and spans: OTLP over HTTP, as JSON (OpenTelemetry Protocol 1.3, "OTLP/HTTP").

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use serde_json::{Value, json};
use spec::{Error, Result};

use super::export::{Cell, Table, Type};

/// Rows of a request: about a MiB of JSON, below the 4 MiB that collectors take.
const ROWS: usize = 512;
/// A collector answers in milliseconds, or is overloaded.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of an answer no more is read.
const ANSWER_BYTES: u64 = 64 << 10;

/// Where a collector listens.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    /// With its port.
    host: String,
    /// In front of `/v1/metrics`, without a slash at the end.
    path: String,
}

impl Endpoint {
    /// Parses `http://host[:port][/path]`.
    pub(super) fn parse(url: &str) -> Result<Endpoint> {
        let wrong = |what| {
            Error::user(format!("--otlp {url}: {what}"))
                .hint("give a collector's OTLP/HTTP address, such as http://localhost:4318")
        };
        let rest = url.strip_prefix("http://").ok_or_else(|| {
            wrong("only http:// is spoken; a collector on this machine can go on with TLS to another")
        })?;
        let (host, path) = rest.split_once('/').map_or((rest, ""), |(host, path)| (host, path));
        let after_bracket = host.rsplit(']').next().unwrap_or(host);
        let host = if after_bracket.contains(':') { host.to_owned() } else { format!("{host}:4318") };
        let is_plain = |text: &str| text.chars().all(|c| c.is_ascii_graphic());
        if host.starts_with(':') || !is_plain(&host) || !is_plain(path) {
            return Err(wrong("no address"));
        }
        let path = path.trim_end_matches('/');
        let path = if path.is_empty() { String::new() } else { format!("/{path}") };
        Ok(Endpoint { host, path })
    }

    /// Posts a body; what the collector refuses is an error.
    fn post(&self, signal: &str, body: &Value) -> Result<()> {
        let url = format!("http://{}{}/v1/{signal}", self.host, self.path);
        let failed = |e: io::Error| {
            Error::failure(format!("send to {url}: {e}"))
                .hint("start the collector, or give its address with --otlp")
        };
        let answer = self.exchange(signal, &body.to_string()).map_err(failed)?;
        let status = answer.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok()).unwrap_or(0);
        let said = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
        if status / 100 != 2 {
            return Err(Error::failure(format!("{url} answered {status}: {said}")));
        }
        // Sent in chunks or not, what it refused stands there in JSON.
        match said.contains("\"rejected") && !said.contains(":\"0\"") && !said.contains(":0") {
            true => Err(Error::failure(format!("{url} refused a part: {said}"))),
            false => Ok(()),
        }
    }

    fn exchange(&self, signal: &str, body: &str) -> io::Result<String> {
        let address = self.host.to_socket_addrs()?.next();
        let address = address.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such host"))?;
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "POST {}/v1/{signal} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.path,
            self.host,
            body.len()
        )?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Sends every column of a table as a gauge and, of steps, each as a span; says how many rows went.
pub(super) fn send(table: &Table<'_>, run: &str, to: &Endpoint) -> Result<usize> {
    let columns = table.columns();
    let sender = Sender { run, kind: table.kind(), columns: &columns };
    let (mut rows, mut sent) = (Vec::new(), 0);
    let flush = |rows: &mut Vec<Vec<Cell>>, sent: &mut usize| -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        to.post("metrics", &sender.metrics(rows))?;
        if sender.kind == "step" {
            to.post("traces", &sender.spans(rows))?;
        }
        *sent += rows.len();
        rows.clear();
        Ok(())
    };
    table.rows(&mut |row| {
        rows.push(row);
        if rows.len() < ROWS { Ok(()) } else { flush(&mut rows, &mut sent) }
    })?;
    flush(&mut rows, &mut sent)?;
    Ok(sent)
}

struct Sender<'a> {
    run: &'a str,
    kind: &'a str,
    columns: &'a [(String, Type)],
}

impl Sender<'_> {
    fn metrics(&self, rows: &[Vec<Cell>]) -> Value {
        let metrics = self.columns.iter().enumerate().skip(1).filter(|(_, (_, of))| *of != Type::Text);
        let metrics = metrics.filter_map(|(i, (name, _))| {
            let point = |row: &Vec<Cell>| Some(point(&row[i], time_ns(row)?));
            let points: Vec<Value> = rows.iter().filter_map(point).flatten().collect();
            if points.is_empty() {
                return None;
            }
            // Units come last in names of ours.
            let unit = if name.ends_with("_s") && !name.ends_with("per_s") { "s" } else { "1" };
            Some(json!({
                "name": format!("phalanx.{}.{name}", self.kind),
                "unit": if name.ends_with("bytes") { "By" } else { unit },
                "gauge": { "dataPoints": points },
            }))
        });
        let metrics: Vec<Value> = metrics.collect();
        json!({ "resourceMetrics": [{
            "resource": self.resource(),
            "scopeMetrics": [{ "scope": scope(), "metrics": metrics }],
        }] })
    }

    fn spans(&self, rows: &[Vec<Cell>]) -> Value {
        let at = |name: &str| self.columns.iter().position(|(column, _)| column == name);
        let (Some(step), Some(step_s)) = (at("step"), at("step_s")) else { return Value::Null };
        let trace = hash(&[self.run]);
        let span = |row: &Vec<Cell>| {
            let (end, number) = (time_ns(row)?, integer(&row[step])?);
            let Cell::Float(Some(seconds)) = row[step_s] else { return None };
            // Sent again, a step is the same span.
            let id = hash(&[self.run, &number.to_string(), &end.to_string()]);
            Some(json!({
                "traceId": format!("{trace:016x}{:016x}", hash(&["trace", self.run])),
                "spanId": format!("{id:016x}"),
                "name": "step",
                "kind": 1,
                "startTimeUnixNano": end.saturating_sub((seconds * 1e9) as u64).to_string(),
                "endTimeUnixNano": end.to_string(),
                "attributes": [{ "key": "phalanx.step", "value": { "intValue": number.to_string() } }],
            }))
        };
        let spans: Vec<Value> = rows.iter().filter_map(span).collect();
        json!({ "resourceSpans": [{
            "resource": self.resource(),
            "scopeSpans": [{ "scope": scope(), "spans": spans }],
        }] })
    }

    fn resource(&self) -> Value {
        let text = |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
        json!({ "attributes": [text("service.name", "phalanx"), text("phalanx.run", self.run)] })
    }
}

fn scope() -> Value {
    json!({ "name": "phalanx", "version": env!("CARGO_PKG_VERSION") })
}

fn integer(cell: &Cell) -> Option<u64> {
    if let Cell::Int(n) = cell { Some(*n) } else { None }
}

/// The time of a row, which is its first column.
fn time_ns(row: &[Cell]) -> Option<u64> {
    integer(row.first()?)?.checked_mul(1000)
}

/// A value at a time; whole numbers of 64 bits are text in this JSON, and so is what JSON has no number for.
fn point(cell: &Cell, time_ns: u64) -> Option<Value> {
    let time = time_ns.to_string();
    Some(match cell {
        Cell::Int(n) => json!({ "timeUnixNano": time, "asInt": n.to_string() }),
        Cell::Float(Some(x)) if x.is_finite() => json!({ "timeUnixNano": time, "asDouble": x }),
        Cell::Float(Some(x)) => {
            let text = match x.is_nan() {
                true => "NaN",
                false if *x > 0.0 => "Infinity",
                false => "-Infinity",
            };
            json!({ "timeUnixNano": time, "asDouble": text })
        }
        Cell::Float(None) | Cell::Text(_) => return None,
    })
}

/// A hash over parts that are told apart; never 0, which is no id.
fn hash(parts: &[&str]) -> u64 {
    spec::hash::fnv1a(parts.iter().flat_map(|part| part.bytes().chain([0]))).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed() {
        let check = |url: &str, host: &str, path: &str| {
            let expected = Endpoint { host: host.to_owned(), path: path.to_owned() };
            assert_eq!(Endpoint::parse(url).expect(url), expected);
        };
        check("http://localhost:4318", "localhost:4318", "");
        check("http://collector", "collector:4318", "");
        check("http://[::1]/otlp/", "[::1]:4318", "/otlp");
        for wrong in ["localhost:4318", "https://x", "http://", "http://:4318", "http://a b"] {
            let said = Endpoint::parse(wrong).expect_err(wrong);
            assert!(said.hint_text().is_some(), "{said}");
        }
    }

    #[test]
    fn numbers_are_as_the_protocol_has_them() {
        let check = |cell: Cell, expected: Option<Value>| {
            assert_eq!(
                point(&cell, 5),
                expected.map(|mut value| {
                    value["timeUnixNano"] = json!("5");
                    value
                })
            );
        };
        check(Cell::Int(u64::MAX), Some(json!({ "asInt": u64::MAX.to_string() })));
        check(Cell::Float(Some(1.5)), Some(json!({ "asDouble": 1.5 })));
        check(Cell::Float(Some(f64::NAN)), Some(json!({ "asDouble": "NaN" })));
        check(Cell::Float(None), None);
    }
}
