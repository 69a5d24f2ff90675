//! The command line of `torchrun`, as one table: parsing, `PET_*` defaults and the help text all read it.

use crate::options::Options;
use spec::suggest::nearest;
use spec::{Error, Result};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;

/// One flag: its canonical name with dashes (underscores are accepted too).
struct Flag {
    name: &'static str,
    short: Option<char>,
    /// The value's name in the help text; `None` for a switch.
    value: Option<&'static str>,
    help: &'static str,
}

const fn flag(name: &'static str, value: Option<&'static str>, help: &'static str) -> Flag {
    Flag { name, short: None, value, help }
}

const fn short(short: char, name: &'static str, value: Option<&'static str>, help: &'static str) -> Flag {
    Flag { name, short: Some(short), value, help }
}

/// Every flag of torchrun (PyTorch 2.15, `torch/distributed/run.py`) and ours: `--signals-to-forward`, `--secret`,
/// `--insecure`, `--bind`, `--pass-exit-code`, `--hold`, and those for workers that can recover.
const FLAGS: &[Flag] = &[
    flag("nnodes", Some("N|MIN:MAX"), "number of nodes, or its range [1]"),
    flag("nproc-per-node", Some("N|auto|cpu|gpu"), "workers on this node [1]"),
    flag("standalone", None, "one node, nothing to meet (default for one)"),
    flag("rdzv-backend", Some("static|c10d"), "how nodes meet [static]"),
    flag("rdzv-endpoint", Some("HOST[:PORT]"), "where nodes meet [port 29400]"),
    flag("rdzv-id", Some("ID"), "name of the job [none]"),
    flag("rdzv-conf", Some("K=V,.."), "join_timeout, last_call_timeout, .. in seconds"),
    flag("node-rank", Some("N"), "this node's rank, for the static backend [0]"),
    flag("master-addr", Some("HOST"), "address of node rank 0 [127.0.0.1]"),
    flag("master-port", Some("PORT"), "port of node rank 0 [29500]"),
    flag("local-addr", Some("HOST"), "this node's address, as the others see it"),
    flag("secret", Some("FILE"), "the job's secret; made if there is none"),
    flag("insecure", None, "several nodes without a secret"),
    flag("bind", Some("ADDR|IFACE|SUBNET"), "which of this node's addresses to listen on"),
    flag("max-restarts", Some("N"), "restarts of the workers before giving up [0]"),
    flag("min-nproc", Some("N"), "fewest workers, if a place keeps failing [all]"),
    flag("silence-timeout", Some("SECONDS"), "a mute worker that can recover is killed [5]"),
    flag("hang-timeout", Some("SECONDS"), "a stuck worker that can recover is killed [180]"),
    flag("monitor-interval", Some("SECONDS"), "how often the nodes look at each other [0.1]"),
    flag("shutdown-timeout", Some("SECONDS"), "from SIGTERM to SIGKILL [30]"),
    flag("signals-to-handle", Some("SIG,.."), "signals that stop the job"),
    flag("signals-to-forward", Some("SIG,.."), "signals passed on [SIGUSR1,SIGUSR2]"),
    flag("role", Some("NAME"), "role of the workers [default]"),
    short('m', "module", None, "run the program as a Python module"),
    flag("no-python", None, "run the program directly, never through Python"),
    flag("run-path", None, "run the script through Python in any case"),
    flag("log-dir", Some("DIR"), "folder of the log files"),
    short('r', "redirects", Some("N|RANK:N,.."), "to files: 1 stdout, 2 stderr, 3 both [0]"),
    short('t', "tee", Some("N|RANK:N,.."), "to files and console, in the same form [0]"),
    flag("local-ranks-filter", Some("N,.."), "show only these local ranks on the console"),
    flag("log-line-prefix-template", Some("TEXT"), "prefix of tee'd lines"),
    flag("duplicate-stdout-filters", Some("TEXT,.."), "copy matching lines to filtered_stdout.log"),
    flag("duplicate-stderr-filters", Some("TEXT,.."), "copy matching lines to filtered_stderr.log"),
    flag("virtual-local-rank", None, "LOCAL_RANK=0 and one visible GPU per worker"),
    flag("pass-exit-code", None, "end with the failed worker's own exit code"),
    flag("hold", None, "after success wait for a signal to end"),
    flag("numa-binding", Some("MODE"), "accepted; workers are not bound yet"),
    flag("start-method", Some("METHOD"), "accepted; workers are always programs"),
    flag("event-log-handler", Some("NAME"), "accepted and ignored"),
    flag("logs-specs", Some("NAME"), "accepted and ignored"),
];

/// Flags that torchrun does not read from the environment.
const NOT_FROM_ENVIRONMENT: &[&str] = &["logs-specs", "numa-binding"];

/// What the command line asks for.
#[derive(Debug)]
pub enum Parsed {
    /// Print the help text.
    Help,
    /// Start `program` with `args`.
    Run {
        /// The parsed flags.
        options: Box<Options>,
        /// The program or script.
        program: OsString,
        /// Its arguments, untouched.
        args: Vec<OsString>,
    },
}

/// The values given, by canonical name; switches hold `1`.
pub(crate) struct Values(BTreeMap<&'static str, (String, Source)>);

#[derive(Clone, Copy, PartialEq)]
enum Source {
    Environment,
    CommandLine,
}

impl Values {
    /// The text of `name`, unless it was not given or is empty.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|(v, _)| v.as_str()).filter(|v| !v.is_empty())
    }

    /// Whether the switch `name` is on.
    pub(crate) fn on(&self, name: &str) -> Result<bool> {
        match self.text(name) {
            None => Ok(false),
            Some(v) => {
                v.trim().parse::<i64>().map(|n| n != 0).map_err(|_| self.bad(name, "0 or 1, being a switch"))
            }
        }
    }

    /// `name` as a number or the like; `wanted` says what would have been right.
    pub(crate) fn parse<T: std::str::FromStr>(&self, name: &str, wanted: &str) -> Result<Option<T>> {
        self.text(name).map(|v| v.trim().parse().map_err(|_| self.bad(name, wanted))).transpose()
    }

    /// The error for a wrong value of `name`, naming the flag or the variable it came from.
    pub(crate) fn bad(&self, name: &str, wanted: &str) -> Error {
        let (found, source) = self.0.get(name).map_or(("", Source::CommandLine), |(v, s)| (v.as_str(), *s));
        let place = match source {
            Source::CommandLine => format!("--{name}"),
            Source::Environment => variable(name),
        };
        Error::user(format!("{place}={found}: expected {wanted}"))
    }
}

fn variable(name: &str) -> String {
    format!("PET_{}", name.to_uppercase().replace('-', "_"))
}

impl Options {
    /// Parses torchrun's command line (without the program's own name). `env` looks up an environment variable:
    /// `PET_<FLAG>` is a flag's default.
    ///
    /// # Errors
    /// An unknown flag (with the nearest known one), a missing or wrong value, flags that contradict each other, or no
    /// program.
    pub fn parse(args: &[OsString], env: &dyn Fn(&str) -> Option<String>) -> Result<Parsed> {
        Options::parsed(args, env).map_err(|e| {
            e.hint(
                "phalanx launch --help lists the flags and what they take; each is read from PET_<FLAG> too",
            )
        })
    }

    fn parsed(args: &[OsString], env: &dyn Fn(&str) -> Option<String>) -> Result<Parsed> {
        let mut values = from_environment(env);
        let mut rest = args.iter();
        let mut program = None;
        while let Some(arg) = rest.next() {
            let Some(text) = arg.to_str().filter(|t| t.starts_with('-') && *t != "-") else {
                program = Some(arg.clone());
                break;
            };
            if text == "--" {
                program = rest.next().cloned();
                break;
            }
            if text == "-h" || text == "--help" {
                return Ok(Parsed::Help);
            }
            let (flag, inline) = split(text)?;
            let value = match (flag.value, inline) {
                (None, None) => "1".to_owned(),
                (None, Some(v)) => {
                    return Err(Error::user(format!("--{}={v}: the flag takes no value", flag.name)));
                }
                (Some(_), Some(v)) => v,
                (Some(what), None) => utf8(rest.next(), flag.name, what)?,
            };
            values.0.insert(flag.name, (value, Source::CommandLine));
        }
        let program = program.ok_or_else(|| {
            Error::user("no program to launch").hint("phalanx launch --nproc-per-node 2 train.py --lr 0.1")
        })?;
        let options = Box::new(Options::from_values(&values, env)?);
        Ok(Parsed::Run { options, program, args: rest.cloned().collect() })
    }
}

fn from_environment(env: &dyn Fn(&str) -> Option<String>) -> Values {
    let named = FLAGS.iter().filter(|f| !NOT_FROM_ENVIRONMENT.contains(&f.name));
    Values(named.filter_map(|f| env(&variable(f.name)).map(|v| (f.name, (v, Source::Environment)))).collect())
}

fn utf8(arg: Option<&OsString>, name: &str, what: &str) -> Result<String> {
    let arg = arg.ok_or_else(|| Error::user(format!("--{name} needs a value: {what}")))?;
    let text = arg.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::user(format!("--{name}: the value is not valid UTF-8: {}", show(arg))))
}

fn show(arg: &OsStr) -> String {
    arg.to_string_lossy().into_owned()
}

/// Splits one argument that begins with `-` into its flag and the value after `=` (or glued to a short flag).
fn split(text: &str) -> Result<(&'static Flag, Option<String>)> {
    if let Some(long) = text.strip_prefix("--") {
        let (name, value) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v.to_owned())));
        return Ok((find(name)?, value));
    }
    let mut letters = text.chars();
    let letter = letters.by_ref().nth(1);
    let found = FLAGS.iter().find(|f| f.short.is_some() && f.short == letter);
    let glued = letters.as_str();
    let value = (!glued.is_empty()).then(|| glued.strip_prefix('=').unwrap_or(glued).to_owned());
    found.map(|f| (f, value)).ok_or_else(|| unknown(text, text.trim_start_matches('-')))
}

/// A flag by its name in either spelling, or by a prefix that only one flag has, as argparse does.
fn find(name: &str) -> Result<&'static Flag> {
    let dashed = name.replace('_', "-");
    if let Some(exact) = FLAGS.iter().find(|f| f.name == dashed) {
        return Ok(exact);
    }
    let mut candidates = FLAGS.iter().filter(|f| !dashed.is_empty() && f.name.starts_with(&dashed));
    match (candidates.next(), candidates.next()) {
        (Some(only), None) => Ok(only),
        (Some(one), Some(two)) => {
            Err(Error::user(format!("--{name} may mean --{} or --{}", one.name, two.name)))
        }
        _ => Err(unknown(&format!("--{name}"), &dashed)),
    }
}

fn unknown(shown: &str, name: &str) -> Error {
    let error = Error::user(format!("unknown flag {shown}"));
    match nearest(name, FLAGS.iter().map(|f| f.name)) {
        Some(near) => error.hint(format!("did you mean --{near}?")),
        None => {
            error.hint("phalanx launch --help lists the flags; the program's own flags follow the program")
        }
    }
}

/// The help text of `phalanx launch`: at most 80 columns.
pub fn help() -> String {
    let mut text = String::from(
        "Start a program on several ranks, under the contract of PyTorch's torchrun.\n\n\
         Usage: phalanx launch [flags] PROGRAM [arguments]\n       \
         phalanx launch --nproc-per-node 2 train.py --lr 0.1\n       \
         phalanx launch --nnodes 2 --node-rank 0 --master-addr head train.py\n       \
         phalanx launch slurm --help, phalanx launch kubernetes --help\n\nFlags:\n",
    );
    for f in FLAGS {
        let short = f.short.map_or(String::new(), |s| format!("-{s}, "));
        let left = format!("{short}--{} {}", f.name, f.value.unwrap_or(""));
        if left.len() > 30 {
            let _ = writeln!(text, "  {left}\n  {:30} {}", "", f.help);
        } else {
            let _ = writeln!(text, "  {left:30} {}", f.help);
        }
    }
    text.push_str(
        "\nEach flag is also read from PET_<FLAG>, and may be spelled with underscores.\n\
         Exit status: 0 all workers succeeded, 1 a worker or the job failed, 2 wrong\n\
         input, 128+n stopped by signal n.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, env: &[(&str, &str)]) -> Result<Parsed> {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let env: BTreeMap<String, String> = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Options::parse(&args, &|k| env.get(k).cloned())
    }

    fn check(line: &str, env: &[(&str, &str)], seen: impl Fn(&Options) -> String, expected: &str) {
        match parse(line, env) {
            Ok(Parsed::Run { options, .. }) => assert_eq!(seen(&options), expected, "{line}"),
            other => panic!("{line}: {other:?}"),
        }
    }

    fn check_error(line: &str, what: &str, hint: &str) {
        let error = parse(line, &[]).expect_err(line);
        assert!(error.to_string().contains(what), "{line}: {error}");
        assert!(error.hint_text().unwrap_or("").contains(hint), "{line}: {:?}", error.hint_text());
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn both_spellings_and_both_forms_and_the_environment() {
        let nproc = |o: &Options| format!("{:?}", o.nproc);
        check("--nproc-per-node 2 x", &[], nproc, "Count(2)");
        check("--nproc_per_node=3 x", &[], nproc, "Count(3)");
        check("--nproc 3 x", &[], nproc, "Count(3)");
        check("x", &[("PET_NPROC_PER_NODE", "4")], nproc, "Count(4)");
        check("--nproc_per_node 5 x", &[("PET_NPROC_PER_NODE", "4")], nproc, "Count(5)");
        check("--nproc-per-node gpu x", &[], nproc, "Gpu");
        let nodes = |o: &Options| format!("{}:{}", o.min_nodes, o.max_nodes);
        check("--nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint h x", &[], nodes, "2:4");
        check("x", &[("PET_NNODES", "3"), ("PET_NODE_RANK", "2")], nodes, "3:3");
        check(
            "-r 3 -t1 x",
            &[],
            |o| format!("{:?} {:?}", o.redirects.of(7), o.tee.of(0)),
            "(true, true) (true, false)",
        );
        check(
            "-r 0:1,1:2 x",
            &[],
            |o| format!("{:?} {:?}", o.redirects.of(1), o.redirects.of(2)),
            "(false, true) (false, false)",
        );
        check("--standalone x", &[("PET_STANDALONE", "0")], |o| o.standalone.to_string(), "true");
        check("x", &[("PET_STANDALONE", "1")], |o| o.standalone.to_string(), "true");
    }

    #[test]
    fn everything_after_the_program_is_its_own() {
        let Ok(Parsed::Run { program, args, .. }) =
            parse("--nproc-per-node 2 -- t.py --nproc-per-node 9 -- -x", &[])
        else {
            panic!("parses");
        };
        assert_eq!(program, "t.py");
        assert_eq!(args, ["--nproc-per-node", "9", "--", "-x"]);
    }

    #[test]
    fn wrong_input_says_what_and_how_to_mend_it() {
        check_error("--nproc-pre-node 2 x", "unknown flag --nproc-pre-node", "--nproc-per-node");
        check_error("--max_restart=1x y", "--max-restarts=1x: expected", "");
        check_error("-z x", "unknown flag -z", "--help");
        check_error("--nproc-per-node", "needs a value", "");
        check_error("--nproc-per-node 0 x", "--nproc-per-node=0", "--help");
        check_error("--master-port zz x", "--master-port=zz", "--help");
        check_error("--nnodes 3:2 x", "--nnodes=3:2", "");
        check_error("--nnodes 0 x", "--nnodes=0", "");
        check_error("--log x y", "may mean --log-dir or --log-line-prefix-template", "");
        check_error("--standalone=2 x", "takes no value", "");
        check_error("--rdzv-backend etcd x", "etcd", "c10d");
        check_error("--rdzv-conf join_timeout x", "--rdzv-conf", "");
        check_error("--rdzv-conf joint_timeout=3 x", "joint_timeout", "join_timeout");
        check_error("-m --no-python x", "--no-python", "");
        check_error("-r 4 x", "--redirects=4", "");
        check_error("--nnodes 2 --node-rank 2 x", "--node-rank=2", "--help");
        check_error("--node-rank 5 x", "--node-rank=5: expected a rank below --nnodes=1", "--help");
        check_error("--nproc-per-node 2 --local-ranks-filter 0,9 x", "--local-ranks-filter=0,9", "");
        check_error("--nproc-per-node 2 --min-nproc 4 x", "--min-nproc=4: expected", "");
        check_error("--nnodes 1:2 --rdzv-backend c10d x", "--rdzv-endpoint", "");
        check_error("--signals-to-handle SIGTREM x", "SIGTREM", "SIGTERM");
        check_error("--signals-to-handle SIGKILL x", "SIGKILL", "");
        check_error("--standalone --nnodes 2 x", "--nnodes=2: expected 1 with --standalone", "");
        check_error("", "no program", "phalanx launch");
        assert!(matches!(parse("--help", &[]), Ok(Parsed::Help)));
        assert!(help().lines().all(|l| l.len() <= 80), "help fits 80 columns");
    }
}
