//! Carries the succession out (`elastic::succession`): the job's store moves when the agent that ran it has died.

use crate::net;
use comm::{Secret, StoreClient, StoreServer};
use elastic::rendezvous::{Agreed, NodeId};
use elastic::succession;
use spec::Result;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// A candidate answers within this, or is asked again at the next look.
const REACH_TIMEOUT: Duration = Duration::from_millis(500);

/// The store that this agent keeps ready, and where the others' are.
pub(crate) struct Standby {
    secret: Secret,
    server: Option<StoreServer>,
    addresses: BTreeMap<NodeId, String>,
    voted: bool,
}

/// Where the store is now.
pub(crate) struct Moved {
    pub(crate) client: StoreClient,
    pub(crate) endpoint: String,
    pub(crate) host: NodeId,
}

impl Standby {
    /// A store for those who hold `secret` at `ip`, where the other nodes reach this one. Without one this agent can follow
    /// and not host.
    pub(crate) fn open(ip: Option<IpAddr>, secret: &Secret) -> Standby {
        let server = ip.and_then(|ip| StoreServer::start_with(SocketAddr::new(ip, 0), secret).ok());
        Standby { secret: secret.clone(), server, addresses: BTreeMap::new(), voted: false }
    }

    /// The store's port; 0 if there is none.
    pub(crate) fn port(&self) -> u16 {
        self.server.as_ref().map_or(0, |s| s.addr().port())
    }

    /// Remembers where the stores of those are that take part: while a round forms they are known by their ids alone.
    pub(crate) fn note(&mut self, shared: &Agreed) {
        self.voted = false;
        let all = || shared.members.iter().chain(&shared.waiting).filter(|m| m.standby != 0);
        if all().any(|m| !self.addresses.contains_key(&m.id)) {
            let address = |m: &elastic::rendezvous::Member| net::join_endpoint(&m.id.addr, m.standby);
            self.addresses.extend(all().map(|m| (m.id.clone(), address(m))));
        }
    }

    /// The nodes whose doors must be watched to know who comes next.
    pub(crate) fn line(shared: &Agreed) -> impl Iterator<Item = NodeId> {
        shared.host.clone().into_iter().chain(succession::electorate(shared).into_iter().take(2))
    }

    /// After the store was not reached for `unread`: what became of it. `None` if there is no hope that it moves.
    pub(crate) fn follow(
        &mut self,
        me: &NodeId,
        prefix: &str,
        memory: &Agreed,
        dead: &[NodeId],
        times: (Duration, Duration),
    ) -> Option<Result<Option<Moved>>> {
        let (unread, heartbeat) = times;
        let unread = if self.voted { Duration::ZERO } else { unread };
        if !succession::has_vote(memory, dead, unread, heartbeat) {
            return None;
        }
        let candidate = succession::candidate(memory, dead)?;
        let endpoint = self.addresses.get(&candidate)?.clone();
        if candidate == *me && self.server.is_none() {
            return None;
        }
        self.voted = true;
        let client = match StoreClient::connect_with(&endpoint, &self.secret, REACH_TIMEOUT) {
            Ok(client) => client,
            Err(error) => return Some(Err(error)),
        };
        Some(vote(me, prefix, memory, dead, Moved { client, endpoint, host: candidate }))
    }
}

/// Brings what this agent remembers to the candidate; if that is this agent, it may have enough.
fn vote(me: &NodeId, prefix: &str, memory: &Agreed, dead: &[NodeId], there: Moved) -> Result<Option<Moved>> {
    let Moved { client, endpoint, host: candidate } = there;
    let state = format!("{prefix}/state");
    let there = client.try_get(&state)?.and_then(|bytes| Agreed::read(&bytes).ok());
    if let Some(there) = there.filter(|s| s.reign > memory.reign) {
        let host = there.host.unwrap_or(candidate);
        return Ok(Some(Moved { client, endpoint, host }));
    }
    client.set(&format!("{prefix}/vote/{me}"), written(memory)?)?;
    if candidate != *me {
        return Ok(None);
    }
    let mut votes = Vec::new();
    for voter in succession::electorate(memory).into_iter().chain(memory.waiting.iter().map(|m| m.id.clone()))
    {
        if let Some(bytes) = client.try_get(&format!("{prefix}/vote/{voter}"))?
            && let Ok(memory) = Agreed::read(&bytes)
        {
            votes.push((voter, memory));
        }
    }
    if let Ok(next) = succession::succeed(me, &votes, dead) {
        client.compare_set(&state, None, &written(&next)?)?;
        return Ok(Some(Moved { client, endpoint, host: candidate }));
    }
    Ok(None)
}

fn written(shared: &Agreed) -> Result<Vec<u8>> {
    serde_json::to_vec(shared)
        .map_err(|e| spec::Error::failure(format!("the agreed value cannot be written: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_kept_ready_opens_to_the_jobs_secret_alone() {
        let here = Some(IpAddr::from([127, 0, 0, 1]));
        let secret = Secret::random("here").unwrap();
        let standby = Standby::open(here, &secret);
        let addr = net::join_endpoint("127.0.0.1", standby.port());
        let connect = |secret: &Secret| StoreClient::connect_with(&addr, secret, Duration::from_secs(10));
        connect(&secret).unwrap();
        for other in [Secret::none(), Secret::random("elsewhere").unwrap()] {
            let error = connect(&other).unwrap_err().to_string();
            assert!(error.contains("its secret is not ours"), "{error}");
        }
    }
}
