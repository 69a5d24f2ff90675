//! Constants that turn a roofline into what stacks reach: a handful for each accelerator family, numeric recipe and
//! software generation.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use spec::{Error, Result, guard_toml};

use crate::estimate::Pace;
use crate::software::Software;

/// Number of constants.
pub const COUNT: usize = 7;

/// What a stack makes of the hardware.
#[derive(Clone, Copy, Debug, PartialEq)]
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
    host_s: 1e-5,
    step_s: 0.02,
    experts: 0.75,
};

/// Bounds of each constant: outside of them it would not mean what its name says.
const BOUNDS: [(f64, f64); COUNT] =
    [(0.3, 1.1), (0.2, 1.3), (0.1, 1.2), (0.1, 1.2), (1e-7, 5e-5), (1e-4, 0.3), (0.15, 1.1)];

/// The largest logarithm of a factor, either way.
pub const FACTOR_MAX: f64 = 2.0;

/// Logarithms of factors on the constants, in the order of [`Constants::NAMES`]. A file names them and leaves out zeros,
/// so that a constant added later is 0 in files from before.
pub type Factors = [f64; COUNT];

/// Logarithms of factors on the prior; what is absent is one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// By accelerator family.
    #[serde(deserialize_with = "named")]
    pub family: BTreeMap<String, Factors>,
    /// By numeric recipe.
    #[serde(deserialize_with = "named")]
    pub recipe: BTreeMap<String, Factors>,
    /// By software generation.
    #[serde(deserialize_with = "named")]
    pub software: BTreeMap<String, Factors>,
    /// By accelerator.
    #[serde(default, deserialize_with = "named")]
    pub chip: BTreeMap<String, Factors>,
    /// By lineage of software.
    #[serde(default, deserialize_with = "named")]
    pub lineage: BTreeMap<String, Factors>,
    /// What predictions missed by on sources that the fit had not seen.
    #[serde(default)]
    pub spread: Spreads,
}

/// Errors on sources left out of the fit.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Which combination, joined with `/`.
    pub name: String,
    /// Of steps whose pace this sets; of all where it is absent.
    #[serde(default)]
    pub pace: Option<Pace>,
    /// Rows behind it.
    pub rows: usize,
    /// Nine in ten published times lay within the prediction divided and multiplied by this.
    #[serde(deserialize_with = "spread_factor")]
    pub factor: f64,
    /// The most accelerators of any of these rows.
    pub accelerators: usize,
}

/// How good the evidence behind a prediction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Runs of this accelerator family with this software were predicted unseen, and their pace was set by the same.
    Validated,
    /// Such runs were, but something else set their pace: kernels instead of the host, say.
    OtherPace,
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

/// How much an interval widens (as a power) where nothing of the same pace was validated.
const OTHER_PACE: f64 = 1.25;
/// The same where it was validated on the accelerator's family, or on the stack, but not on both together.
const FAMILY_ALONE: f64 = 1.25;
const SOFTWARE_ALONE: f64 = 1.5;

/// Fewer rows than this say little about a spread.
const SPREAD_ROWS_MIN: usize = 5;
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

    /// How wide an interval has to be for a combination whose step's pace is set by `pace`, and on what evidence.
    pub fn spread(&self, family: &str, software: &str, pace: Pace, accelerators: usize) -> Grade {
        let both = format!("{family}/{software}");
        let find = |list: &[Spread], name: &str, pace: Option<Pace>, widen: f64, evidence| {
            let fits = |s: &&Spread| s.name == name && s.pace == pace && s.rows >= SPREAD_ROWS_MIN;
            list.iter().find(fits).map(|s| {
                let beyond = (accelerators as f64 / s.accelerators.max(1) as f64).log2().max(0.0);
                let widen = widen + WIDER_PER_DOUBLING * beyond;
                Grade { factor: s.factor.powf(widen), rows: s.rows, evidence, accelerators: s.accelerators }
            })
        };
        let of = &self.spread;
        find(&of.both, &both, Some(pace), 1.0, Evidence::Validated)
            .or_else(|| find(&of.both, &both, None, OTHER_PACE, Evidence::OtherPace))
            .or_else(|| find(&of.family, family, Some(pace), FAMILY_ALONE, Evidence::Family))
            .or_else(|| find(&of.family, family, None, FAMILY_ALONE * OTHER_PACE, Evidence::Family))
            .or_else(|| find(&of.software, software, Some(pace), SOFTWARE_ALONE, Evidence::Software))
            .or_else(|| find(&of.software, software, None, SOFTWARE_ALONE * OTHER_PACE, Evidence::Software))
            .unwrap_or(Grade {
                factor: FACTOR_UNKNOWN,
                rows: 0,
                evidence: Evidence::Extrapolated,
                accelerators: 0,
            })
    }

    /// The calibration fitted on the published runs that this project collected.
    ///
    /// # Errors
    /// If the embedded file is broken, which the tests exclude.
    pub fn builtin() -> Result<Self> {
        Self::parse("catalog/calibration.toml", include_str!("../../../catalog/calibration.toml"))
    }

    /// Reads a calibration file. `path` only names it in errors.
    ///
    /// # Errors
    /// If the text is none: with file, line and a hint.
    pub fn parse(path: &str, text: &str) -> Result<Self> {
        let refuse = |byte, why: &str| {
            let line = text.as_bytes().iter().take(byte).filter(|b| **b == b'\n').count() + 1;
            Error::user(format!("{path}:{line}: {why}"))
                .hint("phalanx validate RUNS.csv --fit FILE writes a calibration file")
        };
        guard_toml(text).map_err(|e| refuse(e.byte, &e.why))?;
        toml::from_str(text).map_err(|e| refuse(e.span().map_or(0, |s| s.start), e.message()))
    }

    /// The calibration as a file; [`Calibration::parse`] reads it back, to four digits after the point.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).expect("writing to a string");
        out
    }

    fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        writeln!(
            out,
            "# Fitted on published runs. Logarithms of factors on the priors; what is left out is 0."
        )?;
        for (name, table) in [
            ("family", &self.family),
            ("chip", &self.chip),
            ("recipe", &self.recipe),
            ("lineage", &self.lineage),
            ("software", &self.software),
        ] {
            writeln!(out, "\n[{name}]")?;
            for (key, factors) in table {
                let named = Constants::NAMES.iter().zip(factors).filter(|(_, f)| f.abs() >= 0.5e-4);
                let named: Vec<String> = named.map(|(name, f)| format!("{name} = {f:.4}")).collect();
                let inner = if named.is_empty() { String::new() } else { format!(" {} ", named.join(", ")) };
                writeln!(out, "{key} = {{{inner}}}")?;
            }
        }
        writeln!(
            out,
            "\n# Nine in ten published times of sources left out lay within the prediction over and times `factor`.\n[spread]"
        )?;
        for (name, list) in [
            ("both", &self.spread.both),
            ("family", &self.spread.family),
            ("software", &self.spread.software),
        ] {
            writeln!(out, "{name} = [")?;
            for Spread { name, pace, rows, factor, accelerators } in list {
                let pace = pace.map_or(String::new(), |p| format!("pace = \"{}\", ", p.name()));
                writeln!(
                    out,
                    "    {{ name = \"{name}\", {pace}rows = {rows}, factor = {factor:.3}, accelerators = {accelerators} }},"
                )?;
            }
            writeln!(out, "]")?;
        }
        Ok(())
    }
}

/// Factors of each name, read key by key.
fn named<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<BTreeMap<String, Factors>, D::Error> {
    let named = BTreeMap::<String, Named>::deserialize(d)?;
    Ok(named.into_iter().map(|(name, Named(factors))| (name, factors)).collect())
}

struct Named(Factors);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        d.deserialize_any(NamedVisitor)
    }
}

struct NamedVisitor;

impl<'de> Visitor<'de> for NamedVisitor {
    type Value = Named;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "named factors, {{ {} = 0.1, ... }}", Constants::NAMES[0])
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Named, A::Error> {
        let mut factors = [0.0; COUNT];
        while let Some(name) = map.next_key::<String>()? {
            let at = Constants::NAMES.iter().position(|n| *n == name);
            let at = at.ok_or_else(|| {
                A::Error::custom(format!("unknown constant {name}, expected {}", Constants::NAMES.join(", ")))
            })?;
            let f: f64 = map.next_value()?;
            if !f.is_finite() || f.abs() > FACTOR_MAX {
                let what = format!("{name} = {f}, expected a logarithm of at most {FACTOR_MAX} either way");
                return Err(A::Error::custom(what));
            }
            factors[at] = f;
        }
        Ok(Named(factors))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> std::result::Result<Named, A::Error> {
        Err(A::Error::custom("factors without names, as versions before wrote them: fit the file again"))
    }
}

fn spread_factor<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<f64, D::Error> {
    let factor = f64::deserialize(d)?;
    if factor.is_finite() && factor >= 1.0 {
        return Ok(factor);
    }
    Err(D::Error::custom(format!("factor = {factor}, expected 1 or more")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_back_and_leaves_zeros_out() {
        let mut c = Calibration::builtin().unwrap();
        c.family.insert("plain".into(), [0.0; COUNT]);
        let text = c.to_toml();
        assert!(text.contains("\nplain = {}\n"), "{text}");
        assert_eq!(Calibration::parse("c.toml", &text).unwrap(), c);
        assert_eq!(Calibration::parse("c.toml", &text).unwrap().to_toml(), text);
    }

    #[test]
    fn constants_left_out_are_those_of_the_prior() {
        let c = Calibration::parse("c.toml", "[family]\nhopper = { gemm = 0.1 }\n[recipe]\n[software]\n")
            .unwrap();
        let stack = Software::named("megatron-core-2024").unwrap();
        let expected = Constants { gemm: PRIOR.gemm * 0.1f64.exp(), ..PRIOR };
        assert_eq!(c.constants("hopper", "h100-sxm5", "bf16", &stack), expected);
    }

    #[test]
    fn a_bad_file_is_refused_with_its_line() {
        let check = |hopper: &str, expected: &str| {
            let text =
                format!("[family]\nampere = {{ gemm = 0.1 }}\nhopper = {hopper}\n[recipe]\n[software]\n");
            let e = Calibration::parse("c.toml", &text).unwrap_err();
            assert_eq!(e.to_string(), format!("c.toml:{expected}"), "{hopper}");
            assert!(e.hint_text().is_some_and(|h| h.contains("--fit FILE")));
        };
        check(
            "{ gem = 0.1 }",
            "3: unknown constant gem, expected gemm, attention, stream, network, host_s, step_s, experts",
        );
        check("{ gemm = 3.0 }", "3: gemm = 3, expected a logarithm of at most 2 either way");
        check("{ gemm = nan }", "3: gemm = NaN, expected a logarithm of at most 2 either way");
        check("{ gemm = \"much\" }", "3: invalid type: string \"much\", expected f64");
        check(
            "[0.1, 0, 0, 0, 0, 0, 0]",
            "3: factors without names, as versions before wrote them: fit the file again",
        );
        check("0.1", "3: invalid type: floating point `0.1`, expected named factors, { gemm = 0.1, ... }");
        check(
            "{ gemm = 0.1 }\n[fabric]",
            "4: unknown field `fabric`, expected one of `family`, `recipe`, `software`, `chip`, `lineage`, `spread`",
        );
        check(
            "{}\n[spread]\nboth = [\n{ name = \"a/b\", rows = 5, factor = 0.5, accelerators = 8 },\n]\nfamily = []\nsoftware = []",
            "6: factor = 0.5, expected 1 or more",
        );
    }
}
