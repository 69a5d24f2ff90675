//! Manifests against what an API server would refuse: the definitions of custom resources with their rules in CEL, and a
//! strict validator for the rest, where `.ci/kubernetes` has brought them.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::refused;
use crate::common::{Lab, tiny};

const KINDS: [&str; 4] = ["job", "jobset", "trainjob", "leaderworkerset"];

fn args(kind: &str, flags: &str) -> String {
    let train = tiny("run", "");
    format!("launch kubernetes --kind {kind} --image ghcr.io/you/phalanx:0.1.0 --nodes 2 {flags} -- {train}")
}

/// Flags that use everything there is.
const ALL: &str = "--ranks-per-node 2 --gpus-per-node 2 --cpus-per-node 8 --memory 64GiB --shm 16GiB --namespace lab \
                   --storage 1TiB --storage-class fast --env A=1 --secret-env TOKEN=hub/token --pull-secret pull \
                   --node-label gpu=h100 --queue big --restarts 5 --grace 5m --silence 1h";

struct Validator {
    script: PathBuf,
    python: PathBuf,
    crds: PathBuf,
}

impl Validator {
    fn found() -> Option<Validator> {
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository");
        let dir = root.join("target/kubernetes");
        let (python, crds) = (dir.join("python"), dir.join("crds"));
        if !python.is_dir() {
            eprintln!("skipped: nothing validates manifests here; .ci/kubernetes brings what does");
            return None;
        }
        Some(Validator { script: root.join("tests/kubernetes/check.py"), python, crds })
    }

    fn knows(&self, kind: &str) -> bool {
        let is_known = kind == "job" || self.crds.is_dir();
        if !is_known {
            eprintln!("skipped: no definition of {kind} here; .ci/kubernetes brings it");
        }
        is_known
    }

    /// What is wrong with each of the manifests, if anything.
    fn problems(&self, lab: &Lab, texts: &[String]) -> Vec<Option<String>> {
        let files: Vec<PathBuf> = (0..texts.len()).map(|i| lab.path(&format!("manifest-{i}.yaml"))).collect();
        texts.iter().enumerate().for_each(|(i, text)| lab.write(&format!("manifest-{i}.yaml"), text));
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &self.python).arg(&self.script).arg(&self.crds).args(&files);
        let output = command.output().expect("start python3");
        let out = String::from_utf8_lossy(&output.stdout);
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 1)) && err.is_empty(), "{err}");
        let of = |file: &PathBuf| {
            let prefix = format!("{}:", file.display());
            let lines: Vec<&str> = out.lines().filter(|l| l.starts_with(&prefix)).collect();
            (!lines.is_empty()).then(|| lines.join("\n"))
        };
        files.iter().map(of).collect()
    }
}

#[test]
fn manifests_are_what_clusters_accept() {
    let Some(validator) = Validator::found() else { return };
    let lab = Lab::new();
    let mut texts = Vec::new();
    for kind in KINDS.into_iter().filter(|kind| validator.knows(kind)) {
        let time = if kind == "leaderworkerset" { "" } else { "--time 4h" };
        let all = format!("{ALL} {time}");
        texts.extend(["", &all, "--claim runs"].map(|flags| lab.ok(&args(kind, flags))));
    }
    for (found, text) in validator.problems(&lab, &texts).iter().zip(&texts) {
        assert_eq!(*found, None, "{text}");
    }
}

/// Each mistake is one replacement in a good manifest: what stands there, what instead, and what is said of it.
fn planted(kind: &str, flags: &str, mistakes: &[(&str, &str, &str)]) {
    let Some(validator) = Validator::found().filter(|v| v.knows(kind)) else { return };
    let lab = Lab::new();
    let text = lab.ok(&args(kind, flags));
    let broken = mistakes.iter().map(|(from, to, _)| {
        assert!(text.contains(from), "{kind}: no {from} in {text}");
        text.replacen(from, to, 1)
    });
    let found = validator.problems(&lab, &broken.collect::<Vec<_>>());
    for (found, (_, to, words)) in found.iter().zip(mistakes) {
        assert!(found.as_ref().is_some_and(|f| f.contains(words)), "{kind}, {to}: {found:?}");
    }
}

#[test]
fn mistakes_in_a_pod_are_noticed_in_every_kind() {
    let mistakes = [
        ("terminationGracePeriodSeconds: 300", "terminationGracePeriodSeconds: 5m", "5m"),
        ("runAsNonRoot: true", "runAsNonRoots: true", "runAsNonRoots"),
        ("mountPath: /dev/shm", "path: /dev/shm", "mountPath"),
        ("medium: Memory", "medium: [Memory]", "Memory"),
        ("drop:", "dropp:", "dropp"),
    ];
    KINDS.into_iter().for_each(|kind| planted(kind, ALL, &mistakes));
}

#[test]
fn mistakes_in_what_keeps_the_pods_are_noticed() {
    let job = [
        ("completions: 2", "completions: two", "two"),
        ("podFailurePolicy:", "podFailurePolicies:", "podFailurePolicies"),
        ("clusterIP: None", "clusterIp: None", "clusterIp"),
        ("accessModes:", "accessMode:", "accessMode"),
    ];
    planted("job", ALL, &job);
    let set = [
        ("maxRestarts: 5", "maxRestarts: many", "many"),
        ("action: FailJobSet", "action: FailJobs", "FailJobs"),
        ("replicas: 1\n    template:", "replicas: 1\n    templates:", "template"),
    ];
    planted("jobset", ALL, &set);
    let group = [
        ("restartPolicy: RecreateGroupOnPodRestart", "restartPolicy: Never", "Never"),
        ("size: 2", "size: two", "two"),
    ];
    planted("leaderworkerset", ALL, &group);
    planted("trainjob", ALL, &[("runtimeRef:", "runtime:", "runtime")]);
}

/// Rules that no schema holds, written in CEL by those who define the resource.
#[test]
fn forbidden_combinations_are_noticed() {
    let job = [
        ("torch: {}", "torch: {}\n    jax: {}", "Only one of the policy"),
        ("numProcPerNode: 2", "numProcPerNode: 0", "greater than or equal to 1"),
    ];
    planted("trainjob", ALL, &job);
    let ordered = "spec:\n  startupPolicy: {startupPolicyOrder: InOrder}\n  network:";
    let dependent = "- name: node\n    dependsOn: [{name: node, status: Ready}]\n";
    let Some(validator) = Validator::found().filter(|v| v.knows("jobset")) else { return };
    let lab = Lab::new();
    let text = lab.ok(&args("jobset", "")).replacen("spec:\n  network:", ordered, 1);
    let both = text.replacen("- name: node\n", dependent, 1);
    let found = validator.problems(&lab, &[text, both]);
    assert_eq!(found[0], None, "an order alone is fine");
    assert!(found[1].as_ref().is_some_and(|f| f.contains("DependsOn")), "{found:?}");
}

#[test]
fn what_cannot_be_asked_of_kubernetes_is_refused_at_once() {
    let lab = Lab::new();
    let train = tiny("run", "");
    refused(&lab, &format!("launch kubernetes -- {train}"), "--image is missing");
    refused(&lab, &format!("launch kubernetes --image a:latest -- {train}"), "names no version");
    refused(&lab, "launch kubernetes --image a:1 -- sleep 5", "sleep behind --");
    let asked = |flags: &str, words: &str| refused(&lab, &args("job", flags), words);
    refused(&lab, &args("pod", ""), "pod");
    asked("--name My_Run", "--name=My_Run");
    asked("--memory 4", "--memory=4");
    asked("--memory 4GB --shm 4GB", "leaves nothing");
    asked("--storage 1XB", "--storage=1XB");
    asked("--grace soon", "--grace=soon");
    asked("--secret-env TOKEN=hf_abc", "--secret-env TOKEN=...");
    asked("--env A", "--env A: expected NAME=VALUE");
    asked("--ranks-per-node 3", "6 ranks");
    asked("--claim a --storage 1GiB", "cannot be used with");
}

#[test]
fn a_run_file_goes_along() {
    let lab = Lab::new();
    lab.write("my run.toml", "[train]\nsteps = 5\n");
    let args = "launch kubernetes --image a:1 -- train".split(' ');
    let output = lab.command("").args(args).arg("my run.toml").output().expect("start the program");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("run.toml: |\n    [train]\n    steps = 5\n"), "{text}");
    assert!(text.contains("- /etc/phalanx/run.toml\n"), "{text}");
    let json = lab.json("launch kubernetes --image a:1 --json -- train");
    assert!(json["manifests"].as_str().is_some_and(|m| m.contains("kind: Job")));
}
