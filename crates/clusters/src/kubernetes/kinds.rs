//! What keeps the pods, and what becomes of them when one fails.

use super::pod::{self, Place};
use super::{CONTAINER, Kind, Request, STORE_PORT};
use crate::yaml::map;
use crate::{Decisions, WRONG_INPUT, Yaml};

const JOB_INDEX: &str = "metadata.annotations['batch.kubernetes.io/job-completion-index']";
const GROUP_INDEX: &str = "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']";

/// Name of the replicated job: what Kubeflow's Trainer expects.
const REPLICATED: &str = "node";

pub(crate) fn documents(r: &Request, why: &mut Decisions) -> Vec<Yaml> {
    match r.kind {
        Kind::Job => vec![service(r), job(r, why)],
        Kind::JobSet => vec![job_set(r, why)],
        Kind::TrainJob => train_job(r, why),
        Kind::LeaderWorkerSet => vec![leader_worker_set(r, why)],
    }
}

/// A name for every pod, before it is ready: agents wait for each other, and a probe for them.
fn service(r: &Request) -> Yaml {
    map! {
        "apiVersion" => "v1",
        "kind" => "Service",
        "metadata" => r.metadata(&r.name),
        "spec" => map! {
            "clusterIP" => "None",
            "publishNotReadyAddresses" => true,
            "selector" => map! { "batch.kubernetes.io/job-name" => r.name.as_str() },
            "ports" => [map! { "name" => "store", "port" => usize::from(STORE_PORT) }],
        },
    }
}

fn job(r: &Request, why: &mut Decisions) -> Yaml {
    let place = Place {
        master: Some(format!("{0}-0.{0}", r.name)),
        index: JOB_INDEX,
        is_kept: false,
        restart_policy: Some("Never"),
        subdomain: Some(r.name.clone()),
    };
    let most = r.restarts as usize * r.nodes;
    why.note(
        format!("backoffLimit {most}"),
        format!(
            "{} restarts of {} pods: when one fails the others end too, and each counts",
            r.restarts, r.nodes
        ),
    );
    why.note(
        "a pod that the cluster takes away does not count",
        "podFailurePolicy ignores DisruptionTarget: preemption, eviction, a node that is drained or lost",
    );
    let ignore = map! {
        "action" => "Ignore",
        "onPodConditions" => [map! { "type" => "DisruptionTarget", "status" => "True" }],
    };
    let spec = indexed(r, most, vec![wrong_input(why), ignore]).with("podReplacementPolicy", Some("Failed"));
    let spec = spec.with("template", Some(template(r, &place, why)));
    let metadata = queued(r, r.metadata(&r.name));
    map! { "apiVersion" => "batch/v1", "kind" => "Job", "metadata" => metadata, "spec" => spec }
}

/// The part of a job's specification that is the same for all kinds: a pod for each index.
fn indexed(r: &Request, backoff: usize, rules: Vec<Yaml>) -> Yaml {
    map! {
        "completionMode" => "Indexed",
        "completions" => r.nodes,
        "parallelism" => r.nodes,
        "backoffLimit" => backoff,
        "podFailurePolicy" => map! { "rules" => rules },
    }
    .with("activeDeadlineSeconds", r.time.map(|t| t.seconds))
}

fn wrong_input(why: &mut Decisions) -> Yaml {
    why.note(
        format!("exit code {WRONG_INPUT} fails the job at once"),
        "the program says that its input is wrong, and no other node would find it right",
    );
    map! {
        "action" => "FailJob",
        "onExitCodes" => map! {
            "containerName" => CONTAINER,
            "operator" => "In",
            "values" => [usize::from(WRONG_INPUT)],
        },
    }
}

fn template(r: &Request, place: &Place, why: &mut Decisions) -> Yaml {
    map! { "metadata" => map! { "labels" => labels(r) }, "spec" => pod::spec(r, place, why) }
}

fn labels(r: &Request) -> Yaml {
    map! { "app.kubernetes.io/name" => "phalanx", "app.kubernetes.io/instance" => r.name.as_str() }
}

/// Kueue admits what carries the name of a queue.
fn queued(r: &Request, mut metadata: Yaml) -> Yaml {
    if let (Yaml::Map(entries), Some(queue)) = (&mut metadata, &r.queue)
        && let Some((_, labels)) = entries.iter_mut().find(|(key, _)| key == "labels")
    {
        *labels = labels.clone().with("kueue.x-k8s.io/queue-name", Some(queue.as_str()));
    }
    metadata
}

fn job_set(r: &Request, why: &mut Decisions) -> Yaml {
    let master = format!("{0}-{REPLICATED}-0-0.{0}", r.name);
    why.note("no service of its own", "a JobSet makes a headless one under its name");
    let spec = set(r, Some(master), why);
    map! {
        "apiVersion" => "jobset.x-k8s.io/v1alpha2",
        "kind" => "JobSet",
        "metadata" => queued(r, r.metadata(&r.name)),
        "spec" => spec,
    }
}

/// A JobSet of one job: any failure starts all its pods again, so that they meet anew.
fn set(r: &Request, master: Option<String>, why: &mut Decisions) -> Yaml {
    let place =
        Place { master, index: JOB_INDEX, is_kept: false, restart_policy: Some("Never"), subdomain: None };
    let disrupted = map! {
        "action" => "FailJob",
        "onPodConditions" => [map! { "type" => "DisruptionTarget", "status" => "True" }],
    };
    let spec = indexed(r, 0, vec![wrong_input(why), disrupted]);
    let spec = spec.with("template", Some(template(r, &place, why)));
    why.note(
        "a pod that the cluster takes away restarts the set and does not count",
        "the failure policy knows it by DisruptionTarget in the job's message",
    );
    why.note(format!("{} restarts of the set", r.restarts), "all other failures: a rank, a link or a node");
    let reasons = || ["PodFailurePolicy"];
    let job_template = map! { "spec" => spec };
    let job_template = match r.kind {
        // The Trainer knows by this label which job its TrainJob's values go into.
        Kind::TrainJob => {
            let step = map! { "trainer.kubeflow.org/trainjob-ancestor-step" => "trainer" };
            Yaml::Map(Vec::new())
                .with("metadata", Some(map! { "labels" => step }))
                .with("spec", job_template.at("spec").cloned())
        }
        _ => job_template,
    };
    map! {
        "network" => map! { "enableDNSHostnames" => true, "publishNotReadyAddresses" => true },
        "failurePolicy" => map! {
            "maxRestarts" => r.restarts as usize,
            "rules" => [
                map! {
                    "name" => "disruption",
                    "action" => "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons" => reasons(),
                    "onJobFailureMessagePatterns" => [".*DisruptionTarget.*"],
                },
                map! { "name" => "input", "action" => "FailJobSet", "onJobFailureReasons" => reasons() },
            ],
        },
        "replicatedJobs" => [map! { "name" => REPLICATED, "replicas" => 1_usize, "template" => job_template }],
    }
}

/// A runtime of our own, because those of the cluster know neither our volumes nor our exit codes, and a job of it.
fn train_job(r: &Request, why: &mut Decisions) -> Vec<Yaml> {
    const API: &str = "trainer.kubeflow.org/v1alpha1";
    why.note(
        "a TrainingRuntime goes along",
        "the cluster's runtimes know neither these volumes nor these exit codes; it is the template, the TrainJob says how many",
    );
    why.note("torch: {} in the runtime", "the Trainer then sets torchrun's variables, which the agent reads");
    let resources = pod::resources(r, &mut Decisions::default());
    let runtime = map! {
        "apiVersion" => API,
        "kind" => "TrainingRuntime",
        "metadata" => r.metadata(&r.name),
        "spec" => map! {
            "mlPolicy" => map! { "numNodes" => r.nodes, "torch" => map! {} },
            "template" => map! { "spec" => set(r, None, why) },
        },
    };
    let job = map! {
        "apiVersion" => API,
        "kind" => "TrainJob",
        "metadata" => queued(r, r.metadata(&r.name)),
        "spec" => map! {
            "runtimeRef" => map! {
                "apiGroup" => "trainer.kubeflow.org",
                "kind" => "TrainingRuntime",
                "name" => r.name.as_str(),
            },
            "trainer" => map! {
                "numNodes" => r.nodes,
                "numProcPerNode" => r.ranks_per_node,
                "image" => r.image.as_str(),
                "resourcesPerNode" => resources,
            },
        },
    };
    vec![runtime, job]
}

fn leader_worker_set(r: &Request, why: &mut Decisions) -> Yaml {
    let place = Place {
        master: Some("$(LWS_LEADER_ADDRESS)".to_owned()),
        index: GROUP_INDEX,
        is_kept: true,
        restart_policy: None,
        subdomain: None,
    };
    why.note("no service of its own", "a LeaderWorkerSet makes a headless one for its group");
    why.note(
        "--hold: pods stay when training is done",
        "a LeaderWorkerSet restarts whatever ends; it is over when it is deleted",
    );
    why.note(
        "failures are not told apart and not counted",
        "a LeaderWorkerSet has no failure policy: it recreates the group, with the back-off of its containers",
    );
    let template = template(r, &place, why);
    map! {
        "apiVersion" => "leaderworkerset.x-k8s.io/v1",
        "kind" => "LeaderWorkerSet",
        "metadata" => queued(r, r.metadata(&r.name)),
        "spec" => map! {
            "replicas" => 1_usize,
            "leaderWorkerTemplate" => map! {
                "size" => r.nodes,
                "restartPolicy" => "RecreateGroupOnPodRestart",
                "workerTemplate" => template,
            },
        },
    }
}
