use super::*;
use crate::{Memory, Time};
use proptest::prelude::*;
use spec::Error;

const KINDS: [Kind; 4] = [Kind::Job, Kind::JobSet, Kind::TrainJob, Kind::LeaderWorkerSet];

fn base(kind: Kind) -> Request {
    let train = ["phalanx", "train", "--set", "train.steps=5"].map(String::from).to_vec();
    Request {
        nodes: 4,
        ranks_per_node: 2,
        silence: Some(Time { seconds: 1800 }),
        ..Request::new(kind, "mine", "ghcr.io/you/phalanx:0.1.0", train)
    }
}

fn document(made: &Manifests, kind: &str) -> Yaml {
    let is_it = |d: &&Yaml| d.at("kind") == Some(&Yaml::from(kind));
    made.documents.iter().find(is_it).unwrap_or_else(|| panic!("no {kind}")).clone()
}

/// The specification of the pods, wherever the kind keeps it.
fn pod(made: &Manifests, kind: Kind) -> Yaml {
    let (kind, path) = match kind {
        Kind::Job => ("Job", "spec.template.spec"),
        Kind::JobSet => ("JobSet", "spec.replicatedJobs.0.template.spec.template.spec"),
        Kind::TrainJob => {
            ("TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.spec.template.spec")
        }
        Kind::LeaderWorkerSet => ("LeaderWorkerSet", "spec.leaderWorkerTemplate.workerTemplate.spec"),
    };
    document(made, kind).at(path).unwrap_or_else(|| panic!("no {path}")).clone()
}

fn strings(list: Option<&Yaml>) -> Vec<String> {
    let Some(Yaml::List(values)) = list else { panic!("a list, found {list:?}") };
    values.iter().map(|v| if let Yaml::Text(text) = v { text.clone() } else { format!("{v:?}") }).collect()
}

/// The value or the source of a variable of the container.
fn variable(pod: &Yaml, name: &str) -> Option<String> {
    let Some(Yaml::List(env)) = pod.at("containers.0.env") else { panic!("variables") };
    let found = env.iter().find(|v| v.at("name") == Some(&Yaml::from(name)))?;
    let source = ["value", "valueFrom.fieldRef.fieldPath", "valueFrom.secretKeyRef.name"];
    let value = source.into_iter().find_map(|path| found.at(path))?;
    if let Yaml::Text(text) = value { Some(text.clone()) } else { None }
}

#[test]
fn every_kind_has_a_pod_that_may_do_little_and_keeps_its_run() {
    for kind in KINDS {
        let made = manifests(&base(kind)).unwrap();
        let pod = pod(&made, kind);
        let at = |path: &str| pod.at(path).unwrap_or_else(|| panic!("{kind:?}: no {path}")).clone();
        assert_eq!(at("securityContext.runAsNonRoot"), Yaml::from(true));
        assert_eq!(at("containers.0.securityContext.allowPrivilegeEscalation"), Yaml::from(false));
        assert_eq!(at("containers.0.securityContext.readOnlyRootFilesystem"), Yaml::from(true));
        assert_eq!(strings(pod.at("containers.0.securityContext.capabilities.drop")), ["ALL"]);
        assert_eq!(at("terminationGracePeriodSeconds"), Yaml::from(120_usize));
        assert_eq!(at("containers.0.resources.limits"), at("containers.0.resources.requests"));
        assert_eq!(at("volumes.0.persistentVolumeClaim.claimName"), Yaml::from("mine-runs"));
        assert_eq!(at("volumes.1.emptyDir.medium"), Yaml::from("Memory"));
        assert_eq!(at("containers.0.volumeMounts.1.mountPath"), Yaml::from("/dev/shm"));
        let args = strings(pod.at("containers.0.args"));
        let agent = ["launch", "--no-python", "--pass-exit-code", "--shutdown-timeout=115"];
        assert_eq!(args[..4], agent);
        assert!(
            args.ends_with(&["phalanx", "train", "--set", "train.steps=5"].map(String::from)),
            "{args:?}"
        );
        assert_eq!(args.contains(&"--hold".to_owned()), kind == Kind::LeaderWorkerSet);
        let alive = strings(pod.at("containers.0.livenessProbe.exec.command"));
        assert_eq!(alive, ["phalanx", "alive", "runs/default", "--within", "1800s"]);
        assert_eq!(at("containers.0.startupProbe.failureThreshold"), Yaml::from(60_usize));
        assert!(made.decisions.iter().all(|d| !d.what.is_empty() && !d.why.is_empty()), "{kind:?}");
    }
}

#[test]
fn pods_learn_their_place() {
    let check = |kind: Kind, expected: Option<(&str, &str)>| {
        let made = manifests(&base(kind)).unwrap();
        let pod = pod(&made, kind);
        let found = variable(&pod, "PET_MASTER_ADDR").zip(variable(&pod, "PET_NODE_RANK"));
        assert_eq!(found, expected.map(|(a, i)| (a.to_owned(), i.to_owned())), "{kind:?}");
        let counts = variable(&pod, "PET_NNODES").zip(variable(&pod, "PET_NPROC_PER_NODE"));
        assert_eq!(counts, expected.map(|_| ("4".to_owned(), "2".to_owned())), "{kind:?}");
    };
    let index = "metadata.annotations['batch.kubernetes.io/job-completion-index']";
    check(Kind::Job, Some(("mine-0.mine", index)));
    check(Kind::JobSet, Some(("mine-node-0-0.mine", index)));
    let worker = "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']";
    check(Kind::LeaderWorkerSet, Some(("$(LWS_LEADER_ADDRESS)", worker)));
    // The Trainer sets them.
    check(Kind::TrainJob, None);
    let made = manifests(&base(Kind::TrainJob)).unwrap();
    assert_eq!(document(&made, "TrainJob").at("spec.trainer.numProcPerNode"), Some(&Yaml::from(2_usize)));

    let service = document(&manifests(&base(Kind::Job)).unwrap(), "Service");
    assert_eq!(service.at("spec.clusterIP"), Some(&Yaml::from("None")));
    assert_eq!(service.at("spec.publishNotReadyAddresses"), Some(&Yaml::from(true)));
}

#[test]
fn agents_of_several_nodes_are_given_a_secret() {
    let check = |change: &dyn Fn(&mut Request), expected: Option<&str>| {
        for kind in KINDS {
            let mut request = base(kind);
            change(&mut request);
            let made = manifests(&request).unwrap();
            assert_eq!(variable(&pod(&made, kind), "PHALANX_SECRET").as_deref(), expected, "{kind:?}");
            let says = made.decisions.iter().any(|d| d.what.contains("the secret mine-secret"));
            assert_eq!(says, expected == Some("mine-secret"), "{kind:?}");
        }
    };
    check(&|_| {}, Some("mine-secret"));
    check(&|r| r.nodes = 1, None);
    check(&|r| r.secrets = vec![Secret::parse("PHALANX_SECRET=ours/key").unwrap()], Some("ours"));
    check(&|r| r.env = vec![("PHALANX_SECRET_FILE".into(), "/data/job.secret".into())], None);
    check(&|r| r.env = vec![("PHALANX_INSECURE".into(), "1".into())], None);
}

#[test]
fn exit_codes_tell_wrong_input_from_a_failure() {
    let job = document(&manifests(&base(Kind::Job)).unwrap(), "Job");
    assert_eq!(job.at("spec.backoffLimit"), Some(&Yaml::from(12_usize)));
    let rule = |i: usize, path: &str| job.at(&format!("spec.podFailurePolicy.rules.{i}.{path}")).cloned();
    assert_eq!(rule(0, "action"), Some(Yaml::from("FailJob")));
    assert_eq!(rule(0, "onExitCodes.values"), Some(Yaml::from([2_usize])));
    assert_eq!(rule(0, "onExitCodes.containerName"), job.at("spec.template.spec.containers.0.name").cloned());
    assert_eq!(rule(1, "action"), Some(Yaml::from("Ignore")));
    let set = document(&manifests(&base(Kind::JobSet)).unwrap(), "JobSet");
    let rule = |i: usize| set.at(&format!("spec.failurePolicy.rules.{i}.action")).cloned();
    assert_eq!(set.at("spec.failurePolicy.maxRestarts"), Some(&Yaml::from(3_usize)));
    assert_eq!(rule(0), Some(Yaml::from("RestartJobSetAndIgnoreMaxRestarts")));
    assert_eq!(rule(1), Some(Yaml::from("FailJobSet")));
}

#[test]
fn what_was_asked_for_is_in_the_manifest() {
    let request = Request {
        namespace: Some("lab".into()),
        gpus_per_node: Some(8),
        time: Some(Time { seconds: 7200 }),
        storage: Storage::New { size: Memory { bytes: 1 << 40 }, class: Some("fast".into()) },
        env: vec![("A".into(), "1".into())],
        secrets: vec![Secret::parse("HF_TOKEN=hub/token").unwrap()],
        node_labels: vec![("gpu".into(), "h100".into())],
        queue: Some("big".into()),
        pull_secret: Some("pull".into()),
        run_file: Some(RunFile { name: "run.toml".into(), text: "[train]\nsteps = 5\n".into() }),
        ..base(Kind::Job)
    };
    let made = manifests(&request).unwrap();
    assert_eq!(made.text(), include_str!("expected.yaml"));
    let claim = document(&made, "PersistentVolumeClaim");
    assert_eq!(strings(claim.at("spec.accessModes")), ["ReadWriteMany"]);
    assert_eq!(Request::run_file_path("run.toml"), "/etc/phalanx/run.toml");
}

fn check(change: impl Fn(&mut Request), words: &str) {
    for kind in KINDS {
        let mut request = base(kind);
        change(&mut request);
        let error: Error = manifests(&request).map(|m| m.text()).expect_err(words);
        assert!(error.to_string().contains(words) && error.exit_code() == 2, "{error}, expected {words}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    check(|r| r.name = "Mine".into(), "--name=Mine");
    check(|r| r.name = "a".repeat(51), "at most 50");
    check(|r| r.image = "phalanx".into(), "names no version");
    check(|r| r.image = "a b:1".into(), "--image=a b:1");
    check(|r| r.namespace = Some("a.b".into()), "--namespace=a.b");
    check(|r| r.pull_secret = Some("_".into()), "--pull-secret=_");
    check(|r| r.storage = Storage::Claim("A".into()), "--claim=A");
    check(|r| r.queue = Some("A".into()), "--queue=A");
    check(|r| r.nodes = 0, "--nodes=0");
    check(|r| r.nodes = 1_000_000, "--nodes=1000000");
    check(|r| r.ranks_per_node = 0, "--ranks-per-node=0");
    check(|r| r.gpus_per_node = Some(1), "--gpus-per-node=1 is less than --ranks-per-node=2");
    check(|r| r.shared_memory = r.memory, "leaves nothing");
    check(|r| r.env = vec![("PET_NNODES".into(), "1".into())], "PET_NNODES");
    check(|r| r.env = vec![("A".into(), "1".into()), ("A".into(), "2".into())], "given twice");
    check(|r| r.env = vec![("A-B".into(), "1".into())], "--env=A-B");
    check(|r| r.command.push("$(HOME)".into()), "$(HOME)");
    check(|r| r.run_file = Some(RunFile { name: "r".into(), text: "x".repeat(1 << 20) }), "1048576 bytes");
    let timed = Request { time: Some(Time { seconds: 60 }), ..base(Kind::Job) };
    assert!(manifests(&timed).unwrap_err().to_string().contains("--time=00:01:00 is no longer"));
    let kept = Request { time: Some(Time { seconds: 600 }), ..base(Kind::LeaderWorkerSet) };
    assert!(manifests(&kept).unwrap_err().to_string().contains("no time limit"));
}

#[test]
fn a_secret_is_named_and_never_written() {
    for wrong in ["HF_TOKEN=hf_abcdef", "HF_TOKEN", "HF_TOKEN=UPPER/x", "HF-TOKEN=a/b", "HF_TOKEN=a/"] {
        let error = Secret::parse(wrong).unwrap_err();
        assert!(!error.to_string().contains("hf_abcdef") && error.exit_code() == 2, "{error}");
    }
}

proptest! {
    #[test]
    fn no_words_of_a_command_become_part_of_the_manifest(words in proptest::collection::vec("\\PC{0,20}", 0..6)) {
        prop_assume!(!words.iter().any(|w| w.contains("$(")));
        let request = Request { command: words.clone(), ..base(Kind::Job) };
        let made = manifests(&request).unwrap();
        let args = strings(pod(&made, Kind::Job).at("containers.0.args"));
        prop_assert!(args.ends_with(&words));
        // Each word is one line of the list.
        let plain = manifests(&Request { command: Vec::new(), ..base(Kind::Job) }).unwrap();
        prop_assert_eq!(made.text().lines().count(), plain.text().lines().count() + words.len());
    }
}
