//! A pod: one node of the job.

use super::{CONTAINER, Request, STORE_PORT};
use crate::yaml::map;
use crate::{Decisions, Yaml};

/// Where the volume with runs is; also the working directory, so that `run.dir` and paths of data are seen from it.
const DATA_DIR: &str = "/data";
pub(crate) const RUN_FILE_DIR: &str = "/etc/phalanx";

/// Neither root nor a user of a node: the convention of images without a shell.
const USER: usize = 65_532;

/// Key of the job's secret, and the end of the name of what keeps it.
const JOB_SECRET: &str = "secret";

/// Seconds that the agent has left after its ranks, to report and to leave.
const AGENT_S: u64 = 5;

/// Seconds between two looks of a probe.
const PROBE_PERIOD_S: u64 = 30;

/// How pods of a kind learn their place.
pub(crate) struct Place {
    /// Address of node 0; absent where the cluster sets torchrun's variables itself.
    pub(crate) master: Option<String>,
    /// Annotation or label that holds the node's number.
    pub(crate) index: &'static str,
    /// Whether pods that end with success are started again.
    pub(crate) is_kept: bool,
    /// Who starts a pod that ended.
    pub(crate) restart_policy: Option<&'static str>,
    /// Subdomain, where the manifest has its own service.
    pub(crate) subdomain: Option<String>,
}

pub(crate) fn spec(r: &Request, place: &Place, why: &mut Decisions) -> Yaml {
    let pull = r.pull_secret.as_ref().map(|name| [map! { "name" => name.as_str() }]);
    let labels = (!r.node_labels.is_empty()).then(|| pairs(&r.node_labels));
    let tolerations = r.gpus_per_node.map(|_| {
        why.note(
            "a toleration for nvidia.com/gpu",
            "nodes with GPUs are usually kept from other pods by this taint",
        );
        [map! { "key" => "nvidia.com/gpu", "operator" => "Exists", "effect" => "NoSchedule" }]
    });
    why.note(
        format!("the pod runs as user {USER}, owns the volume by group, and its root is read-only"),
        "training writes to the volume, to /tmp and to shared memory, and needs no right beyond them",
    );
    Yaml::Map(Vec::new())
        .with("restartPolicy", place.restart_policy)
        .with("subdomain", place.subdomain.clone())
        .with("terminationGracePeriodSeconds", Some(r.grace.seconds))
        // The store is reached by name and the API never.
        .with("automountServiceAccountToken", Some(false))
        .with("enableServiceLinks", Some(false))
        .with("securityContext", Some(security()))
        .with("imagePullSecrets", pull)
        .with("nodeSelector", labels)
        .with("tolerations", tolerations)
        .with("containers", Some([container(r, place, why)]))
        .with("volumes", Some(volumes(r, why)))
}

fn security() -> Yaml {
    map! {
        "runAsNonRoot" => true,
        "runAsUser" => USER,
        "runAsGroup" => USER,
        "fsGroup" => USER,
        // A volume with many checkpoints is not walked at every start.
        "fsGroupChangePolicy" => "OnRootMismatch",
        "seccompProfile" => map! { "type" => "RuntimeDefault" },
    }
}

fn container(r: &Request, place: &Place, why: &mut Decisions) -> Yaml {
    let probes = r.silence.map(|silence| probes(r, silence.seconds, why));
    let (startup, liveness) = probes.map_or((None, None), |(s, l)| (Some(s), Some(l)));
    map! {
        "name" => CONTAINER,
        "image" => r.image.as_str(),
        "command" => ["phalanx"],
        "args" => args(r, place, why),
        "workingDir" => DATA_DIR,
        "env" => env(r, place, why),
        "ports" => [map! { "name" => "store", "containerPort" => usize::from(STORE_PORT) }],
        "resources" => resources(r, why),
        "securityContext" => map! {
            "allowPrivilegeEscalation" => false,
            "readOnlyRootFilesystem" => true,
            "capabilities" => map! { "drop" => ["ALL"] },
        },
    }
    .with("startupProbe", startup)
    .with("livenessProbe", liveness)
    .with("volumeMounts", Some(mounts(r)))
}

/// The agent's flags, then the command of a rank. Numbers of nodes and ranks come through variables.
fn args(r: &Request, place: &Place, why: &mut Decisions) -> Vec<String> {
    let ranks_s = r.grace.seconds.saturating_sub(AGENT_S).max(1);
    let mut args = vec![
        "launch".to_owned(),
        "--no-python".to_owned(),
        // Policies tell wrong input from a failure by it.
        "--pass-exit-code".to_owned(),
        format!("--shutdown-timeout={ranks_s}"),
    ];
    why.note(
        format!(
            "{} s between the request to stop and the end, {ranks_s} s of them for ranks to save",
            r.grace.seconds
        ),
        "--grace; the agent itself needs the rest",
    );
    if place.is_kept {
        args.push("--hold".to_owned());
    }
    args.extend(r.command.iter().cloned());
    args
}

fn env(r: &Request, place: &Place, why: &mut Decisions) -> Vec<Yaml> {
    let plain = |name: &str, value: String| map! { "name" => name, "value" => value };
    let mut env = Vec::new();
    if let Some(master) = &place.master {
        env.push(plain("PET_NNODES", r.nodes.to_string()));
        env.push(plain("PET_NPROC_PER_NODE", r.ranks_per_node.to_string()));
        let source = map! { "fieldRef" => map! { "fieldPath" => place.index } };
        env.push(map! { "name" => "PET_NODE_RANK", "valueFrom" => source });
        env.push(plain("PET_MASTER_ADDR", master.clone()));
        env.push(plain("PET_MASTER_PORT", STORE_PORT.to_string()));
    }
    env.extend(r.env.iter().map(|(name, value)| plain(name, value.clone())));
    let from = |variable: &str, secret: &str, key: &str| {
        let key = map! { "name" => secret, "key" => key };
        map! { "name" => variable, "valueFrom" => map! { "secretKeyRef" => key } }
    };
    env.extend(r.secrets.iter().map(|s| from(&s.variable, &s.secret, &s.key)));
    if r.needs_secret() {
        let secret = format!("{}-{JOB_SECRET}", r.name);
        why.note(
            format!("PHALANX_SECRET is the key {JOB_SECRET} of the secret {secret}, and pods wait until it is there"),
            format!(
                "agents on several nodes prove by it that they are of the job: openssl rand -hex 32 | kubectl create \
                 secret generic {secret} --from-file={JOB_SECRET}=/dev/stdin; --secret-env PHALANX_SECRET=SECRET/KEY \
                 names another"
            ),
        );
        env.push(from("PHALANX_SECRET", &secret, JOB_SECRET));
    }
    env
}

/// What the container asks for is what it gets: ranks wait for the slowest, so none may be slowed by a neighbour.
pub(crate) fn resources(r: &Request, why: &mut Decisions) -> Yaml {
    let all = map! { "cpu" => r.cpus_per_node.to_string(), "memory" => r.memory.quantity() }
        .with("nvidia.com/gpu", r.gpus_per_node.map(|n| n.to_string()));
    why.note(
        "requests equal limits",
        "ranks wait for the slowest: none is to be slowed or evicted for a neighbour",
    );
    map! { "requests" => all.clone(), "limits" => all }
}

/// A start may take as long as a silence; after that, a silence ends the pod.
fn probes(r: &Request, silence_s: u64, why: &mut Decisions) -> (Yaml, Yaml) {
    let failures = silence_s.div_ceil(PROBE_PERIOD_S).max(1);
    why.note(
        format!("a pod without a journal record for {silence_s} s is ended"),
        "--silence; ranks find a silent peer by themselves, this finds an agent that does not",
    );
    let look = |within_s: u64| {
        map! { "command" => ["phalanx", "alive", &r.run_dir, "--within", &format!("{within_s}s")] }
    };
    let period_s = PROBE_PERIOD_S;
    // An earlier start's journals are older than two looks.
    let startup = map! {
        "exec" => look(2 * period_s), "periodSeconds" => period_s, "timeoutSeconds" => period_s, "failureThreshold" => failures,
    };
    let liveness = map! {
        "exec" => look(silence_s), "periodSeconds" => period_s, "timeoutSeconds" => period_s, "failureThreshold" => 2_usize,
    };
    (startup, liveness)
}

fn mounts(r: &Request) -> Vec<Yaml> {
    let mount = |name: &str, path: &str| map! { "name" => name, "mountPath" => path };
    let mut mounts = vec![mount("runs", DATA_DIR), mount("shm", "/dev/shm"), mount("tmp", "/tmp")];
    if r.run_file.is_some() {
        mounts.push(mount("run-file", RUN_FILE_DIR).with("readOnly", Some(true)));
    }
    mounts
}

fn volumes(r: &Request, why: &mut Decisions) -> Vec<Yaml> {
    let shm = r.shared_memory.quantity();
    why.note(
        format!("/dev/shm of {shm}"),
        "ranks of a pod talk through shared memory, of which containers have 64 MiB by default",
    );
    let claim = map! { "claimName" => r.claim().unwrap_or_default() };
    let mut volumes = vec![
        map! { "name" => "runs", "persistentVolumeClaim" => claim },
        map! { "name" => "shm", "emptyDir" => map! { "medium" => "Memory", "sizeLimit" => shm } },
        map! { "name" => "tmp", "emptyDir" => map! {} },
    ];
    if r.run_file.is_some() {
        volumes.push(map! { "name" => "run-file", "configMap" => map! { "name" => r.run_file_map() } });
    }
    volumes
}

fn pairs(list: &[(String, String)]) -> Yaml {
    Yaml::Map(list.iter().map(|(key, value)| (key.clone(), Yaml::from(value.as_str()))).collect())
}
