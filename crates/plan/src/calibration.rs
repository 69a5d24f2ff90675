//! Constants that turn a roofline into what stacks reach: a handful for each accelerator family, numeric recipe and
//! software generation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::software::Software;

/// Number of constants.
const COUNT: usize = 7;

/// What a stack makes of the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constants {
    /// Matrix products, as a share of the best measured rate of large ones.
    pub gemm: f64,
    /// Fused attention forward, as a share of the 16-bit peak, FLOPs at the causal half.
    pub attention: f64,
    /// Streaming kernels, as a share of the memory throughput for the program's bytes: below one where a stack runs
    /// several kernels for what the program fuses.
    pub stream: f64,
    /// Collectives, as a share of the rate that they reach alone.
    pub network: f64,
    /// Time of the host for each op of the program, in seconds, where kernels are launched one by one.
    pub host_s: f64,
    /// Once a step: data, norms, synchronisation, in seconds.
    pub step_s: f64,
    /// Grouped products of experts, as a share of the rate of dense ones.
    pub experts: f64,
}

impl Constants {
    /// Names of the constants, in the order of [`Constants::get`].
    pub const NAMES: [&'static str; COUNT] =
        ["gemm", "attention", "stream", "network", "host_s", "step_s", "experts"];

    /// All constants in order.
    pub fn get(&self) -> [f64; COUNT] {
        [self.gemm, self.attention, self.stream, self.network, self.host_s, self.step_s, self.experts]
    }

    /// Constants from their values in order.
    pub fn from_values(v: [f64; COUNT]) -> Self {
        Constants {
            gemm: v[0],
            attention: v[1],
            stream: v[2],
            network: v[3],
            host_s: v[4],
            step_s: v[5],
            experts: v[6],
        }
    }
}

/// What is assumed where nothing was fitted: mid-range figures of well-kept stacks.
pub const PRIOR: Constants = Constants {
    gemm: 0.88,
    attention: 0.85,
    stream: 0.6,
    network: 0.8,
    host_s: 6e-6,
    step_s: 0.02,
    experts: 0.75,
};

/// Bounds of each constant: outside of them it would not mean what its name says.
const BOUNDS: [(f64, f64); COUNT] =
    [(0.3, 1.1), (0.2, 1.3), (0.1, 1.2), (0.1, 1.2), (1e-7, 5e-5), (1e-4, 0.3), (0.15, 1.1)];

/// The largest logarithm of a factor, either way.
const FACTOR_MAX: f64 = 2.0;

/// What a factor belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// An accelerator family.
    Family(String),
    /// A numeric recipe.
    Recipe(String),
    /// A software generation.
    Software(String),
    /// One accelerator of a family.
    Chip(String),
    /// All generations of a stack.
    Lineage(String),
}

/// Logarithms of factors on the prior; what is absent is one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// By accelerator family.
    pub family: BTreeMap<String, [f64; COUNT]>,
    /// By numeric recipe.
    pub recipe: BTreeMap<String, [f64; COUNT]>,
    /// By software generation.
    pub software: BTreeMap<String, [f64; COUNT]>,
    /// By accelerator.
    #[serde(default)]
    pub chip: BTreeMap<String, [f64; COUNT]>,
    /// By lineage of software.
    #[serde(default)]
    pub lineage: BTreeMap<String, [f64; COUNT]>,
    /// What predictions missed by on sources that the fit had not seen.
    #[serde(default)]
    pub spread: Spreads,
}

/// Errors on sources left out of the fit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spreads {
    /// By accelerator family and software generation.
    pub both: Vec<Spread>,
    /// By accelerator family.
    pub family: Vec<Spread>,
    /// By software generation.
    pub software: Vec<Spread>,
}

/// How far predictions were off for a combination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Which combination, joined with `/`.
    pub name: String,
    /// Rows behind it.
    pub rows: usize,
    /// Nine in ten published times lay within the prediction divided and multiplied by this.
    pub factor: f64,
    /// The most accelerators of any of these rows.
    pub accelerators: usize,
}

/// One prediction on a source that the fit had not seen.
#[derive(Clone, Debug)]
pub struct Miss {
    /// Accelerator family.
    pub family: String,
    /// Software generation.
    pub software: String,
    /// Accelerators.
    pub accelerators: usize,
    /// Logarithm of predicted over published.
    pub log_error: f64,
}

/// How good the evidence behind a prediction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Runs of this accelerator family with this software were predicted unseen.
    Validated,
    /// Runs of this family with other software were.
    Family,
    /// Runs with this software on other accelerators were.
    Software,
    /// Nothing near was: outside of what was validated.
    Extrapolated,
}

/// The width of an interval and what it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Grade {
    /// The interval is the prediction divided and multiplied by this.
    pub factor: f64,
    /// Rows behind it.
    pub rows: usize,
    /// How near they are.
    pub evidence: Evidence,
    /// The most accelerators of any of them.
    pub accelerators: usize,
}

/// How much an interval widens (as a power) for each doubling of accelerators beyond those validated.
const WIDER_PER_DOUBLING: f64 = 0.15;

/// Fewer rows than this say little about a spread.
const SPREAD_ROWS_MIN: usize = 5;
/// No interval is narrower: runs of the same job differ by more than this.
const FACTOR_MIN: f64 = 1.05;
/// The interval where nothing near was validated.
const FACTOR_UNKNOWN: f64 = 1.6;

impl Calibration {
    /// The constants for a combination.
    pub fn constants(&self, family: &str, chip: &str, recipe: &str, software: &Software) -> Constants {
        let mut v = PRIOR.get();
        for factors in [
            self.family.get(family),
            self.recipe.get(recipe),
            self.software.get(software.name),
            self.lineage.get(software.lineage),
            self.chip.get(chip),
        ]
        .into_iter()
        .flatten()
        {
            for (x, f) in v.iter_mut().zip(factors) {
                *x *= f.exp();
            }
        }
        for (x, (low, high)) in v.iter_mut().zip(BOUNDS) {
            *x = x.clamp(low, high);
        }
        Constants::from_values(v)
    }

    /// How wide an interval has to be for a combination, and on what evidence.
    pub fn spread(&self, family: &str, software: &str, accelerators: usize) -> Grade {
        let both = format!("{family}/{software}");
        let find = |list: &[Spread], name: &str, widen: f64, evidence| {
            list.iter().find(|s| s.name == name && s.rows >= SPREAD_ROWS_MIN).map(|s| {
                let beyond = (accelerators as f64 / s.accelerators.max(1) as f64).log2().max(0.0);
                let widen = widen + WIDER_PER_DOUBLING * beyond;
                Grade { factor: s.factor.powf(widen), rows: s.rows, evidence, accelerators: s.accelerators }
            })
        };
        find(&self.spread.both, &both, 1.0, Evidence::Validated)
            .or_else(|| find(&self.spread.family, family, 1.25, Evidence::Family))
            .or_else(|| find(&self.spread.software, software, 1.5, Evidence::Software))
            .unwrap_or(Grade {
                factor: FACTOR_UNKNOWN,
                rows: 0,
                evidence: Evidence::Extrapolated,
                accelerators: 0,
            })
    }

    /// Learns spreads from errors on unseen sources.
    pub fn learn_spread(&mut self, errors: &[Miss]) {
        let learn = |name: &dyn Fn(&Miss) -> String| {
            let mut groups: BTreeMap<String, (Vec<f64>, usize)> = BTreeMap::new();
            for e in errors {
                let group = groups.entry(name(e)).or_default();
                group.0.push(e.log_error.abs());
                group.1 = group.1.max(e.accelerators);
            }
            let spread = |(name, (mut abs, accelerators)): (String, (Vec<f64>, usize))| {
                abs.sort_by(f64::total_cmp);
                let at = ((abs.len() as f64 * 0.9).ceil() as usize).clamp(1, abs.len()) - 1;
                Spread { name, rows: abs.len(), factor: abs[at].exp().max(FACTOR_MIN), accelerators }
            };
            groups.into_iter().map(spread).collect()
        };
        self.spread = Spreads {
            both: learn(&|e| format!("{}/{}", e.family, e.software)),
            family: learn(&|e| e.family.clone()),
            software: learn(&|e| e.software.clone()),
        };
    }

    /// The calibration fitted on the published runs that this project collected.
    ///
    /// # Errors
    /// If the embedded file is broken, which the tests exclude.
    pub fn builtin() -> spec::Result<Self> {
        Self::parse("catalog/calibration.toml", include_str!("../../../catalog/calibration.toml"))
    }

    /// Reads a calibration file. `path` only names it in errors.
    ///
    /// # Errors
    /// If the text is none.
    pub fn parse(path: &str, text: &str) -> spec::Result<Self> {
        let hint = "a calibration file is what `phalanx validate --fit` writes";
        let read: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start].lines().count().max(1));
            spec::Error::user(format!("{path}:{line}: {}", e.message())).hint(hint)
        })?;
        let tables = [&read.family, &read.chip, &read.recipe, &read.lineage, &read.software];
        let factors = tables.into_iter().flatten().flat_map(|(name, f)| f.iter().map(move |f| (name, *f)));
        for (name, f) in factors {
            if !f.is_finite() || f.abs() > FACTOR_MAX {
                let what =
                    format!("{path}: a factor of {name} is {f}, expected {FACTOR_MAX} at most either way");
                return Err(spec::Error::user(what).hint(hint));
            }
        }
        let spreads = [&read.spread.both, &read.spread.family, &read.spread.software];
        for s in spreads.into_iter().flatten() {
            if !s.factor.is_finite() || s.factor < 1.0 {
                let what = format!("{path}: the spread of {} is {}, expected 1 or more", s.name, s.factor);
                return Err(spec::Error::user(what).hint(hint));
            }
        }
        Ok(read)
    }

    /// The calibration as a file.
    pub fn to_toml(&self) -> String {
        use std::fmt::Write;
        let mut out =
            String::from("# Fitted on published runs. Logarithms of factors on the priors, in the order\n# ");
        out.push_str(&Constants::NAMES.join(", "));
        out.push('\n');
        for (name, table) in [
            ("family", &self.family),
            ("chip", &self.chip),
            ("recipe", &self.recipe),
            ("lineage", &self.lineage),
            ("software", &self.software),
        ] {
            let _ = writeln!(out, "\n[{name}]");
            for (key, factors) in table {
                let list: Vec<String> = factors.iter().map(|f| format!("{f:.4}")).collect();
                let _ = writeln!(out, "{key} = [{}]", list.join(", "));
            }
        }
        out.push_str("\n# Nine in ten published times of sources left out lay within the prediction over and times `factor`.\n[spread]\n");
        for (name, list) in [
            ("both", &self.spread.both),
            ("family", &self.spread.family),
            ("software", &self.spread.software),
        ] {
            let _ = writeln!(out, "{name} = [");
            for s in list {
                let Spread { name, rows, factor, accelerators } = s;
                let _ = writeln!(
                    out,
                    "    {{ name = \"{name}\", rows = {rows}, factor = {factor:.3}, accelerators = {accelerators} }},"
                );
            }
            out.push_str("]\n");
        }
        out
    }

    fn slot(&mut self, effect: &Effect) -> &mut [f64; COUNT] {
        match effect {
            Effect::Family(name) => self.family.entry(name.clone()).or_default(),
            Effect::Recipe(name) => self.recipe.entry(name.clone()).or_default(),
            Effect::Software(name) => self.software.entry(name.clone()).or_default(),
            Effect::Chip(name) => self.chip.entry(name.clone()).or_default(),
            Effect::Lineage(name) => self.lineage.entry(name.clone()).or_default(),
        }
    }

    /// Adds to the logarithm of one factor.
    pub fn nudge(&mut self, effect: &Effect, constant: usize, by: f64) {
        self.slot(effect)[constant] += by;
    }

    /// The logarithm of one factor.
    pub fn factor(&self, effect: &Effect, constant: usize) -> f64 {
        let found = match effect {
            Effect::Family(name) => self.family.get(name),
            Effect::Recipe(name) => self.recipe.get(name),
            Effect::Software(name) => self.software.get(name),
            Effect::Chip(name) => self.chip.get(name),
            Effect::Lineage(name) => self.lineage.get(name),
        };
        found.map_or(0.0, |f| f[constant])
    }

    /// Keeps the logarithm of each factor within what a file may hold.
    pub fn clamp(&mut self) {
        for table in
            [&mut self.family, &mut self.recipe, &mut self.software, &mut self.chip, &mut self.lineage]
        {
            for factors in table.values_mut() {
                for f in factors {
                    *f = f.clamp(-FACTOR_MAX, FACTOR_MAX);
                }
            }
        }
    }
}
