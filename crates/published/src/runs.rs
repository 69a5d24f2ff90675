//! Published training runs: rows of a table as problems to estimate.

pub(crate) mod csv;
mod known;
mod layouts;

use plan::calibration::PRIOR;
use plan::estimate::Problem;
use plan::placement::Placement;
use plan::shape::{Shape, Sizes, dense};
use plan::software::Software;
use serde::Serialize;
use spec::catalog::EntryKind;
use spec::{Catalog, Cluster, Error, NumberFormat, Result};

use csv::{Row, Table};

/// A published run that gives enough to be estimated.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name in the table.
    pub id: String,
    /// Line of the file.
    pub line: usize,
    /// Where it was published.
    pub source: String,
    /// Runs of one publisher and stack, left out together in cross-validation: the letters that the id begins with.
    pub family: String,
    /// The model.
    pub shape: Shape,
    /// Layouts that agree with what was published: one, or several where choices were not.
    pub placements: Vec<Placement>,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// The machine.
    pub cluster: Cluster,
    /// The training stack.
    pub software: Software,
    /// Numeric recipe, for which constants are fitted: `bf16`, `fp16`, `fp8`, `mxfp8`, `nvfp4`, `int8`.
    pub recipe: &'static str,
    /// Measured time of a step; not a number in [`Outcome::run`] where only the memory was published.
    pub step_s: f64,
    /// Which figure of the row `step_s` comes from.
    pub measured: Measured,
    /// What was not published and had to be assumed.
    pub assumptions: Vec<String>,
}

impl Run {
    /// The run as a problem, with constants that no row has seen.
    pub(crate) fn problem(&self) -> Problem {
        Problem {
            shape: self.shape.clone(),
            cluster: self.cluster.clone(),
            software: self.software.clone(),
            constants: PRIOR,
            sequence: self.sequence,
            sequences: self.sequences,
            optimizer: Default::default(),
        }
    }

    /// Whether the run is in the half of its source that [`crate::validate::halves`] keeps back from the fit: the lowest
    /// bit of the FNV-1a hash (64 bit) of its id. A property of the id alone, so that no table's order or size moves it.
    pub fn kept_back(&self) -> bool {
        spec::hash::fnv1a(self.id.bytes()) & 1 == 1
    }
}

/// Which published figure a step time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// Printed as such.
    StepTime,
    /// From tokens per second.
    TokensPerSecond,
    /// From TFLOP/s, in the source's way of counting.
    Tflops,
    /// From model FLOPs utilisation, in the source's way of counting.
    Mfu,
}

/// A published run that says whether it fit.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The run; of several layouts that agree with it the first counts.
    pub run: Run,
    /// Whether it ran, or ended out of memory.
    pub ran: bool,
    /// What its framework reserved on the first rank.
    pub reserved_bytes: Option<f64>,
}

/// A row that cannot be estimated, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Its name in the table.
    pub id: String,
    /// Line of the file.
    pub line: usize,
    /// Why not.
    pub reason: String,
}

/// A table of published runs.
#[derive(Clone, Debug)]
pub struct Runs {
    /// Rows to estimate.
    pub runs: Vec<Run>,
    /// Rows that say whether they fit.
    pub outcomes: Vec<Outcome>,
    /// Rows that do not give enough, or that are estimated by no model here.
    pub not_priced: Vec<Skipped>,
}

/// Sequences of the global batch in nanotron's first sweep.
const SWEPT: Option<usize> = Some(256);
/// Characters of a cell that errors show.
const SHOWN_MAX: usize = 40;
/// Wider than any transformer by far.
const HIDDEN_MAX: usize = 1 << 20;

/// Columns without which a table is none of runs.
const REQUIRED: &[&str] = &["id", "accelerator", "n_accel", "layers", "hidden", "seq_len", "global_batch"];

impl Runs {
    /// Reads a table with the columns of `published_runs.csv`. `path` only names it in errors.
    ///
    /// # Errors
    /// If the text is no such table, or a cell holds no sensible number.
    pub fn parse(path: &str, text: &str, catalog: &Catalog) -> Result<Self> {
        let table = Table::parse(path, text, REQUIRED)?;
        let mut out = Runs { runs: Vec::new(), outcomes: Vec::new(), not_priced: Vec::new() };
        for row in &table.rows {
            let id = table.text(row, "id").to_owned();
            let reader = Reader { path, table: &table, row, catalog, assumptions: Vec::new() };
            let outcome = reader.outcome()?;
            match reader.run()? {
                Ok((run, untimed)) => {
                    let ended = outcome.map(|(ran, bytes)| (ran, bytes, run.clone()));
                    match untimed {
                        None => out.runs.push(run),
                        // Rows of outcomes need no times.
                        Some(_) if ended.is_some() => {}
                        Some(reason) => out.not_priced.push(Skipped { id, line: row.line, reason }),
                    }
                    out.outcomes.extend(ended.map(|(ran, reserved_bytes, run)| Outcome {
                        run,
                        ran,
                        reserved_bytes,
                    }));
                }
                Err(reason) => out.not_priced.push(Skipped { id, line: row.line, reason }),
            }
        }
        Ok(out)
    }
}

/// `Err(reason)` inside `Ok`: the row is sound but cannot be estimated.
type Usable<T> = std::result::Result<T, String>;

struct Reader<'a> {
    path: &'a str,
    table: &'a Table,
    row: &'a Row,
    catalog: &'a Catalog,
    assumptions: Vec<String>,
}

/// Unwraps the inner result or hands its reason out.
macro_rules! usable {
    ($e:expr) => {
        match $e? {
            Ok(value) => value,
            Err(reason) => return Ok(Err(reason)),
        }
    };
}

impl Reader<'_> {
    fn text(&self, column: &str) -> &str {
        self.table.text(self.row, column)
    }

    fn count(&self, column: &str) -> Result<Option<usize>> {
        self.table.count(self.path, self.row, column)
    }

    fn number(&self, column: &str) -> Result<Option<f64>> {
        self.table.number(self.path, self.row, column)
    }

    fn assume(&mut self, what: impl Into<String>) {
        self.assumptions.push(what.into());
    }

    /// Whether the run fit, and the bytes that it reserved, if the row says so.
    fn outcome(&self) -> Result<Option<(bool, Option<f64>)>> {
        let ran = match self.text("outcome").to_ascii_lowercase().as_str() {
            "" => return Ok(None),
            "ran" => true,
            "out of memory" | "oom" => false,
            other => {
                let shown: String = other.chars().take(SHOWN_MAX).collect();
                return Err(Error::user(format!("{}:{}: outcome = \"{shown}\"", self.path, self.row.line))
                    .hint("expected \"ran\", \"out of memory\", or nothing"));
            }
        };
        // PyTorch counts in GiB, whatever it prints.
        let reserved = self.number("reserved_gb")?.map(|gib| gib * (1u64 << 30) as f64);
        Ok(Some((ran, reserved.filter(|_| ran))))
    }

    /// The run, and why it has no time if it has none.
    fn run(mut self) -> Result<Usable<(Run, Option<String>)>> {
        let id = self.text("id").to_owned();
        if id.is_empty() {
            return Err(Error::user(format!("{}:{}: the row has no id", self.path, self.row.line))
                .hint("give each run a name of its own in the column id"));
        }
        let source = self.text("source").to_owned();
        let shape = usable!(self.shape());
        let Some(n) = self.count("n_accel")? else {
            return Ok(Err("number of accelerators not published".into()));
        };
        let Some(sequence) = self.count("seq_len")? else {
            return Ok(Err("sequence length not published".into()));
        };
        let Some(sequences) = self.count("global_batch")? else {
            return Ok(Err("global batch not published".into()));
        };
        let accelerator = self.text("accelerator").to_owned();
        let Ok(chip) = self.catalog.get(EntryKind::Accelerator, &accelerator) else {
            return Ok(Err(format!("accelerator \"{accelerator}\" is not in the catalogue")));
        };
        let family = self.catalog.family(chip.text("family").unwrap_or_default(), &mut Vec::new())?;
        let conditions = known::conditions(&source, &id, &chip.name, &family);
        let cluster = match self.catalog.cluster(&conditions.cluster, Some(n)) {
            Ok(cluster) => cluster,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if !conditions.stated {
            self.assume(format!("fabric not published: that of {} taken", conditions.cluster));
        }
        let (recipe, format) = self.format(&family.name);
        // "Mixed precision" on a chip without bf16 was fp16.
        let format = if format == NumberFormat::Bf16 { cluster.accelerator.sixteen_bit() } else { format };
        let software = self.as_run(conditions.software, &id, recipe)?;
        let problem = layouts::Problem {
            shape: &shape,
            n,
            sequences,
            sequence,
            format,
            units: if family.name == "trainium" { cluster.accelerator.compute_units } else { 1 },
            software: &software,
        };
        let (placements, slice) = usable!(layouts::placements(&mut self, &problem));
        let cluster = if let Some(slice) = slice { cluster.in_slices(slice) } else { cluster };
        let timed = self.measured(&shape, n, sequences, sequence, &cluster, format)?;
        let (step_s, measured, untimed) = match timed {
            Ok((step_s, measured)) => (step_s, measured, None),
            Err(reason) => (f64::NAN, Measured::StepTime, Some(reason)),
        };
        let run = Run {
            line: self.row.line,
            family: id.chars().take_while(char::is_ascii_alphabetic).collect(),
            id,
            source,
            shape,
            placements,
            sequence,
            sequences,
            cluster,
            software,
            recipe,
            step_s,
            measured,
            assumptions: self.assumptions,
        };
        Ok(Ok((run, untimed)))
    }

    /// The stack with what the row says of its switches.
    fn as_run(&self, mut software: Software, id: &str, recipe: &str) -> Result<Software> {
        let (stages, sequences) = (self.count("pp")?, self.count("global_batch")?);
        if software.name == "nanotron-2024" && (stages.is_some_and(|pp| pp > 1) || sequences != SWEPT) {
            // Its pipelines were benchmarked anew after they had been mended; other batches are not of the first sweep.
            software = Software::named("nanotron-2025").unwrap_or(software);
        }
        let torchtitan = software.name == "torchtitan";
        if torchtitan {
            let said = format!("{id} {}", self.text("notes")).to_ascii_lowercase();
            // The table that compares both has "asynctp" in the ids of either.
            software.overlap_tp = said.contains("async") && !id.ends_with("-vanilla");
        }
        if self.text("model name").contains("tokendrop") {
            // Fixed capacities: the host need not wait for token counts.
            software.eager = false;
        }
        if known::is_graphed(id) {
            software.eager = false;
        }
        software.sequence_parallel &= known::splits_sequences(id);
        software.blocking = id.starts_with(known::BLOCKING);
        software.low_precision_attention = known::attends_in_8_bit(id);
        // Its float8 recipe gathers in 8 bit; scales by rows do not allow that.
        software.low_precision_gathers = torchtitan && recipe == "fp8";
        software.overlap_tp_gathers = !(torchtitan && recipe == "fp8-rowwise");
        Ok(software)
    }

    fn format(&mut self, family: &str) -> (&'static str, NumberFormat) {
        let said = self.text("precision").to_ascii_lowercase();
        let text = known::precision(self.text("id")).map_or(said, str::to_owned);
        match text.as_str() {
            t if t.contains("int8") => ("int8", NumberFormat::Int8),
            t if t.starts_with("nvfp4") || t.starts_with("fp4") => ("nvfp4", NumberFormat::Fp4),
            t if t.starts_with("mxfp8") || t == "fp8-mx" => ("mxfp8", NumberFormat::Fp8),
            t if t.starts_with("fp8 row") => ("fp8-rowwise", NumberFormat::Fp8),
            t if t.starts_with("fp8") => ("fp8", NumberFormat::Fp8),
            "fp16" => ("bf16", NumberFormat::Fp16),
            "bf16" => ("bf16", NumberFormat::Bf16),
            _ => {
                self.assume(format!("precision not published: 16 bit on {family}"));
                ("bf16", NumberFormat::Bf16)
            }
        }
    }

    fn shape(&mut self) -> Result<Usable<Shape>> {
        let name = self.text("model name").split(" (").next().unwrap_or_default().trim().to_owned();
        if self.text("id").contains("-MegaScale-") && self.text("notes").contains("parallel block") {
            return Ok(Err("the width of its sliding windows was not published".into()));
        }
        let layers = self.count("layers")?;
        let has_experts = self.count("experts")?.is_some();
        let found = Shape::find(&name)?;
        let windowed =
            |f: &Shape| f.windows.is_some() && f.experts.is_none() && layers == Some(f.model.layers);
        if let Some(found) = found.as_ref().filter(|f| windowed(f)) {
            return Ok(Ok(found.clone()));
        }
        if self.text("notes").contains("sliding-window aware")
            || self.text("flops_kind").contains("sliding-window")
        {
            return Ok(Err(format!("the sliding windows of \"{name}\" are not in catalog/shapes.toml")));
        }
        if has_experts
            || (self.count("hidden")?.is_none() && found.as_ref().is_some_and(|f| f.experts.is_some()))
        {
            return Ok(self.mixture(found, &name, layers));
        }
        self.dense(&name, layers)
    }

    fn mixture(&self, found: Option<Shape>, name: &str, layers: Option<usize>) -> Usable<Shape> {
        let Some(mut shape) = found else {
            return Err(format!("the mixture \"{name}\" is not in catalog/shapes.toml"));
        };
        if let Some(layers) = layers {
            shape.model.layers = layers;
        }
        if let (Some(experts), Some(first)) =
            (shape.experts.as_mut(), self.text("notes").split("dense_layers=").nth(1))
        {
            let digits: String = first.chars().take_while(char::is_ascii_digit).collect();
            experts.dense_layers = digits.parse().unwrap_or(experts.dense_layers);
        }
        Ok(shape)
    }

    fn dense(&mut self, name: &str, layers: Option<usize>) -> Result<Usable<Shape>> {
        let params = self.number("params_b")?.map(|b| b * 1e9);
        let Some(hidden) = self.count("hidden")? else {
            return Ok(Err("the model's shape was not published".into()));
        };
        if hidden > HIDDEN_MAX {
            return Ok(Err(format!("a width of {hidden} is no transformer's")));
        }
        let heads = match self.count("heads")? {
            Some(heads) => heads,
            None => {
                let heads = known::usual_heads(hidden);
                self.assume(format!("number of heads not published: {heads}"));
                heads
            }
        };
        let kv_heads = self.count("kv_heads")?.unwrap_or(heads);
        let vocab = match self.count("vocab")? {
            Some(vocab) => vocab,
            None => {
                let vocab = known::vocab(self.text("source"));
                self.assume(format!("vocabulary not published: {vocab}"));
                vocab
            }
        };
        if !heads.is_multiple_of(kv_heads) {
            return Ok(Err(format!("{kv_heads} key and value heads do not divide {heads} heads")));
        }
        let ffn = self.count("ffn_hidden")?;
        let layers = match (layers, params, ffn) {
            (Some(layers), _, _) => layers,
            (None, Some(params), Some(ffn)) if ffn == 4 * hidden => {
                let per_layer = 12.0 * (hidden as f64).powi(2);
                let layers = ((params - (vocab * hidden) as f64) / per_layer).round().max(1.0) as usize;
                self.assume(format!("layers not published: {layers} from the parameter count"));
                layers
            }
            _ => return Ok(Err("the model's shape was not published".into())),
        };
        let mut model = known::closest(name, layers, hidden, ffn, heads, kv_heads, vocab, params);
        if self.text("id").starts_with("nanotron") {
            // Its one benchmark is of Llama's layers.
            model.gated = true;
        }
        match self.text("tied_embeddings") {
            "yes" => model.tied = true,
            "no" => model.tied = false,
            _ => {}
        }
        if ffn.is_none() {
            self.assume(format!("feed-forward width not published: {}", model.ffn));
        }
        Ok(Ok(Shape::from_model(dense(
            if name.is_empty() { "model" } else { name },
            Sizes { layers, hidden, heads, kv_heads, vocab, ..model },
        ))))
    }

    /// The step time in seconds, converted from other figures in the source's own way of counting.
    fn measured(
        &mut self,
        shape: &Shape,
        n: usize,
        sequences: usize,
        sequence: usize,
        cluster: &Cluster,
        format: NumberFormat,
    ) -> Result<Usable<(f64, Measured)>> {
        if let Some(t) = self.number("step_time_s")? {
            return Ok(Ok((t, Measured::StepTime)));
        }
        if let Some(t) = self.number("derived_step_time_s")? {
            return Ok(Ok((t, Measured::TokensPerSecond)));
        }
        let tokens = sequences as f64 * sequence as f64;
        if let Some(rate) = self.number("tokens_per_sec_per_gpu")? {
            return Ok(Ok((tokens / rate / n as f64, Measured::TokensPerSecond)));
        }
        let per_s = match (self.number("tflops_per_gpu")?, self.number("mfu_pct")?) {
            (Some(t), _) => Some((t * 1e12, Measured::Tflops)),
            (None, Some(mfu)) => {
                cluster.accelerator.peak(format).map(|p| (p.value * mfu / 100.0, Measured::Mfu))
            }
            (None, None) => None,
        };
        let Some((per_s, measured)) = per_s else {
            return Ok(Err("no time, rate or utilisation published".into()));
        };
        let kind = self.text("flops_kind");
        let s = sequence as f64;
        let per_token = if kind.starts_with("hardware") {
            // Narayanan et al. 2021, equation 3: the layers' forward pass counts twice.
            let model = shape.flops_per_token(s, false);
            let head = 6.0 * shape.table_params();
            (model - head) * 4.0 / 3.0 + head
        } else if kind.starts_with("model") {
            let causal = kind.contains("(causal");
            let table = if kind.contains("embedding excluded") || shape.model.tied_embeddings {
                0.0
            } else {
                shape.table_params()
            };
            shape.flops_per_token(s, causal) + 6.0 * table
        } else {
            return Ok(Err(format!("TFLOP/s counted in an unknown way (\"{kind}\")")));
        };
        Ok(Ok((per_token * tokens / per_s / n as f64, measured)))
    }
}
