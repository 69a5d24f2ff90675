//! Manifests for Kubernetes: one pod for each node, with an agent that starts the node's ranks.
//!
//! Whatever kind of job the cluster has, a pod learns its place through torchrun's variables (`PET_NNODES`,
//! `PET_NODE_RANK`, `PET_MASTER_ADDR`, ...), which the agent reads. The kinds differ in who makes the headless service, and in
//! who starts what again.

mod kinds;
mod pod;
mod request;

pub use request::{Kind, Request, RunFile, Secret, Storage};

use spec::Result;

use crate::yaml::map;
use crate::{Decision, Decisions, Yaml};

/// Port of the agents' store on node 0: torchrun's default for the static rendezvous.
pub(crate) const STORE_PORT: u16 = 29_500;

/// Name of the container that trains: what Kubeflow's Trainer expects, and policies speak of.
pub(crate) const CONTAINER: &str = "node";

/// Manifests, in the order in which they are applied, and why they are as they are.
#[derive(Clone, Debug)]
pub struct Manifests {
    /// The documents.
    pub documents: Vec<Yaml>,
    /// What was chosen.
    pub decisions: Vec<Decision>,
}

impl Manifests {
    /// The documents as one stream of YAML, as `kubectl apply -f -` takes it.
    pub fn text(&self) -> String {
        let documents: Vec<String> = self.documents.iter().map(Yaml::document).collect();
        documents.join("---\n")
    }
}

/// The manifests for a request.
///
/// ```
/// use clusters::kubernetes::{Kind, Request, manifests};
/// let train = ["phalanx", "train"].map(String::from).to_vec();
/// let request = Request { nodes: 2, ..Request::new(Kind::Job, "mine", "ghcr.io/you/phalanx:0.1.0", train) };
/// let text = manifests(&request)?.text();
/// assert!(text.contains("kind: Service") && text.contains("completions: 2"));
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// Names, images and sizes that Kubernetes would refuse or that cannot work.
pub fn manifests(request: &Request) -> Result<Manifests> {
    request.check()?;
    let mut why = Decisions::default();
    let mut documents = Vec::new();
    if let Storage::New { size, class } = &request.storage {
        documents.push(claim(request, size, class.as_deref(), &mut why));
    }
    if let Some(run) = &request.run_file {
        documents.push(map! {
            "apiVersion" => "v1",
            "kind" => "ConfigMap",
            "metadata" => request.metadata(&request.run_file_map()),
            "data" => map! { run.name => run.text.as_str() },
        });
    }
    documents.extend(kinds::documents(request, &mut why));
    Ok(Manifests { documents, decisions: why.list() })
}

fn claim(r: &Request, size: &crate::Memory, class: Option<&str>, why: &mut Decisions) -> Yaml {
    let mode = if r.nodes > 1 { "ReadWriteMany" } else { "ReadWriteOnce" };
    why.note(
        format!("the claim is {mode}"),
        if r.nodes > 1 {
            "ranks of every node write their shares of a checkpoint"
        } else {
            "one node writes"
        },
    );
    let spec = map! {
        "accessModes" => [mode],
        "resources" => map! { "requests" => map! { "storage" => size.quantity() } },
    };
    map! {
        "apiVersion" => "v1",
        "kind" => "PersistentVolumeClaim",
        "metadata" => r.metadata(&r.claim().unwrap_or_default()),
        "spec" => spec.with("storageClassName", class),
    }
}

#[cfg(test)]
mod tests;
