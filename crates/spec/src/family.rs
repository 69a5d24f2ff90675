use crate::Result;
use crate::catalog::{Catalog, EntryKind, Measure};
use crate::cluster::need;

/// Accelerators of one architecture: what the libraries written for it reach. Constants are fitted by its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// Its name.
    pub name: String,
    /// The training stack that people would use on it today.
    pub software: String,
    /// How its matrix units take work.
    pub matrix_units: MatrixUnits,
    /// Share of the dense peak that large products reach, where that is known of the family as a whole.
    pub matmul_share: Option<Measure>,
    /// Share of a last wave's idle units that libraries put to work by splitting tiles over the inner dim.
    pub tail_filled: Measure,
    /// Share of the dense peak that the forward pass of its own fused attention kernels reaches on endless sequences.
    pub attention: Measure,
    /// The same of kernels written for the Ampere generation.
    pub attention_generic: Measure,
    /// Tokens of a sequence on which attention reaches half of that.
    pub attention_half_tokens: Measure,
    /// Share of the scale-up rate that a ring reaches.
    pub ring: Measure,
    /// Share that all-reduce reaches where switches add, if they can (over 1: it moves half the bytes).
    pub in_switch: Option<Measure>,
    /// Before the first byte of any collective.
    pub collective_base_s: Measure,
    /// Each step of a ring or tree inside a domain.
    pub collective_step_s: Measure,
    /// Each step between domains, switches not included.
    pub collective_step_out_s: Measure,
    /// Added for each doubling of the bytes beyond 1 MiB, where channels and protocols ramp up.
    pub collective_ramp_s: Option<Measure>,
}

/// How matrix units take work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixUnits {
    /// Output tiles on many small units side by side.
    Tiles,
    /// Few large systolic arrays, programmed ahead by a compiler.
    Systolic,
}

/// Stands in for families that the catalogue knows nothing of.
const UNKNOWN: &str = "other";

impl Catalog {
    /// What is known of a family of accelerators; the mean of what is known where nothing is, which `assumptions` is
    /// told.
    ///
    /// # Errors
    /// If the entry lacks a figure.
    pub fn family(&self, name: &str, assumptions: &mut Vec<String>) -> Result<Family> {
        let entry = match self.get(EntryKind::Family, name) {
            Ok(entry) => entry,
            Err(_) => {
                assumptions.push(format!("family {name}: no figures, those of `{UNKNOWN}` stand in"));
                self.get(EntryKind::Family, UNKNOWN)?
            }
        };
        let number = |key| need(entry, key);
        Ok(Family {
            name: name.to_owned(),
            software: entry.text("software").unwrap_or_default().to_owned(),
            matrix_units: match entry.text("matrix_units") {
                Some("systolic") => MatrixUnits::Systolic,
                _ => MatrixUnits::Tiles,
            },
            matmul_share: entry.measure("matmul_share"),
            tail_filled: number("tail_filled")?,
            attention: number("attention")?,
            attention_generic: number("attention_generic")?,
            attention_half_tokens: number("attention_half")?,
            ring: number("ring")?,
            in_switch: entry.measure("in_switch"),
            collective_base_s: number("collective_base")?,
            collective_step_s: number("collective_step")?,
            collective_step_out_s: number("collective_step_out")?,
            collective_ramp_s: entry.measure("collective_ramp"),
        })
    }
}
