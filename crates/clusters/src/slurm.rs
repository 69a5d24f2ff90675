//! A batch script for Slurm that trains to the end: over time limits, preemptions and nodes that fail.
//!
//! Every rank is a task of one `srun`. The script decides by the exit code what comes next (see the crate's table), and
//! leaves to Slurm what Slurm does by itself: a job that was preempted, or lost a node, is queued again as it is.

use std::fmt::Write as _;

use spec::{Error, Result};

use crate::{Decision, Decisions, Memory, Time, name, shell};

mod sweep;

pub use sweep::{Axis, Sweep};

/// What is asked for; [`Request::new`] is one node with one rank.
#[derive(Clone, Debug)]
pub struct Request {
    /// Name of the job.
    pub name: String,
    /// Nodes.
    pub nodes: usize,
    /// Ranks on each.
    pub tasks_per_node: usize,
    /// GPUs of each node, if any.
    pub gpus_per_node: Option<usize>,
    /// Cores of each rank; the cluster's default if absent.
    pub cpus_per_task: Option<usize>,
    /// Memory of each node; the cluster's default if absent.
    pub memory: Option<Memory>,
    /// Time limit of a start; the partition's if absent.
    pub time: Option<Time>,
    /// From the warning to the end of the time limit.
    pub grace: Time,
    /// Further options by name, for example `("partition", "gpu")`, in this order.
    pub options: Vec<(String, String)>,
    /// Whether the job may be queued again.
    pub requeue: bool,
    /// Starts after a failure, in the same allocation.
    pub restarts: u32,
    /// Lines for the script to run before the first start, for example `module load cuda`.
    pub setup: Vec<String>,
    /// What each rank runs: a program and its arguments.
    pub command: Vec<String>,
    /// Runs of an array, of which each adds its own arguments.
    pub sweep: Option<Sweep>,
}

/// A script, and why it is as it is.
#[derive(Clone, Debug)]
pub struct Script {
    /// The script.
    pub text: String,
    /// What was chosen.
    pub decisions: Vec<Decision>,
}

/// The line by which a script of ours is known, so that no other file is written over.
pub const MARK: &str = "# Written by phalanx launch slurm.";

impl Request {
    /// One rank on one node that runs `command`.
    pub fn new(name: impl Into<String>, command: Vec<String>) -> Request {
        Request {
            name: name.into(),
            nodes: 1,
            tasks_per_node: 1,
            gpus_per_node: None,
            cpus_per_task: None,
            memory: None,
            time: None,
            grace: Time { seconds: 120 },
            options: Vec::new(),
            requeue: true,
            restarts: 3,
            setup: Vec::new(),
            command,
            sweep: None,
        }
    }

    fn check(&self) -> Result<()> {
        job_name(&self.name)?;
        for (flag, count) in [("--nodes", self.nodes), ("--ntasks-per-node", self.tasks_per_node)] {
            if count == 0 {
                return Err(Error::user(format!("{flag}=0: expected at least one")));
            }
        }
        let counts = [("--gpus-per-node", self.gpus_per_node), ("--cpus-per-task", self.cpus_per_task)];
        if let Some((flag, _)) = counts.into_iter().find(|(_, n)| *n == Some(0)) {
            return Err(Error::user(format!("{flag}=0: expected at least one")).hint("leave it out for none"));
        }
        if let Some(gpus) = self.gpus_per_node.filter(|gpus| *gpus < self.tasks_per_node) {
            return Err(Error::user(format!(
                "--gpus-per-node={gpus} is less than --ntasks-per-node={}: each rank drives one GPU",
                self.tasks_per_node
            ))
            .hint(format!("--ntasks-per-node={gpus}")));
        }
        if let Some(time) = self.time.filter(|time| *time <= self.grace) {
            return Err(Error::user(format!(
                "--time={time} is no longer than --grace={}: the job would be asked to stop before it starts",
                self.grace
            ))
            .hint("--grace is the time that saving takes"));
        }
        if self.grace.seconds > GRACE_MAX_S {
            return Err(Error::user(format!("--grace={}: Slurm takes at most {GRACE_MAX_S} s", self.grace)));
        }
        options(&self.options)?;
        let lines = self.setup.iter().chain(&self.command).chain(self.options.iter().map(|(_, v)| v));
        match lines.into_iter().find(|l| l.contains(['\n', '\r', '\0'])) {
            Some(line) => Err(Error::user(format!("{line:?} has a line break, which a script cannot hold"))),
            None => Ok(()),
        }
    }
}

/// `sbatch --signal` holds its seconds in 16 bits (Slurm's manual: "up to 65535").
const GRACE_MAX_S: u64 = 65_535;

/// A name that stands in `#SBATCH` lines and in the names of files.
fn job_name(text: &str) -> Result<()> {
    let is_inside = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let fits = !text.is_empty() && text.len() <= name::LABEL_MAX && text.chars().all(is_inside);
    if fits && text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(Error::user(format!(
        "--job-name={text}: expected at most {} letters, digits, hyphens, dots and _, the first a letter or digit",
        name::LABEL_MAX
    )))
}

/// Options that the script decides itself, with what to say instead.
const OURS: &[(&str, &str)] = &[
    ("nodes", "--nodes"),
    ("ntasks", "--ntasks"),
    ("ntasks-per-node", "--ntasks-per-node"),
    ("gpus-per-node", "--gpus-per-node"),
    ("cpus-per-task", "--cpus-per-task"),
    ("mem", "--mem"),
    ("time", "--time"),
    ("signal", "--grace"),
    ("array", "--sweep"),
    ("job-name", "--job-name"),
    ("requeue", "--no-requeue"),
    ("no-requeue", "--no-requeue"),
    ("open-mode", "nothing: the log is appended to"),
];

fn options(options: &[(String, String)]) -> Result<()> {
    for (key, value) in options {
        let shown = if value.is_empty() { format!("--{key}") } else { format!("--{key}={value}") };
        if let Some((_, instead)) = OURS.iter().find(|(ours, _)| ours == key) {
            return Err(Error::user(format!("--sbatch {shown} is decided by a flag of its own"))
                .hint(format!("give {instead}")));
        }
        let is_name = !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        if !is_name || key.starts_with('-') || value.contains('#') {
            return Err(Error::user(format!(
                "--sbatch {shown}: expected an option of sbatch, NAME or NAME=VALUE"
            ))
            .hint("--sbatch reservation=big"));
        }
    }
    Ok(())
}

/// The script for a request.
///
/// ```
/// use clusters::slurm::{Request, script};
/// let command = ["phalanx", "train"].map(String::from).to_vec();
/// let request = Request { nodes: 2, tasks_per_node: 4, ..Request::new("mine", command) };
/// let text = script(&request)?.text;
/// assert!(text.contains("#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n"));
/// assert!(text.contains("srun --kill-on-bad-exit=1 phalanx train"));
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// Sizes that contradict each other, names and options that Slurm would misread.
pub fn script(request: &Request) -> Result<Script> {
    request.check()?;
    let mut why = Decisions::default();
    let mut text = format!("#!/bin/bash\n{MARK} Submit it again with sbatch, from the same folder.\n#\n");
    for (key, value) in header(request, &mut why) {
        let value = if value.is_empty() { value } else { format!("={}", shell::quote(&value)) };
        let _ = writeln!(text, "#SBATCH --{key}{value}");
    }
    text.push('\n');
    if !request.setup.is_empty() {
        let _ = writeln!(text, "{}\n", request.setup.join("\n"));
    }
    if let Some(sweep) = &request.sweep {
        text.push_str(&sweep.choice());
    }
    text.push_str(SECRET);
    why.note(
        "a secret for each start",
        "ranks prove by it that they are of the job; it is made where the script runs, and stands in no file",
    );
    text.push_str(&body(request, &mut why));
    Ok(Script { text, decisions: why.list() })
}

/// `#SBATCH` lines as names and values; an empty value is a switch.
fn header(r: &Request, why: &mut Decisions) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let mut add = |key: &str, value: String| lines.push((key.to_owned(), value));
    add("job-name", r.name.clone());
    add("nodes", r.nodes.to_string());
    add("ntasks-per-node", r.tasks_per_node.to_string());
    if let Some(n) = r.cpus_per_task {
        add("cpus-per-task", n.to_string());
    }
    if let Some(n) = r.gpus_per_node {
        add("gpus-per-node", n.to_string());
        why.note(
            "--gpus-per-node",
            "every rank of a node sees all its GPUs and takes the one of its local rank",
        );
    }
    if let Some(memory) = r.memory {
        add("mem", memory.slurm());
    }
    if let Some(time) = r.time {
        add("time", time.to_string());
    }
    r.options.iter().for_each(|(key, value)| add(key, value.clone()));
    if let Some(sweep) = &r.sweep {
        add("array", sweep.array());
    }
    add("signal", format!("USR1@{}", r.grace.seconds));
    why.note(
        format!("--signal=USR1@{}", r.grace.seconds),
        "ranks save when it comes and end with 130; Slurm may send it up to a minute early",
    );
    add(if r.requeue { "requeue" } else { "no-requeue" }, String::new());
    if r.requeue {
        why.note(
            "--requeue",
            "after a preemption or a lost node Slurm queues the job again under its number",
        );
    }
    add("open-mode", "append".to_owned());
    if !r.options.iter().any(|(key, _)| key == "output") {
        add("output", format!("{}-{}.log", r.name, if r.sweep.is_some() { "%A_%a" } else { "%j" }));
    }
    lines
}

fn body(r: &Request, why: &mut Decisions) -> String {
    let mut run = String::from("srun --kill-on-bad-exit=1");
    why.note("srun --kill-on-bad-exit=1", "a rank that fails before it has met the others ends them too");
    if let Some(n) = r.cpus_per_task {
        // Since Slurm 22.05 steps do not inherit it.
        let _ = write!(run, " --cpus-per-task={n}");
    }
    let _ = write!(run, " {}", shell::line(r.command.iter().map(String::as_str)));
    if r.sweep.is_some() {
        run.push_str(" \"${choice[@]}\"");
    }
    why.note(
        format!("{} restarts in the allocation", r.restarts),
        "what a rank or a link fails of is often gone the next time; waiting in the queue again is not needed for it",
    );
    let again = if r.requeue {
        why.note(
            "a node that does not answer: queued again",
            "Slurm takes minutes to find that it is dead, and would have the job fail on it meanwhile",
        );
        REQUEUE.replace("@most@", &REQUEUES_MAX.to_string())
    } else {
        "again() {\n    echo \"phalanx: submit this script again to go on\" >&2\n    exit \"$1\"\n}\n"
            .to_owned()
    };
    let counted = BODY.replace("@restarts@", &r.restarts.to_string());
    counted.replace("@again@\n", &again).replace("@run@", &run)
}

/// A secret for the ranks, unless there is one or none is wanted. Steps must be given the script's variables for it, which
/// `sbatch --export=NONE` keeps from them.
const SECRET: &str = r#"# What the ranks know of each other and nobody else does.
if [ -z "$PHALANX_SECRET$PHALANX_SECRET_FILE${PHALANX_INSECURE#0}" ]; then
    PHALANX_SECRET=$(head -c 32 /dev/urandom | od -A n -t x1 -v | tr -d ' \n')
    export PHALANX_SECRET
fi
unset SLURM_EXPORT_ENV

"#;

/// Most starts of one job: more than a run of months takes, and an end to those that get nowhere.
const REQUEUES_MAX: u32 = 1000;

const REQUEUE: &str = r#"again() {
    [ "${SLURM_RESTART_COUNT:-0}" -lt @most@ ] && scontrol requeue "$SLURM_JOB_ID"
    exit "$1"
}
"#;

/// What the script does; what stands between two @ is filled in.
const BODY: &str = r#"# scancel, a preemption, a lost node: Slurm decides what becomes of the job, and nothing is started any more.
taken=
trap 'taken=yes' TERM

# To the queue, from where the job starts again.
@again@

failures=0
while true; do
    @run@
    code=$?
    [ -n "$taken" ] && exit "$code"
    case $code in
    0 | 2) exit "$code" ;; # Done, or input that no restart mends.
    130) again "$code" ;; # Saved, because time is nearly up.
    esac
    # A node that answers is tried again; one that does not is Slurm's to replace.
    timeout 60 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true || again "$code"
    failures=$((failures + 1))
    [ "$failures" -gt @restarts@ ] && exit "$code"
    echo "phalanx: exit code $code; restart $failures of @restarts@ goes on from the newest checkpoint" >&2
    export PHALANX_RESTARTED=1
done
"#;

#[cfg(test)]
mod tests;
