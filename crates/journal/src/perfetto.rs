//! Chrome trace-event JSON, which <https://ui.perfetto.dev> opens: one process per rank, threads for compute and
//! communication. The same writer serves measured runs and simulated ones, so times are fractions of microseconds.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};

use crate::record::{Lane, Record};

/// Threads per rank and lane at most. More operations than this in flight at once share the last thread.
const MAX_THREADS: usize = 16;

/// Thread ids of a lane start here, so that lanes sort as listed.
fn first_thread(lane: Lane) -> usize {
    match lane {
        Lane::Compute => 0,
        Lane::Comm => 100,
    }
}

/// One slice of the timeline.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    /// Which rank.
    pub rank: usize,
    /// What it occupied.
    pub lane: Lane,
    /// The text on it.
    pub name: &'a str,
    /// Begin, in microseconds from any origin.
    pub start_us: f64,
    /// End, in microseconds.
    pub end_us: f64,
    /// Shown when the slice is selected.
    pub args: &'a [(&'a str, u64)],
}

/// Writes a trace event by event, in bounded memory.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: BufWriter<W>,
    any: bool,
    /// When each thread of a (rank, lane) is free again.
    free_at: BTreeMap<(usize, Lane), Vec<f64>>,
}

impl<W: Write> TraceWriter<W> {
    /// Starts a trace.
    ///
    /// # Errors
    /// When writing fails.
    pub fn new(out: W) -> io::Result<Self> {
        let mut out = BufWriter::new(out);
        out.write_all(br#"{"displayTimeUnit":"ms","traceEvents":["#)?;
        Ok(TraceWriter { out, any: false, free_at: BTreeMap::new() })
    }

    /// Names a rank; without it the rank is called `rank 3`.
    ///
    /// # Errors
    /// When writing fails.
    pub(crate) fn rank_name(&mut self, rank: usize, name: &str) -> io::Result<()> {
        self.separator()?;
        let name = text(name);
        write!(self.out, r#"{{"ph":"M","name":"process_name","pid":{rank},"args":{{"name":{name}}}}}"#)?;
        self.separator()?;
        write!(
            self.out,
            r#"{{"ph":"M","name":"process_sort_index","pid":{rank},"args":{{"sort_index":{rank}}}}}"#
        )
    }

    /// Adds a slice. Slices of one rank and lane come in order of their start; those that overlap (several operations in
    /// flight) go to threads of their own, because slices of one thread must nest.
    ///
    /// # Errors
    /// When writing fails.
    pub fn slice(&mut self, slice: &Slice<'_>) -> io::Result<()> {
        let Slice { rank, lane, start_us, end_us, .. } = *slice;
        if !self.free_at.keys().any(|(r, _)| *r == rank) {
            self.rank_name(rank, &format!("rank {rank}"))?;
        }
        let thread = self.thread(rank, lane, start_us, end_us)?;
        self.separator()?;
        let name = text(slice.name);
        // Three digits: nanoseconds. More would be noise, and f64 text may use exponents, which is valid JSON but long.
        let (ts, dur) = (start_us, (end_us - start_us).max(0.0));
        write!(
            self.out,
            r#"{{"ph":"X","name":{name},"cat":"{lane}","pid":{rank},"tid":{thread},"ts":{ts:.3},"dur":{dur:.3}"#
        )?;
        for (i, (key, value)) in slice.args.iter().enumerate() {
            let open = if i == 0 { r#","args":{"# } else { "," };
            write!(self.out, "{open}{}:{value}", text(key))?;
        }
        self.out.write_all(if slice.args.is_empty() { b"}" } else { b"}}" })
    }

    /// Adds a point of a counter track of `rank`, for example bytes in use.
    ///
    /// # Errors
    /// When writing fails.
    pub fn counter(&mut self, rank: usize, name: &str, time_us: f64, value: f64) -> io::Result<()> {
        if !value.is_finite() {
            return Ok(());
        }
        self.separator()?;
        let name = text(name);
        write!(
            self.out,
            r#"{{"ph":"C","name":{name},"pid":{rank},"ts":{time_us:.3},"args":{{"value":{value}}}}}"#
        )
    }

    /// Adds the spans of a journal record; other records have nothing to show. Times count from `origin_us`: absolute
    /// microseconds are larger than a trace viewer's precision.
    ///
    /// # Errors
    /// When writing fails.
    pub fn record(&mut self, record: &Record, origin_us: u64) -> io::Result<()> {
        let Record::Spans { rank, step, spans } = record else { return Ok(()) };
        for span in spans {
            let mut args = vec![("op", span.op), ("step", *step)];
            args.extend(span.micro_batch.map(|m| ("micro_batch", u64::from(m))));
            if span.bytes > 0 {
                args.push(("bytes", span.bytes));
            }
            let since = |time_us: u64| (i128::from(time_us) - i128::from(origin_us)) as f64;
            self.slice(&Slice {
                rank: *rank,
                lane: span.lane,
                name: &span.name,
                start_us: since(span.start_us),
                end_us: since(span.end_us),
                args: &args,
            })?;
        }
        Ok(())
    }

    /// Ends the trace and gives the writer back; without this the file is not valid JSON.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(b"\n]}\n")?;
        self.out.into_inner().map_err(io::IntoInnerError::into_error)
    }

    /// The first thread of the lane that is free at `start_us`, named when it is new.
    fn thread(&mut self, rank: usize, lane: Lane, start_us: f64, end_us: f64) -> io::Result<usize> {
        let free_at = self.free_at.entry((rank, lane)).or_default();
        let at =
            free_at.iter().position(|free| *free <= start_us).unwrap_or(free_at.len()).min(MAX_THREADS - 1);
        let id = first_thread(lane) + at;
        if at < free_at.len() {
            free_at[at] = free_at[at].max(end_us);
            return Ok(id);
        }
        free_at.push(end_us);
        let name = if at == 0 { lane.to_string() } else { format!("{lane} {}", at + 1) };
        self.separator()?;
        write!(
            self.out,
            r#"{{"ph":"M","name":"thread_name","pid":{rank},"tid":{id},"args":{{"name":"{name}"}}}}"#
        )?;
        self.separator()?;
        write!(
            self.out,
            r#"{{"ph":"M","name":"thread_sort_index","pid":{rank},"tid":{id},"args":{{"sort_index":{id}}}}}"#
        )?;
        Ok(id)
    }

    fn separator(&mut self) -> io::Result<()> {
        let first = !std::mem::replace(&mut self.any, true);
        self.out.write_all(if first { b"\n" } else { b",\n" })
    }
}

fn text(s: &str) -> String {
    serde_json::Value::from(s).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Span;

    fn span(name: &str, lane: Lane, start_us: u64, end_us: u64) -> Span {
        Span { op: 1, name: name.into(), lane, micro_batch: Some(0), start_us, end_us, bytes: 8 }
    }

    fn trace(fill: impl FnOnce(&mut TraceWriter<Vec<u8>>)) -> Vec<serde_json::Value> {
        let mut writer = TraceWriter::new(Vec::new()).unwrap();
        fill(&mut writer);
        let text = String::from_utf8(writer.finish().unwrap()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        value["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn an_empty_trace_is_valid() {
        assert!(trace(|_| ()).is_empty());
    }

    #[test]
    fn ranks_are_processes_and_lanes_threads() {
        let spans = vec![
            span("linear \"q\"", Lane::Compute, 1_700_000_000_000_010, 1_700_000_000_000_030),
            span("all_reduce", Lane::Comm, 1_700_000_000_000_020, 1_700_000_000_000_050),
        ];
        let events = trace(|w| {
            w.record(&Record::Spans { rank: 3, step: 9, spans }, 1_700_000_000_000_000).unwrap();
            w.counter(3, "memory", 1.5, 7.0).unwrap();
            w.counter(3, "memory", 1.5, f64::NAN).unwrap();
        });
        let slices: Vec<_> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(slices.len(), 2);
        assert_eq!(slices[0]["name"], "linear \"q\"");
        assert_eq!((slices[0]["ts"].as_f64(), slices[0]["dur"].as_f64()), (Some(10.0), Some(20.0)));
        assert_eq!(slices[1]["tid"], 100);
        assert_eq!(slices[1]["args"], serde_json::json!({"op": 1, "step": 9, "micro_batch": 0, "bytes": 8}));
        let names: Vec<_> =
            events.iter().filter(|e| e["ph"] == "M").filter_map(|e| e["args"]["name"].as_str()).collect();
        assert_eq!(names, ["rank 3", "compute", "comm"]);
        assert_eq!(events.iter().filter(|e| e["ph"] == "C").count(), 1);
    }

    #[test]
    fn overlapping_slices_never_share_a_thread() {
        let spans: Vec<Span> = (0..10).map(|i| span("send", Lane::Comm, 10 * i, 10 * i + 25)).collect();
        let events = trace(|w| w.record(&Record::Spans { rank: 0, step: 1, spans }, 0).unwrap());
        let mut ends = BTreeMap::new();
        for e in events.iter().filter(|e| e["ph"] == "X") {
            let (ts, dur) = (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap());
            let end = ends.insert(e["tid"].as_u64(), ts + dur).unwrap_or(0.0);
            assert!(ts >= end);
        }
        assert_eq!(ends.len(), 3);
    }
}
