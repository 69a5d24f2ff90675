//! What goes wrong, as data: slow ranks, bad links, pauses and failures, written in TOML.

mod jitter;

use serde::Deserialize;
use spec::random::mix;
use spec::{Cluster, Error, Result};

use crate::clock::{TICKS_PER_S, USUAL, ticks};
use crate::draw::Draw;
use crate::jitter::{Distribution, Jitter};
use crate::world::{Disturbed, Flap, Mark, Window};

/// What goes wrong in a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scenario {
    parts: Vec<Part>,
    /// Standard deviation of the nodes' speed.
    spread: f64,
    /// Whether storage is reached through the ports between nodes.
    pub storage_on_fabric: bool,
    ranks: usize,
    per_node: usize,
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq)]
struct Part {
    /// As in the file: "slow 1".
    at: String,
    what: What,
    /// Only in this step, counted from 1.
    step: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
enum What {
    Speed(std::ops::Range<usize>, f64),
    Port(std::ops::Range<usize>, f64),
    Domain(std::ops::Range<usize>, f64),
    Tier(usize, usize, f64),
    Window(std::ops::Range<usize>, Window),
    Flap(std::ops::Range<usize>, Flap),
    Storage(f64),
    Jitter(std::ops::Range<usize>, Distribution),
    Fail,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    slow: Vec<Entry>,
    #[serde(default)]
    link: Vec<Entry>,
    #[serde(default)]
    switch: Vec<Entry>,
    #[serde(default)]
    throttle: Vec<Entry>,
    #[serde(default)]
    pause: Vec<Entry>,
    #[serde(default)]
    fail: Vec<Entry>,
    #[serde(default)]
    flap: Vec<Entry>,
    #[serde(default)]
    storage: Vec<Entry>,
    #[serde(default)]
    jitter: Vec<Entry>,
    #[serde(default)]
    spread: Option<f64>,
    #[serde(default)]
    storage_on_fabric: bool,
}

/// All keys of all kinds of entries; each kind says which it takes.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    rank: Option<usize>,
    node: Option<usize>,
    tier: Option<usize>,
    group: Option<usize>,
    factor: Option<f64>,
    inside: Option<bool>,
    from_s: Option<f64>,
    for_s: Option<f64>,
    every_s: Option<f64>,
    distribution: Option<String>,
    spread: Option<f64>,
    chance: Option<f64>,
    step: Option<u64>,
}

/// Links that carry less than this share carry nothing in earnest: a step would never end.
const SHARE_MIN: f64 = 1e-3;
/// Slower is broken.
const FACTOR_MAX: f64 = 1e3;
/// Longer than any step; and what ticks can count many times.
const SECONDS_MAX: f64 = 1e6;
/// Ports that come and go faster than this are noise in the rate of the link, and give it as one.
const FLAP_MIN_S: f64 = 1e-3;
/// Standard deviations of speed beyond which nodes are not of one kind.
const SPREAD_MAX: f64 = 0.2;

impl Scenario {
    /// Reads a scenario for a job of `ranks` on `cluster`:
    ///
    /// ```
    /// use sim::scenario::Scenario;
    /// let cluster = spec::Catalog::builtin()?.cluster("dgx-h100", Some(64))?;
    /// let text = "
    ///     [[slow]]        # kernels take 1.3 times as long
    ///     node = 3
    ///     factor = 1.3
    ///     [[link]]        # the port between nodes carries a quarter; `inside = true` for links inside the node
    ///     rank = 9
    ///     factor = 0.25
    ///     [[pause]]       # kernels stand still
    ///     rank = 0
    ///     from_s = 0.5
    ///     for_s = 0.2
    ///     step = 2        # in the second step alone
    ///     [[flap]]        # the port carries a tenth for 20 ms of every 100
    ///     rank = 9
    ///     factor = 0.1
    ///     every_s = 0.1
    ///     for_s = 0.02
    ///     [[storage]]     # a server of it fails
    ///     factor = 0.5
    ///     [[jitter]]      # every kernel is drawn anew; without `rank` or `node` those of all ranks
    ///     rank = 9
    ///     distribution = \"lognormal\"
    ///     spread = 0.05
    ///     [[fail]]        # the job restarts
    ///     node = 7
    ///     step = 3
    /// ";
    /// let scenario = Scenario::parse("storm.toml", text, &cluster)?;
    /// assert_eq!(scenario.disturbed(1, 0).ranks.len(), 9);
    /// assert!(Scenario::parse("storm.toml", "[[slow]]\nnode = 8\nfactor = 2", &cluster).is_err());
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// Text that is no TOML, an unknown key, a node or link that does not exist, a factor without meaning.
    pub fn parse(place: &str, text: &str, cluster: &Cluster) -> Result<Self> {
        let file: File = toml::from_str(text).map_err(|e| {
            Error::user(format!("{place}: {}", e.to_string().trim()))
                .hint("a scenario has tables [[slow]], [[link]], [[switch]], [[throttle]], [[pause]], [[flap]], [[storage]], [[jitter]] and [[fail]], and the keys spread and storage_on_fabric")
        })?;
        let reader = Reader { place, cluster };
        let mut parts = Vec::new();
        let kinds: [(&str, Vec<Entry>); 9] = [
            ("slow", file.slow),
            ("link", file.link),
            ("switch", file.switch),
            ("throttle", file.throttle),
            ("pause", file.pause),
            ("fail", file.fail),
            ("flap", file.flap),
            ("storage", file.storage),
            ("jitter", file.jitter),
        ];
        for (kind, entries) in kinds {
            for (i, entry) in entries.iter().enumerate() {
                let at = format!("{kind} {}", i + 1);
                if entry.step == Some(0) {
                    return Err(reader.error(&at, "step = 0", "steps are counted from 1"));
                }
                parts.push(Part { what: reader.what(kind, &at, entry)?, step: entry.step, at });
            }
        }
        let spread = file.spread.unwrap_or(0.0);
        if !(0.0..=SPREAD_MAX).contains(&spread) {
            let what = format!("{place}: spread = {}, expected 0 to {SPREAD_MAX}", short(spread));
            return Err(
                Error::user(what).hint("the standard deviation of the nodes' speed, as a share of it")
            );
        }
        let storage_on_fabric = file.storage_on_fabric;
        Ok(Scenario {
            parts,
            spread,
            storage_on_fabric,
            ranks: cluster.accelerators,
            per_node: cluster.per_node,
        })
    }

    /// What differs in a step, counted from 1.
    pub fn disturbed(&self, step: u64, seed: u64) -> Disturbed {
        let mut out = Disturbed::default();
        let scaled = |rate: u64, by: f64| ((rate as f64 * by).round() as u64).max(1);
        if self.spread > 0.0 {
            for rank in 0..self.ranks {
                let by = 1.0 + self.spread * Draw::new(seed, (rank / self.per_node) as u64).normal();
                let mark = out.ranks.entry(rank).or_default();
                mark.speed = scaled(mark.speed, by.max(SHARE_MIN));
            }
        }
        for part in self.parts.iter().filter(|p| p.step.is_none_or(|s| s == step)) {
            let mut each = |ranks: &std::ops::Range<usize>, change: &dyn Fn(&mut Mark)| {
                ranks.clone().for_each(|rank| change(out.ranks.entry(rank).or_default()));
            };
            match &part.what {
                What::Speed(ranks, by) => each(ranks, &|m| m.speed = scaled(m.speed, 1.0 / by)),
                What::Port(ranks, by) => each(ranks, &|m| m.port = scaled(m.port, *by)),
                What::Domain(ranks, by) => each(ranks, &|m| m.domain = scaled(m.domain, *by)),
                What::Window(ranks, window) => each(ranks, &|m| m.windows.push(*window)),
                What::Tier(tier, group, by) => {
                    let rate = out.tiers.entry((*tier, *group)).or_insert(USUAL);
                    *rate = scaled(*rate, *by);
                }
                What::Flap(ranks, flap) => each(ranks, &|m| m.flap = Some(*flap)),
                What::Jitter(ranks, distribution) => {
                    // A draw of its own for each rank, step and entry.
                    let of = part.at.bytes().fold(mix(seed), |a, b| mix(a ^ u64::from(b))) ^ mix(step);
                    for rank in ranks.clone() {
                        let jitter = Jitter { distribution: *distribution, seed: mix(of ^ mix(rank as u64)) };
                        out.ranks.entry(rank).or_default().jitter.push(jitter);
                    }
                }
                What::Storage(by) => out.storage = Some(scaled(out.storage.unwrap_or(USUAL), *by)),
                What::Fail => {}
            }
        }
        out
    }

    /// What goes wrong in steps, as in the file: `slow 1`; failures are no part of a step.
    pub fn names(&self) -> Vec<&str> {
        self.parts.iter().filter(|p| p.what != What::Fail).map(|p| p.at.as_str()).collect()
    }

    /// What goes wrong only in a step after the first `steps`, and in which; failures too.
    pub fn beyond(&self, steps: u64) -> impl Iterator<Item = (&str, u64)> {
        self.parts.iter().filter_map(move |p| Some((p.at.as_str(), p.step.filter(|step| *step > steps)?)))
    }

    /// The same without one of the [`names`](Self::names).
    #[must_use]
    pub fn without(&self, name: &str) -> Self {
        let parts = self.parts.iter().filter(|p| p.at != name).cloned().collect();
        Scenario { parts, ..self.clone() }
    }

    /// The same with no rank slower than others.
    #[must_use]
    pub fn with_even_ranks(&self) -> Self {
        let parts = self.parts.iter().filter(|p| !is_of_ranks(&p.what));
        Scenario { parts: parts.cloned().collect(), spread: 0.0, ..self.clone() }
    }

    /// The same with no link, switch or storage worse than others.
    #[must_use]
    pub fn with_good_links(&self) -> Self {
        let is_bad = |p: &&Part| is_of_ranks(&p.what) || p.what == What::Fail;
        Scenario { parts: self.parts.iter().filter(is_bad).cloned().collect(), ..self.clone() }
    }

    /// The share of storage's rates that is left in every step.
    pub fn storage_left(&self) -> f64 {
        let lasting = self.parts.iter().filter(|p| p.step.is_none());
        lasting.map(|p| if let What::Storage(by) = p.what { by } else { 1.0 }).product()
    }

    /// Steps in which the job fails.
    pub fn failing_steps(&self) -> impl Iterator<Item = u64> + '_ {
        self.parts.iter().filter(|p| p.what == What::Fail).filter_map(|p| p.step)
    }

    /// Whether every step is like the others.
    pub fn is_steady(&self) -> bool {
        let alike = |p: &Part| p.step.is_none() && !matches!(p.what, What::Jitter(..));
        self.parts.iter().all(|p| alike(p) || p.what == What::Fail)
    }
}

/// Whether it makes ranks compute at other speeds than others.
fn is_of_ranks(what: &What) -> bool {
    matches!(what, What::Speed(..) | What::Window(..) | What::Jitter(..))
}

struct Reader<'a> {
    place: &'a str,
    cluster: &'a Cluster,
}

impl Reader<'_> {
    fn error(&self, at: &str, what: &str, hint: &str) -> Error {
        Error::user(format!("{}: {at}: {what}", self.place)).hint(hint)
    }

    fn what(&self, kind: &str, at: &str, e: &Entry) -> Result<What> {
        self.only(kind, at, e)?;
        let share = |hint: &str| self.number(at, "factor", e.factor, SHARE_MIN, 1.0, hint);
        Ok(match kind {
            "slow" => {
                let hint = "how many times as long kernels take";
                What::Speed(
                    self.ranks(at, e)?,
                    self.number(at, "factor", e.factor, 1.0 / FACTOR_MAX, FACTOR_MAX, hint)?,
                )
            }
            "link" => {
                let by =
                    share("the share of the link's rate that is left; for a lost link let the node fail")?;
                let ranks = self.ranks(at, e)?;
                if e.inside == Some(true) { What::Domain(ranks, by) } else { What::Port(ranks, by) }
            }
            "switch" => {
                let (tier, group) = self.switch(at, e)?;
                What::Tier(tier, group, share("the share of the links upwards that is left")?)
            }
            "flap" => What::Flap(self.ranks(at, e)?, self.flap(at, e)?),
            "jitter" => self.jitter(at, e)?,
            "storage" => What::Storage(share("the share of its rates that storage has left")?),
            "throttle" | "pause" => {
                let from = self.begin_s(at, e)?;
                let length =
                    self.number(at, "for_s", e.for_s, 1.0 / TICKS_PER_S, SECONDS_MAX, "how many seconds")?;
                let speed = match kind {
                    "pause" => 0.0,
                    _ => share("the share of the clock that is left")?,
                };
                let window = Window {
                    from: ticks(from),
                    to: ticks(from + length),
                    speed: (speed * USUAL as f64).round() as u64,
                };
                What::Window(self.ranks(at, e)?, window)
            }
            _ => {
                if e.step.is_none() {
                    return Err(self.error(at, "no step", "say in which step it fails, as step = 3"));
                }
                if e.tier.is_some() {
                    self.switch(at, e)?;
                } else {
                    self.ranks(at, e)?;
                }
                What::Fail
            }
        })
    }

    /// When in the step it begins.
    fn begin_s(&self, at: &str, e: &Entry) -> Result<f64> {
        let from_s = Some(e.from_s.unwrap_or(0.0));
        self.number(at, "from_s", from_s, 0.0, SECONDS_MAX, "seconds into the step")
    }

    fn flap(&self, at: &str, e: &Entry) -> Result<Flap> {
        let hint = "the share of the port's rate that is left meanwhile";
        let share = self.number(at, "factor", e.factor, SHARE_MIN, 1.0, hint)?;
        let from = self.begin_s(at, e)?;
        let every = self.number(
            at,
            "every_s",
            e.every_s,
            FLAP_MIN_S,
            SECONDS_MAX,
            "seconds from one time to the next",
        )?;
        let hint = "how long each time lasts, less than every_s";
        let length =
            self.number(at, "for_s", e.for_s, 1.0 / TICKS_PER_S, every * (1.0 - f64::EPSILON), hint)?;
        Ok(Flap {
            from: ticks(from),
            every: ticks(every),
            length: ticks(length).max(1),
            share: (share * USUAL as f64).round() as u64,
        })
    }

    /// Refuses keys that a kind has no use for.
    fn only(&self, kind: &str, at: &str, e: &Entry) -> Result<()> {
        let given = [
            ("rank", e.rank.is_some()),
            ("node", e.node.is_some()),
            ("tier", e.tier.is_some()),
            ("group", e.group.is_some()),
            ("factor", e.factor.is_some()),
            ("inside", e.inside.is_some()),
            ("from_s", e.from_s.is_some()),
            ("for_s", e.for_s.is_some()),
            ("every_s", e.every_s.is_some()),
            ("distribution", e.distribution.is_some()),
            ("spread", e.spread.is_some()),
            ("chance", e.chance.is_some()),
        ];
        let takes: &[&str] = match kind {
            "slow" => &["rank", "node", "factor"],
            "link" => &["rank", "node", "factor", "inside"],
            "switch" => &["tier", "group", "factor"],
            "throttle" => &["rank", "node", "factor", "from_s", "for_s"],
            "pause" => &["rank", "node", "from_s", "for_s"],
            "flap" => &["rank", "node", "factor", "from_s", "for_s", "every_s"],
            "storage" => &["factor"],
            "jitter" => &["rank", "node", "distribution", "spread", "chance", "factor"],
            _ => &["rank", "node", "tier", "group"],
        };
        match given.iter().find(|(key, is)| *is && !takes.contains(key)) {
            Some((key, _)) => {
                let hint = format!("[[{kind}]] takes {} and step", takes.join(", "));
                Err(self.error(at, &format!("has no use for {key}"), &hint))
            }
            None => Ok(()),
        }
    }

    fn ranks(&self, at: &str, e: &Entry) -> Result<std::ops::Range<usize>> {
        let (ranks, per_node) = (self.cluster.accelerators, self.cluster.per_node);
        let nodes = ranks.div_ceil(per_node);
        match (e.rank, e.node) {
            (Some(rank), None) if rank < ranks => Ok(rank..rank + 1),
            (Some(rank), None) => {
                let hint = format!("the job has ranks 0 to {}", ranks - 1);
                Err(self.error(at, &format!("rank {rank} does not exist"), &hint))
            }
            (None, Some(node)) if node < nodes => Ok(node * per_node..((node + 1) * per_node).min(ranks)),
            (None, Some(node)) => {
                let hint = format!("the job has nodes 0 to {}", nodes - 1);
                Err(self.error(at, &format!("node {node} does not exist"), &hint))
            }
            _ => Err(self.error(at, "expected either rank or node", "say where, as node = 3")),
        }
    }

    fn switch(&self, at: &str, e: &Entry) -> Result<(usize, usize)> {
        let tiers = &self.cluster.scale_out.tiers;
        let (Some(tier), Some(group)) = (e.tier, e.group) else {
            return Err(self.error(
                at,
                "expected tier and group",
                "say which switch, as tier = 1 and group = 0",
            ));
        };
        let Some(known) = tier.checked_sub(1).and_then(|t| tiers.get(t)) else {
            let hint = format!(
                "fabric {} has {} tiers in the catalogue, counted from 1",
                self.cluster.scale_out.fabric,
                tiers.len()
            );
            return Err(self.error(at, &format!("tier {tier} does not exist"), &hint));
        };
        let groups = self.cluster.accelerators.div_ceil(known.accelerators.max(1));
        if group >= groups {
            let hint = format!("the job lies under groups 0 to {} of tier {tier}", groups - 1);
            return Err(self.error(at, &format!("group {group} does not exist"), &hint));
        }
        Ok((tier - 1, group))
    }

    fn number(&self, at: &str, key: &str, n: Option<f64>, min: f64, max: f64, hint: &str) -> Result<f64> {
        match n {
            Some(n) if (min..=max).contains(&n) => Ok(n),
            Some(n) => {
                let [n, min, max] = [n, min, max].map(short);
                Err(self.error(at, &format!("{key} = {n}, expected {min} to {max}"), hint))
            }
            None => Err(self.error(at, &format!("no {key}"), hint)),
        }
    }
}

/// A number in the fewest digits: `1e300`, not three hundred zeros.
fn short(n: f64) -> String {
    format!("{n:?}").trim_end_matches(".0").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let cluster = spec::Catalog::builtin().unwrap().cluster("dgx-h100", Some(64)).unwrap();
        let found =
            Scenario::parse("s.toml", text, &cluster).map_or_else(|e| e.to_string(), |_| "fine".to_owned());
        assert!(found.starts_with(expected), "{text}: {found}");
    }

    #[test]
    fn nonsense_is_refused_by_place() {
        check("", "fine");
        check("spread = 0.01\n[[slow]]\nrank = 63\nfactor = 1.5", "fine");
        check("[[slow]]\nrank = 64\nfactor = 1.5", "s.toml: slow 1: rank 64 does not exist");
        check("[[slow]]\nnode = 8\nfactor = 1.5", "s.toml: slow 1: node 8 does not exist");
        check("[[slow]]\nrank = 1\nfactor = -2", "s.toml: slow 1: factor = -2, expected");
        check("[[slow]]\nrank = 1\nfactor = nan", "s.toml: slow 1: factor = NaN, expected");
        check("[[slow]]\nrank = 1\nfactor = 1e300", "s.toml: slow 1: factor = 1e300, expected 0.001 to 1000");
        check("[[pause]]\nrank = 1\nfor_s = 0", "s.toml: pause 1: for_s = 0, expected 1e-12 to 1000000");
        check("[[link]]\nrank = 1\nfactor = 0", "s.toml: link 1: factor = 0, expected");
        check("[[link]]\nrank = 1\nnode = 1\nfactor = 0.5", "s.toml: link 1: expected either rank or node");
        check("[[switch]]\ntier = 9\ngroup = 0\nfactor = 0.5", "s.toml: switch 1: tier 9 does not exist");
        check("[[pause]]\nrank = 1", "s.toml: pause 1: no for_s");
        check("[[flap]]\nrank = 1\nfactor = 0.1\nevery_s = 0.5\nfor_s = 0.2", "fine");
        check("[[flap]]\nrank = 1\nfactor = 0.1\nevery_s = 0.5\nfor_s = 0.5", "s.toml: flap 1: for_s = 0.5");
        check("[[flap]]\nrank = 1\nfactor = 0.1\nfor_s = 0.5", "s.toml: flap 1: no every_s");
        check("[[jitter]]\nspread = 0.05", "fine");
        check("[[jitter]]\nnode = 1\ndistribution = \"exponential\"\nspread = 0.05", "fine");
        check("[[jitter]]\ndistribution = \"spike\"\nchance = 0.01\nfactor = 10", "fine");
        check("[[jitter]]", "s.toml: jitter 1: no spread");
        check("[[jitter]]\nspread = nan", "s.toml: jitter 1: spread = NaN, expected");
        check("[[jitter]]\nspread = 0.1\nfactor = 2", "s.toml: jitter 1: lognormal has no use for factor");
        check("[[jitter]]\ndistribution = \"cauchy\"", "s.toml: jitter 1: distribution = \"cauchy\"");
        check("[[jitter]]\ndistribution = \"spike\"\nchance = 2\nfactor = 2", "s.toml: jitter 1: chance = 2");
        check("[[jitter]]\nrank = 64\nspread = 0.1", "s.toml: jitter 1: rank 64 does not exist");
        check("[[slow]]\nrank = 1\nfactor = 2\nspread = 1", "s.toml: slow 1: has no use for spread");
        check("[[storage]]\nfactor = 0.5", "fine");
        check("[[storage]]\nfactor = -0.5", "s.toml: storage 1: factor = -0.5, expected");
        check("[[storage]]\nnode = 1\nfactor = 0.5", "s.toml: storage 1: has no use for node");
        check("[[fail]]\nnode = 1", "s.toml: fail 1: no step");
        check("[[fail]]\nnode = 1\nstep = 0", "s.toml: fail 1: step = 0");
        check("[[slow]]\nrank = 1\nfactor = 2\ninside = true", "s.toml: slow 1: has no use for inside");
        check("[[slwo]]\nrank = 1", "s.toml: TOML");
        check("spread = 3", "s.toml: spread = 3, expected");
        check("spread = 1e200", "s.toml: spread = 1e200, expected 0 to 0.2");
    }
}
