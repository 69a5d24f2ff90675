//! `phalanx launch slurm`, `phalanx launch kubernetes`: requests from flags, scripts to files and to `sbatch`.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use ::clusters::quantity::Bare;
use ::clusters::slurm::{Axis, Sweep};
use ::clusters::{Decision, Memory, Time, kubernetes, slurm};
use clap::Parser as _;
use serde_json::json;
use spec::{Error, Result, RunSpec};

use crate::args::{self, Args, Train};
use crate::{files, output, train, usage};

/// `phalanx launch`: the first word may be a cluster's, else it is torchrun's command line.
pub(crate) fn launch(words: Vec<OsString>) -> Result<u8> {
    let of_cluster = words.first().and_then(|word| word.to_str());
    match of_cluster {
        Some("slurm") => usage::parse(words)?.map_or_else(Ok, |args| on_slurm(&args)),
        Some("kubernetes") => usage::parse(words)?.map_or_else(Ok, |args| on_kubernetes(&args)),
        _ => Ok(u8::try_from(launch::cli(words)).unwrap_or(1)),
    }
}

fn on_slurm(args: &args::Slurm) -> Result<u8> {
    let script = slurm::script(&slurm_request(args)?)?;
    if args.dry_run {
        let shown = json!({"script": script.text, "decisions": script.decisions});
        output::print(&if args.json { shown.to_string() } else { script.text });
        return Ok(0);
    }
    let path = args.script.clone().unwrap_or_else(|| format!("{}.sbatch", args.job_name).into());
    keep_others(&path)?;
    let was_there = path.exists();
    files::write("--script", &path, &script.text)?;
    let job = submit(&path).inspect_err(|e| {
        // Refused: the next try writes another. One that could not be submitted from here is for a login node.
        if e.to_string().starts_with("sbatch refused") && !was_there {
            let _ = std::fs::remove_file(&path);
        }
    })?;
    let shown = json!({"job": job, "script": path.display().to_string(), "decisions": script.decisions});
    output::print(&if args.json { shown.to_string() } else { job.clone() });
    output::say(&format!("submitted {}; squeue -j {job} shows it, scancel {job} ends it", path.display()));
    Ok(0)
}

fn slurm_request(args: &args::Slurm) -> Result<slurm::Request> {
    let memory = args.mem.as_deref().map(|text| Memory::parse("--mem", text, Bare::Binary)).transpose()?;
    let time = args.time.as_deref().map(|text| Time::parse("--time", text)).transpose()?;
    let tasks_per_node = tasks_per_node(args)?;
    let world = args.nodes.saturating_mul(tasks_per_node).max(1);
    let what = what(&args.command, world)?;
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let mut command = vec![utf8(program.into_os_string())?];
    command.extend(what.words);
    let axes = args.sweep.iter().map(|text| Axis::parse(text)).collect::<Result<Vec<_>>>()?;
    let run_dir = what.run.run.dir.display().to_string();
    let sweep = (!axes.is_empty()).then(|| Sweep::new(axes, run_dir, args.at_once)).transpose()?;
    if let Some(sweep) = &sweep {
        check_sweep(&what.args, sweep, world)?;
    }
    Ok(slurm::Request {
        nodes: args.nodes,
        tasks_per_node,
        gpus_per_node: args.gpus_per_node,
        cpus_per_task: args.cpus_per_task,
        memory,
        time,
        grace: Time::parse("--grace", &args.grace)?,
        options: slurm_options(args),
        requeue: !args.no_requeue,
        restarts: args.restarts,
        setup: args.setup.clone(),
        sweep,
        ..slurm::Request::new(args.job_name.as_str(), command)
    })
}

/// Refuses a sweep now of which a run would be refused after the queue.
fn check_sweep(args: &Train, sweep: &Sweep, world: usize) -> Result<()> {
    for set in sweep.runs() {
        let mut args = args.clone();
        let said = set.iter().filter(|key| !key.starts_with("run.dir=")).map(String::as_str);
        let said = format!("--sweep: the run with {}", said.collect::<Vec<_>>().join(" "));
        args.run.set.extend(set);
        train::load(&args, world).map_err(|e| e.context(said))?;
    }
    Ok(())
}

/// What the flags say of ranks on a node; they may say it twice, but not differently.
fn tasks_per_node(args: &args::Slurm) -> Result<usize> {
    let nodes = args.nodes.max(1);
    let Some(all) = args.ntasks else {
        return Ok(args.ntasks_per_node.or(args.gpus_per_node).unwrap_or(1));
    };
    if !all.is_multiple_of(nodes) || all == 0 {
        return Err(Error::user(format!("--ntasks={all} does not divide over --nodes={}", args.nodes))
            .hint("give --ntasks-per-node instead"));
    }
    match args.ntasks_per_node.filter(|each| *each != all / nodes) {
        Some(each) => Err(Error::user(format!(
            "--ntasks={all} contradicts --nodes={} with --ntasks-per-node={each}, which are {}",
            args.nodes,
            args.nodes * each
        ))
        .hint("leave --ntasks out")),
        None => Ok(all / nodes),
    }
}

fn slurm_options(args: &args::Slurm) -> Vec<(String, String)> {
    let named = [
        ("partition", &args.partition),
        ("account", &args.account),
        ("qos", &args.qos),
        ("constraint", &args.constraint),
        ("output", &args.output),
    ];
    let named = named.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?)));
    let others = args.sbatch.iter().map(|text| {
        let text = text.trim_start_matches("--");
        text.split_once('=').map_or((text.to_owned(), String::new()), |(k, v)| (k.to_owned(), v.to_owned()))
    });
    named.chain(others).collect()
}

/// A file of this name that we did not write stays.
fn keep_others(path: &Path) -> Result<()> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.contains(slurm::MARK) => {
            Err(Error::user(format!("{} is there and was not written by this command", path.display()))
                .hint("--script gives another name"))
        }
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::user(format!("{} is there and is no script", path.display()))
                .hint("--script gives another name"))
        }
        _ => Ok(()),
    }
}

fn submit(path: &Path) -> Result<String> {
    let asked = Command::new("sbatch").arg("--parsable").arg(path).stdin(Stdio::null()).output();
    let asked = asked.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::user("sbatch is not here: this machine submits to no Slurm")
            .hint(format!(
                "{} is written; submit it on a login node, or look at it with --dry-run",
                path.display()
            )),
        _ => Error::failure(format!("start sbatch: {e}")),
    })?;
    let (out, err) = (String::from_utf8_lossy(&asked.stdout), String::from_utf8_lossy(&asked.stderr));
    // `JOB` or `JOB;CLUSTER`.
    let job = out.trim().split(';').next().unwrap_or_default();
    if asked.status.success() && !job.is_empty() {
        return Ok(job.to_owned());
    }
    let words: Vec<&str> =
        err.lines().map(|l| l.trim_start_matches("sbatch: ").trim_start_matches("error: ")).collect();
    let words = words.join("; ");
    let away = ["Unable to contact", "Connection refused", "Socket timed out"];
    let error = format!("sbatch refused {}: {words}", path.display());
    Err(if away.iter().any(|w| words.contains(w)) {
        Error::failure(error).hint("sinfo shows whether the controller answers")
    } else {
        Error::user(error).hint("sinfo shows partitions, sacctmgr accounts; change the flag and submit again")
    })
}

fn on_kubernetes(args: &args::Kubernetes) -> Result<u8> {
    let manifests = kubernetes::manifests(&kubernetes_request(args)?)?;
    let text = manifests.text();
    let decisions: &[Decision] = &manifests.decisions;
    if args.json {
        output::print(&json!({"manifests": text, "decisions": decisions}).to_string());
    } else {
        output::print(&text);
        decisions.iter().for_each(|d| output::say(&format!("{}: {}", d.what, d.why)));
    }
    Ok(0)
}

fn kubernetes_request(args: &args::Kubernetes) -> Result<kubernetes::Request> {
    let image = args.image.as_deref().ok_or_else(|| {
        Error::user("--image is missing: pods run from an image").hint(
            "build one from the Containerfile, push it, and give its name: --image ghcr.io/you/phalanx:0.1.0",
        )
    })?;
    let amount = |flag: &str, text: &str| Memory::parse(flag, text, Bare::Decimal);
    let time = |flag: &str, text: &str| Time::parse(flag, text);
    let memory = amount("--memory", &args.memory)?;
    let a_quarter = Memory { bytes: memory.bytes / 4 };
    let ranks_per_node = args.ranks_per_node.or(args.gpus_per_node).unwrap_or(1);
    let mut what = what(&args.command, args.nodes.saturating_mul(ranks_per_node).max(1))?;
    let run_file = bring(&mut what)?;
    let mut command = vec!["phalanx".to_owned()];
    command.extend(what.words);
    let kind = match args.kind {
        args::KubernetesKind::Job => kubernetes::Kind::Job,
        args::KubernetesKind::Jobset => kubernetes::Kind::JobSet,
        args::KubernetesKind::Trainjob => kubernetes::Kind::TrainJob,
        args::KubernetesKind::Leaderworkerset => kubernetes::Kind::LeaderWorkerSet,
    };
    Ok(kubernetes::Request {
        namespace: args.namespace.clone(),
        pull_secret: args.pull_secret.clone(),
        nodes: args.nodes,
        ranks_per_node,
        gpus_per_node: args.gpus_per_node,
        cpus_per_node: args.cpus_per_node.unwrap_or(ranks_per_node),
        memory,
        shared_memory: args.shm.as_deref().map_or(Ok(a_quarter), |text| amount("--shm", text))?,
        storage: match &args.claim {
            Some(claim) => kubernetes::Storage::Claim(claim.clone()),
            None => kubernetes::Storage::New {
                size: amount("--storage", &args.storage)?,
                class: args.storage_class.clone(),
            },
        },
        time: args.time.as_deref().map(|text| time("--time", text)).transpose()?,
        grace: time("--grace", &args.grace)?,
        restarts: args.restarts,
        silence: Some(time("--silence", &args.silence)?),
        env: pairs("--env", &args.env)?,
        secrets: args.secret_env.iter().map(|text| kubernetes::Secret::parse(text)).collect::<Result<_>>()?,
        node_labels: pairs("--node-label", &args.node_label)?,
        queue: args.queue.clone(),
        run_dir: what.run.run.dir.display().to_string(),
        run_file,
        ..kubernetes::Request::new(kind, args.name.as_str(), image, command)
    })
}

fn pairs(flag: &str, texts: &[String]) -> Result<Vec<(String, String)>> {
    let pair = |text: &String| {
        let parts = text.split_once('=').filter(|(name, _)| !name.is_empty());
        parts
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .ok_or_else(|| Error::user(format!("{flag} {text}: expected NAME=VALUE")))
    };
    texts.iter().map(pair).collect()
}

/// The run file as a part of the manifest; its argument becomes the path in the pod.
fn bring(what: &mut What) -> Result<Option<kubernetes::RunFile>> {
    let Some(path) = what.args.run.file.clone() else { return Ok(None) };
    let text = files::read(&path)?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("run.toml").to_owned();
    let is_key = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let name = if name.chars().all(is_key) { name } else { "run.toml".to_owned() };
    let given = utf8(path.into_os_string())?;
    let at = what.words.iter().position(|word| *word == given);
    if let Some(word) = at.and_then(|at| what.words.get_mut(at)) {
        *word = kubernetes::Request::run_file_path(&name);
    }
    Ok(Some(kubernetes::RunFile { name, text }))
}

/// What is to be trained.
struct What {
    /// `train` and its arguments.
    words: Vec<String>,
    args: Train,
    run: RunSpec,
}

/// Reads the command that every rank will run, and the run file for `world` ranks: what it would be refused for after
/// hours in a queue, it is refused for now.
fn what(words: &[String], world: usize) -> Result<What> {
    let words = match words {
        [first, rest @ ..] if first == "phalanx" => rest,
        all => all,
    };
    let expected = |found: &str| {
        Error::user(format!("{found} behind --: expected train and its arguments"))
            .hint("phalanx launch slurm --nodes 2 -- train RUN.toml")
    };
    if words.first().map(String::as_str) != Some("train") {
        return Err(expected(words.first().map_or("nothing", String::as_str)));
    }
    let all = std::iter::once("phalanx").chain(words.iter().map(String::as_str));
    let args = match Args::try_parse_from(all).map(|args| args.command) {
        Ok(args::Command::Train(args)) => args,
        Ok(_) => return Err(expected("another command")),
        Err(e) => return Err(usage::refusal(&e.render().to_string()).context("train")),
    };
    if let Some(nproc) = args.nproc {
        return Err(Error::user(format!("train --nproc {nproc}: the cluster starts the ranks"))
            .hint("leave --nproc out; --ntasks-per-node, or --ranks-per-node, says how many"));
    }
    let run = train::load(&args, world)?;
    Ok(What { words: words.to_vec(), args, run })
}

fn utf8(path: OsString) -> Result<String> {
    path.into_string().map_err(|path| Error::user(format!("{} is not UTF-8", path.display())))
}
