//! The ops of a trace, from comma-separated text or another table.

use spec::{Error, Result, suggest};

/// One op of one worker in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Line of the text.
    pub line: usize,
    /// Data-parallel rank.
    pub dp_rank: usize,
    /// Pipeline stage.
    pub stage: usize,
    /// Step.
    pub step: i64,
    /// What it does.
    pub kind: Kind,
    /// When it began, in seconds of its step.
    pub start_s: f64,
    /// How long it took, waiting for others included.
    pub duration_s: f64,
    /// Which of its kind.
    pub seq: i64,
    /// Model chunk, or none.
    pub chunk: i64,
    /// Ops of a kind and class are to take equally long; tables have one class.
    pub class: usize,
    /// Whether the worker goes on only when the message is through; tables say nothing else.
    pub waits: bool,
}

/// What an op does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Forward pass of a micro-batch.
    Forward,
    /// Backward pass of a micro-batch.
    Backward,
    /// Hands activations to the next stage.
    ForwardSend,
    /// Gets activations.
    ForwardRecv,
    /// Hands gradients back.
    BackwardSend,
    /// Gets gradients.
    BackwardRecv,
    /// Replicas gather parameters.
    Gather,
    /// Replicas scatter gradients.
    Scatter,
    /// The first and last stage sum the gradients of the table they share.
    Embedding,
    /// Tensor-parallel ranks sum gradients of norms.
    Norms,
    /// Stages agree on the gradients' norm.
    Clip,
    /// The optimiser.
    Optimizer,
    /// The host collects garbage.
    Garbage,
}

impl Kind {
    /// Names in traces.
    const ALL: [(&'static str, Kind); 13] = [
        ("forward-compute", Kind::Forward),
        ("backward-compute", Kind::Backward),
        ("forward-send", Kind::ForwardSend),
        ("forward-recv", Kind::ForwardRecv),
        ("backward-send", Kind::BackwardSend),
        ("backward-recv", Kind::BackwardRecv),
        ("params-all-gather", Kind::Gather),
        ("grads-reduce-scatter", Kind::Scatter),
        ("embedding-grads-all-reduce", Kind::Embedding),
        ("layernorm-grads-all-reduce", Kind::Norms),
        ("optimizer-clip-main-grad", Kind::Clip),
        ("optimizer", Kind::Optimizer),
        ("gc", Kind::Garbage),
    ];

    /// Names in answers, where both ends of a message are one.
    pub(super) const NAMED: [(&'static str, &'static [Kind]); 11] = [
        ("forward-compute", &[Kind::Forward]),
        ("backward-compute", &[Kind::Backward]),
        ("forward-pp-comm", &[Kind::ForwardSend, Kind::ForwardRecv]),
        ("backward-pp-comm", &[Kind::BackwardSend, Kind::BackwardRecv]),
        ("params-all-gather", &[Kind::Gather]),
        ("grads-reduce-scatter", &[Kind::Scatter]),
        ("embedding-grads-all-reduce", &[Kind::Embedding]),
        ("layernorm-grads-all-reduce", &[Kind::Norms]),
        ("optimizer-clip-main-grad", &[Kind::Clip]),
        ("optimizer", &[Kind::Optimizer]),
        ("gc", &[Kind::Garbage]),
    ];

    /// The kind that both ends of a message are.
    pub(super) fn message(self) -> Kind {
        match self {
            Kind::ForwardRecv => Kind::ForwardSend,
            Kind::BackwardRecv => Kind::BackwardSend,
            kind => kind,
        }
    }
}

/// Columns that are read; others are left alone.
const COLUMNS: [&str; 8] = ["dp_rank", "stage", "step", "optype", "start_ts", "duration", "seq_id", "mc"];
/// More workers than any trace has, and more seconds than any step.
const MAX: f64 = 1e6;

/// Reads the ops of a trace: a header with the columns `dp_rank,stage,step,optype,start_ts,duration,seq_id,mc` among
/// others in any order, then an op a line.
///
/// # Errors
/// A column that is missing, a cell that cannot be read, no ops.
pub fn parse(place: &str, text: &str) -> Result<Vec<Row>> {
    let cells = |line: &str| line.split(',').map(|c| c.trim().trim_matches('"').to_owned()).collect();
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let header: Vec<String> = lines.next().map_or_else(Vec::new, |l| cells(l.1));
    table(place, &header, lines.map(|(i, line)| Ok((i + 1, cells(line)))))
}

/// Reads the ops of a trace from a table: its columns as for [`parse`], and rows of cells, each with where it stands.
///
/// # Errors
/// As for [`parse`], and of `rows`.
pub fn table(
    place: &str,
    columns: &[String],
    rows: impl Iterator<Item = Result<(usize, Vec<String>)>>,
) -> Result<Vec<Row>> {
    let mut at = [0; COLUMNS.len()];
    for (column, place_of) in COLUMNS.iter().zip(&mut at) {
        *place_of = columns.iter().position(|h| h == column).ok_or_else(|| {
            Error::user(format!("{place}: no column {column}"))
                .hint(format!("a trace of ops is a table with the columns {}", COLUMNS.join(", ")))
        })?;
    }
    let rows: Result<Vec<Row>> = rows
        .map(|row| {
            let (line, cells) = row?;
            let cell = |c: usize| cells.get(at[c]).map_or("", String::as_str);
            Cells { place, line, cells: std::array::from_fn(cell) }.row()
        })
        .collect();
    let rows = rows?;
    if rows.is_empty() {
        return Err(Error::user(format!("{place}: no ops")).hint("an op a line below the header"));
    }
    Ok(rows)
}

/// One row's cells, in the order of [`COLUMNS`].
struct Cells<'a> {
    place: &'a str,
    line: usize,
    cells: [&'a str; COLUMNS.len()],
}

impl Cells<'_> {
    fn row(&self) -> Result<Row> {
        Ok(Row {
            line: self.line,
            dp_rank: self.count(0)?,
            stage: self.count(1)?,
            step: self.number(2, 0.0)? as i64,
            kind: self.kind()?,
            start_s: self.number(4, 0.0)?,
            duration_s: self.number(5, 0.0)?,
            seq: self.number(6, -1.0)? as i64,
            chunk: self.number(7, -1.0)? as i64,
            class: 0,
            waits: true,
        })
    }

    fn kind(&self) -> Result<Kind> {
        let name = self.cells[3];
        Kind::ALL.iter().find(|k| k.0 == name).map(|k| k.1).ok_or_else(|| {
            Error::user(format!("{}, line {}: unknown op \"{name}\"", self.place, self.line))
                .hint(suggest::hint(name, Kind::ALL.iter().map(|k| k.0)))
        })
    }

    fn number(&self, c: usize, min: f64) -> Result<f64> {
        let value: Option<f64> = self.cells[c].parse().ok();
        value.filter(|v| (min..=MAX * MAX).contains(v)).ok_or_else(|| {
            let Cells { place, line, cells } = self;
            Error::user(format!("{place}, line {line}: {} = \"{}\"", COLUMNS[c], cells[c]))
                .hint("ranks, stages, starts and durations are numbers from 0, times in seconds")
        })
    }

    fn count(&self, c: usize) -> Result<usize> {
        let n = self.number(c, 0.0)?;
        if n <= MAX {
            return Ok(n as usize);
        }
        Err(Error::user(format!("{}, line {}: {} = {n}", self.place, self.line, COLUMNS[c]))
            .hint(format!("at most {MAX}")))
    }
}
