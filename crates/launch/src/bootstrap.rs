//! How the ranks of a job find one store, whoever started them.

use crate::net;
use crate::rank_env::{Launcher, RankEnv};
use crate::secret::Trust;
use crate::torch_store::TorchStore;
use comm::{Secret, StoreClient, StoreServer, Waiting};
use spec::{Context as _, Error, Result};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// The store that all ranks of a job share.
#[derive(Debug)]
pub struct RankStore {
    /// The connection to it.
    pub client: StoreClient,
    /// The store itself, on the rank that hosts it (rank 0, unless the launcher does).
    /// It must outlive the others' use of it: see [`RankStore::leave`].
    pub server: Option<StoreServer>,
    rank: usize,
    world: usize,
    session: String,
}

impl RankStore {
    /// Ends this rank's use of the store. The rank that hosts it waits up to `timeout` for the others to leave.
    ///
    /// # Errors
    /// On the host: the ranks that have not left in time.
    pub fn leave(self, timeout: Duration) -> Result<()> {
        let key = |rank: usize| format!("{}/left/{rank}", self.session);
        if self.server.is_none() {
            // The host may go as soon as it has this, before its answer arrives.
            let _ = self.client.set(&key(self.rank), b"");
            return Ok(());
        }
        let others: Vec<String> = (0..self.world).filter(|r| *r != self.rank).map(key).collect();
        let _spoken = Waiting::begin(format!("rank {}", self.rank), "the other ranks to end");
        self.client.wait(&others, timeout).context("wait for the other ranks to leave the job's store")
    }
}

/// Connects to the job's store at `addr` (`host:port`), with the secret of this process's environment. For ranks whose
/// store is another one than when they started.
///
/// # Errors
/// As [`RankEnv::store`].
pub fn connect(addr: &str, timeout: Duration) -> Result<StoreClient> {
    let trust = Trust::given(None, false)?;
    let (host, port) = net::split_endpoint(addr, 0)?;
    trust.check(&host, port)?;
    StoreClient::connect_with(addr, &trust.secret, timeout)
}

/// 128 bits of FNV-1a over a configuration and our version: ranks of another build or run file must not mix in.
pub fn fingerprint(identity: &str) -> [u8; 16] {
    let text = format!("{} {identity}", env!("CARGO_PKG_VERSION"));
    let hash = text.bytes().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |h, b| {
        (h ^ u128::from(b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    hash.to_le_bytes()
}

impl RankEnv {
    /// Connects to the job's store within `timeout`. Under `phalanx launch` the agent hosts it; else rank 0 does, and
    /// the others find it at the master's address: through PyTorch's store under torchrun, else at the master's port.
    ///
    /// The job's secret is in the environment; under torchrun it goes through PyTorch's store too, if it is not there.
    ///
    /// # Errors
    /// The master's address is not known, its port is taken, nobody answers in time, or a secret is needed and not there,
    /// or another one.
    pub fn store(&self, timeout: Duration) -> Result<RankStore> {
        if let Some(addr) = &self.agent_store {
            let client = connect(addr, timeout).context(format!("rank {}", self.rank))?;
            return Ok(self.rank_store(client, None));
        }
        let trust = Trust::given(None, false)?;
        let connect = |addr: &str| {
            StoreClient::connect_with(addr, &trust.secret, timeout).context(format!("rank {}", self.rank))
        };
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        if self.world == 1 {
            let server = StoreServer::start_with(any_port, &trust.secret)?;
            return Ok(self.rank_store(connect(&server.addr().to_string())?, Some(server)));
        }
        let (host, port) = self.master()?;
        if self.torch_store {
            return self.through_torch(&host, port, timeout, trust);
        }
        trust.check(&host, port)?;
        let server = if self.rank == 0 { Some(self.host_at(&host, port, &trust.secret)?) } else { None };
        Ok(self.rank_store(connect(&net::join_endpoint(&host, port))?, server))
    }

    pub(crate) fn rank_store(&self, client: StoreClient, server: Option<StoreServer>) -> RankStore {
        RankStore { client, server, rank: self.rank, world: self.world, session: self.session.clone() }
    }

    fn master(&self) -> Result<(String, u16)> {
        let hint = match self.launcher {
            Launcher::OpenMpi => {
                "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=<free port> ..., or --transport mpi, which needs neither"
            }
            Launcher::Pmi => {
                "mpirun -genv MASTER_ADDR <host of rank 0> -genv MASTER_PORT <free port> ..., or --transport mpi, which \
                 needs neither"
            }
            Launcher::Phalanx | Launcher::Torchrun => {
                "export MASTER_ADDR=<host of rank 0> MASTER_PORT=<free port>, or unset RANK and WORLD_SIZE to be no rank"
            }
            Launcher::Slurm => "export MASTER_ADDR=<host of rank 0> MASTER_PORT=<free port>",
        };
        let unknown =
            |name: &str| Error::user(format!("{name} is not set, so the ranks cannot meet")).hint(hint);
        let host = self.master_addr.clone().ok_or_else(|| unknown("MASTER_ADDR"))?;
        Ok((host, self.master_port.ok_or_else(|| unknown("MASTER_PORT"))?))
    }

    fn host_at(&self, host: &str, port: u16, secret: &Secret) -> Result<StoreServer> {
        let ip = crate::bind::from_env()?.unwrap_or_else(|| match net::is_loopback(host, port) {
            true => Ipv4Addr::LOCALHOST.into(),
            false => net::bindable(host, port),
        });
        StoreServer::start_with(SocketAddr::new(ip, port), secret)
            .map_err(|e| e.hint("another job may use the port: set MASTER_PORT to a free one"))
            .context("rank 0 hosts the job's store")
    }

    /// Rank 0 starts our store at any port and leaves its address in PyTorch's, with the job's secret if none was given to
    /// all: that is as safe then as PyTorch's store is, which asks nobody who he is.
    fn through_torch(&self, host: &str, port: u16, timeout: Duration, trust: Trust) -> Result<RankStore> {
        let mut torch = TorchStore::connect(host, port, timeout)?;
        let key = format!("phalanx/{}/store", self.session);
        if self.rank > 0 {
            let value = torch.get(&key)?;
            let text =
                String::from_utf8(value).map_err(|_| Error::failure(format!("{key} holds no address")))?;
            let (addr, secret) = match text.split_once('\n') {
                Some((addr, secret)) if trust.secret.is_none() => {
                    (addr, Secret::parse(secret, "from PyTorch's store")?)
                }
                Some((addr, _)) => (addr, trust.secret),
                None => (text.as_str(), trust.secret),
            };
            let client =
                StoreClient::connect_with(addr, &secret, timeout).context(format!("rank {}", self.rank))?;
            return Ok(self.rank_store(client, None));
        }
        let is_given = !trust.secret.is_none();
        let trust = trust.or_random()?;
        let towards = || net::resolve(host, port).into_iter().find_map(net::address_towards);
        let ip = crate::bind::from_env()?.or_else(towards).unwrap_or(Ipv4Addr::LOCALHOST.into());
        let server = StoreServer::start_with(SocketAddr::new(ip, 0), &trust.secret)?;
        let addr = server.addr().to_string();
        let secret = trust.text().filter(|_| !is_given).map_or(String::new(), |text| format!("\n{text}"));
        torch.set(&key, format!("{addr}{secret}").as_bytes())?;
        let client = StoreClient::connect_with(&addr, &trust.secret, timeout).context("rank 0")?;
        Ok(self.rank_store(client, Some(server)))
    }
}
