//! The job's store, found through MPI: under an `mpiexec` ranks can talk before they know any address.

use crate::bootstrap::RankStore;
use crate::rank_env::RankEnv;
use crate::secret::Trust;
use crate::{bind, net};
use comm::{Mpi, Secret, StoreClient, StoreServer};
use spec::{Context as _, Error, Result};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

impl RankEnv {
    /// Whether [`RankEnv::store`] has what it takes: an address, and a secret where that is needed.
    pub fn can_meet(&self) -> bool {
        if self.agent_store.is_some() || self.torch_store || self.world == 1 {
            return true;
        }
        let (Some(host), Some(port)) = (&self.master_addr, self.master_port) else { return false };
        Trust::given(None, false).is_ok_and(|trust| trust.check(host, port).is_ok())
    }

    /// Connects to the job's store as [`RankEnv::store`] does, without any address: rank 0 hosts it and says over MPI where,
    /// and the secret too if none was given to all. On one host it listens on the loopback interface.
    ///
    /// # Errors
    /// MPI counts the ranks otherwise than their launcher, ranks do not come in time, or rank 0 cannot be reached.
    pub fn store_by_mpi(&self, mpi: &'static Mpi, timeout: Duration) -> Result<RankStore> {
        mpi.check(self.rank, self.world)?;
        let trust = Trust::given(None, false)?;
        let mut server = None;
        let host = |hosts: &[String]| -> Result<String> {
            let is_one_host = hosts.iter().all(|h| *h == hosts[0]);
            let is_given = !trust.secret.is_none();
            let trust = trust.clone().or_random()?;
            let bind = bind::from_env()?.unwrap_or(match is_one_host {
                true => Ipv4Addr::LOCALHOST.into(),
                false => Ipv4Addr::UNSPECIFIED.into(),
            });
            let started = StoreServer::start_with(SocketAddr::new(bind, 0), &trust.secret)
                .context("rank 0 hosts the job's store")?;
            let addrs = if bind.is_unspecified() { bind::reachable() } else { vec![bind] };
            let addrs: Vec<String> = addrs.iter().map(IpAddr::to_string).collect();
            let secret = trust.text().filter(|_| !is_given).unwrap_or_default().to_owned();
            let card = format!("{}\n{}\n{secret}", started.addr().port(), addrs.join(" "));
            server = Some(started);
            Ok(card)
        };
        let card = mpi.agree(&comm::host_id(), timeout, host).context("find the job's store over MPI")?;
        let mut lines = card.split('\n');
        let mut line = || lines.next().unwrap_or_default();
        let (port, addrs, secret) = (line(), line(), line());
        let secret = match secret {
            "" => trust.secret,
            text => Secret::parse(text, "from rank 0, over MPI")?,
        };
        let port = port.parse().map_err(|_| Error::failure("rank 0 named no port of its store"))?;
        let addrs: Vec<&str> = addrs.split(' ').filter(|a| !a.is_empty()).collect();
        let client = self.first_of(&addrs, port, &secret, timeout)?;
        Ok(self.rank_store(client, server))
    }

    /// The first of several addresses of one store that answers.
    fn first_of(&self, hosts: &[&str], port: u16, secret: &Secret, timeout: Duration) -> Result<StoreClient> {
        let until = Instant::now() + timeout;
        let mut failed = Error::failure("rank 0 named no address of its store");
        for (i, host) in hosts.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let share = left / (hosts.len() - i) as u32;
            match StoreClient::connect_with(&net::join_endpoint(host, port), secret, share) {
                Ok(client) => return Ok(client),
                Err(e) => failed = e,
            }
        }
        let all = hosts.join(", ");
        Err(failed.context(format!("rank {} tries the addresses of rank 0's machine ({all})", self.rank)))
    }
}
