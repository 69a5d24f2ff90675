//! Many runs as one array job: every combination of the values of some keys.

use std::fmt::Write as _;

use spec::{Error, Result};

use crate::shell;

/// A key of the run file and the values that it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    /// The key.
    pub key: String,
    /// Its values, as `--set` takes them.
    pub values: Vec<String>,
}

impl Axis {
    /// Reads `KEY=A,B,C`.
    ///
    /// # Errors
    /// There is no key, or a value is missing or there twice.
    pub fn parse(text: &str) -> Result<Axis> {
        let wrong = |what: &str| {
            Error::user(format!("--sweep {text}: {what}")).hint("--sweep optim.lr=1e-3,3e-4,1e-4")
        };
        let (key, values) = text.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE,VALUE,..."))?;
        let values: Vec<String> = values.split(',').map(|v| v.trim().to_owned()).collect();
        if key.trim().is_empty() || values.iter().any(String::is_empty) {
            return Err(wrong("a key or a value is missing"));
        }
        match values.iter().enumerate().find(|(i, v)| values[..*i].contains(v)) {
            Some((_, twice)) => Err(wrong(&format!("{twice} is there twice"))),
            None => Ok(Axis { key: key.trim().to_owned(), values }),
        }
    }
}

/// The runs of an array: each has its own values and its own directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    axes: Vec<Axis>,
    run_dir: String,
    at_once: Option<usize>,
}

/// Slurm's own default for the size of an array (`MaxArraySize`, slurm.conf).
const RUNS_MAX: usize = 1000;

impl Sweep {
    /// Every combination of the axes' values, the last axis fastest. Run `i` lives in `RUN_DIR/i`; at most `at_once` of
    /// them run at a time.
    ///
    /// # Errors
    /// A key twice, one that each run must have for itself, or more runs than an array holds.
    pub fn new(axes: Vec<Axis>, run_dir: String, at_once: Option<usize>) -> Result<Sweep> {
        let runs = axes.iter().try_fold(1_usize, |n, axis| n.checked_mul(axis.values.len()));
        if runs.is_none_or(|n| n > RUNS_MAX) {
            let runs = runs.map_or("too many".to_owned(), |n| n.to_string());
            return Err(Error::user(format!("--sweep gives {runs} runs, expected at most {RUNS_MAX}"))
                .hint("Slurm's arrays hold that many by default: sweep fewer values"));
        }
        if axes.iter().any(|axis| axis.key == "run.dir") {
            return Err(Error::user("--sweep run.dir: each run has a directory of its own already")
                .hint(format!("they are {run_dir}/0, {run_dir}/1 and so on")));
        }
        if let Some((_, twice)) =
            axes.iter().enumerate().find(|(i, a)| axes[..*i].iter().any(|b| b.key == a.key))
        {
            return Err(Error::user(format!("--sweep {} is given twice", twice.key))
                .hint("give all values of a key in one --sweep"));
        }
        if at_once == Some(0) {
            return Err(Error::user("--at-once=0: expected at least one").hint("leave it out for all"));
        }
        Ok(Sweep { axes, run_dir, at_once })
    }

    /// The `--set` arguments of each run, in order.
    pub fn runs(&self) -> Vec<Vec<String>> {
        let mut runs = vec![Vec::new()];
        for axis in &self.axes {
            runs = runs
                .iter()
                .flat_map(|run| {
                    axis.values.iter().map(move |v| [&run[..], &[format!("{}={v}", axis.key)]].concat())
                })
                .collect();
        }
        for (i, run) in runs.iter_mut().enumerate() {
            run.push(format!("run.dir={}/{i}", self.run_dir));
        }
        runs
    }

    pub(crate) fn array(&self) -> String {
        let last = self.runs().len() - 1;
        let limit = self.at_once.map_or(String::new(), |n| format!("%{n}"));
        format!("0-{last}{limit}")
    }

    /// Shell code that gives an element of the array its arguments.
    pub(crate) fn choice(&self) -> String {
        let mut text = String::from("case $SLURM_ARRAY_TASK_ID in\n");
        for (i, run) in self.runs().iter().enumerate() {
            let words: Vec<&str> = run.iter().flat_map(|set| ["--set", set]).collect();
            let _ = writeln!(text, "{i}) choice=({}) ;;", shell::line(words));
        }
        text.push_str("esac\n\n");
        text
    }
}
