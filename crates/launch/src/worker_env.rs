//! The environment of a worker, variable by variable as torchrun sets it.

use crate::net::host_name;
use crate::options::Options;
use crate::secret::Trust;
use crate::warden::MARKER;
use elastic::rendezvous::Seat;
use spec::{Error, Result};
use std::net::IpAddr;
use std::path::Path;

/// What the workers of one attempt have in common.
pub(crate) struct Attempt<'a> {
    pub(crate) options: &'a Options,
    pub(crate) seat: &'a Seat,
    pub(crate) nproc: usize,
    pub(crate) run_id: &'a str,
    pub(crate) restarts: u32,
    /// `host:port` of the store that the agents hold.
    pub(crate) store: &'a str,
    pub(crate) trust: &'a Trust,
    /// The address that the workers listen on, if one was chosen.
    pub(crate) bind: Option<IpAddr>,
    pub(crate) marker: &'a str,
}

/// The variables to set for the worker with `local_rank`, over those it inherits. It runs in `place`, which is another
/// number where places before it are not used any more.
pub(crate) fn variables(
    shared: &Attempt<'_>,
    place: usize,
    local_rank: usize,
    error_file: &Path,
) -> Result<Vec<(String, String)>> {
    let Attempt { options, seat, nproc, .. } = shared;
    let inherited = |name: &str| std::env::var(name).ok();
    let mut env: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: String| env.push((name.to_owned(), value));

    set("RANK", (seat.base_rank + local_rank).to_string());
    set("WORLD_SIZE", seat.world.to_string());
    set("LOCAL_WORLD_SIZE", nproc.to_string());
    set("GROUP_RANK", seat.group_rank.to_string());
    set("GROUP_WORLD_SIZE", seat.group_world.to_string());
    set("ROLE_NAME", options.role.clone());
    set("ROLE_RANK", (seat.role_base_rank + local_rank).to_string());
    set("ROLE_WORLD_SIZE", seat.role_world.to_string());
    set("MASTER_ADDR", seat.master_addr.clone());
    set("MASTER_PORT", seat.master_port.to_string());
    set("TORCHELASTIC_RESTART_COUNT", shared.restarts.to_string());
    set("TORCHELASTIC_MAX_RESTARTS", options.max_restarts.to_string());
    set("TORCHELASTIC_RUN_ID", shared.run_id.to_owned());
    // Our store does not speak PyTorch's protocol: rank 0 hosts PyTorch's store at MASTER_PORT.
    set("TORCHELASTIC_USE_AGENT_STORE", "False".to_owned());
    set("TORCHELASTIC_ERROR_FILE", error_file.to_string_lossy().into_owned());
    set(
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        inherited("TORCH_NCCL_ASYNC_ERROR_HANDLING").unwrap_or_else(|| "1".into()),
    );
    if *nproc > 1 && inherited("OMP_NUM_THREADS").is_none() {
        set("OMP_NUM_THREADS", "1".to_owned());
    }
    set("PHALANX_STORE", shared.store.to_owned());
    set("PHALANX_SESSION", session(shared.run_id, seat));
    set("PHALANX_ELASTIC", u8::from(options.is_elastic()).to_string());
    for (name, value) in shared.trust.variables().into_iter().chain(shared.bind.map(crate::bind::variable)) {
        set(name, value);
    }
    let outer = inherited(MARKER).map_or(String::new(), |m| m + ":");
    set(MARKER, outer + shared.marker);
    if options.virtual_local_rank {
        set("LOCAL_RANK", "0".to_owned());
        for (name, value) in visible_gpu(place, &inherited)? {
            set(name, value);
        }
    } else {
        set("LOCAL_RANK", local_rank.to_string());
    }
    for (name, value) in &options.env {
        set(name, value.clone());
    }
    Ok(env)
}

/// Prefix of the keys of one round in the store: run id and round.
pub(crate) fn session(run_id: &str, seat: &Seat) -> String {
    format!("{run_id}/{}", seat.round)
}

/// `--virtual-local-rank`: each worker sees one GPU, of those that the agent may see.
fn visible_gpu(
    local_rank: usize,
    inherited: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<(&'static str, String)>> {
    let hip = inherited("HIP_VISIBLE_DEVICES").filter(|v| !v.is_empty());
    let (name, list) = match &hip {
        Some(list) => ("HIP_VISIBLE_DEVICES", Some(list.clone())),
        None => ("CUDA_VISIBLE_DEVICES", inherited("CUDA_VISIBLE_DEVICES")),
    };
    let gpu = match list {
        None => local_rank.to_string(),
        Some(list) => list.split(',').nth(local_rank).map(|g| g.trim().to_owned()).ok_or_else(|| {
            Error::user(format!("--virtual-local-rank: local rank {local_rank} has no GPU in {name}={list}"))
                .hint("start as many workers as there are GPUs")
        })?,
    };
    let mut env = vec![("CUDA_VISIBLE_DEVICES", gpu.clone())];
    if hip.is_some() {
        env.push(("HIP_VISIBLE_DEVICES", gpu));
    }
    Ok(env)
}

/// What stands before a tee'd line: the template with `${role_name}`, `${local_rank}`, `${rank}` and `${hostname}`.
pub(crate) fn line_prefix(options: &Options, seat: &Seat, local_rank: usize) -> String {
    let template = options.log_line_prefix_template.as_deref().unwrap_or("[${role_name}${local_rank}]:");
    let values = [
        ("role_name", options.role.clone()),
        ("local_rank", local_rank.to_string()),
        ("rank", (seat.base_rank + local_rank).to_string()),
        ("hostname", host_name()),
    ];
    // Unknown names stay as they are, like Python's safe_substitute; `$name` works as `${name}` does.
    let mut text = template.to_owned();
    for (name, value) in &values {
        text = text.replace(&format!("${{{name}}}"), value);
    }
    for (name, value) in &values {
        text = text.replace(&format!("${name}"), value);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat() -> Seat {
        Seat {
            round: 3,
            group_rank: 1,
            group_world: 2,
            base_rank: 4,
            world: 6,
            role_base_rank: 4,
            role_world: 6,
            master_addr: "10.0.0.1".into(),
            master_port: 1234,
            nodes: Vec::new(),
        }
    }

    fn check_prefix(template: Option<&str>, expected: &str) {
        let options = Options { log_line_prefix_template: template.map(str::to_owned), ..Options::default() };
        assert_eq!(line_prefix(&options, &seat(), 1), expected);
    }

    #[test]
    fn prefixes() {
        check_prefix(None, "[default1]:");
        check_prefix(Some("${rank}/$local_rank ${unknown}: "), "5/1 ${unknown}: ");
        check_prefix(Some("${hostname}"), &host_name());
    }

    #[test]
    fn the_environment_of_the_second_worker_of_the_second_node() {
        let (options, seat) = (Options::default(), seat());
        let trust = Trust::given(None, false).unwrap().or_random().unwrap();
        let shared = Attempt {
            options: &options,
            seat: &seat,
            nproc: 2,
            run_id: "job",
            restarts: 1,
            store: "10.0.0.1:29400",
            trust: &trust,
            bind: Some(std::net::Ipv4Addr::new(10, 0, 0, 7).into()),
            marker: "m",
        };
        let env = variables(&shared, 1, 1, Path::new("/e.json")).unwrap();
        let check = |name: &str, expected: &str| {
            let found: Vec<&str> = env.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect();
            assert_eq!(found, [expected], "{name}");
        };
        check("RANK", "5");
        check("LOCAL_RANK", "1");
        check("WORLD_SIZE", "6");
        check("LOCAL_WORLD_SIZE", "2");
        check("GROUP_RANK", "1");
        check("GROUP_WORLD_SIZE", "2");
        check("ROLE_NAME", "default");
        check("ROLE_RANK", "5");
        check("ROLE_WORLD_SIZE", "6");
        check("MASTER_ADDR", "10.0.0.1");
        check("MASTER_PORT", "1234");
        check("TORCHELASTIC_RESTART_COUNT", "1");
        check("TORCHELASTIC_MAX_RESTARTS", "0");
        check("TORCHELASTIC_RUN_ID", "job");
        check("TORCHELASTIC_USE_AGENT_STORE", "False");
        check("TORCHELASTIC_ERROR_FILE", "/e.json");
        check("PHALANX_SESSION", "job/3");
        check("PHALANX_ELASTIC", "0");
        check("PHALANX_SECRET", trust.text().unwrap());
        check("PHALANX_INSECURE", "0");
        check("PHALANX_BIND", "10.0.0.7");
    }

    #[test]
    fn virtual_local_ranks_see_one_gpu_each() {
        let check = |cuda: Option<&str>, rank: usize, expected: Option<&str>| {
            let found =
                visible_gpu(rank, &|n| cuda.filter(|_| n == "CUDA_VISIBLE_DEVICES").map(str::to_owned));
            assert_eq!(found.ok().map(|v| v[0].1.clone()).as_deref(), expected);
        };
        check(None, 3, Some("3"));
        check(Some("4, 6"), 1, Some("6"));
        check(Some("4,6"), 2, None);
    }
}
