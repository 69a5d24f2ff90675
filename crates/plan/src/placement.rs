//! How an estimated step is spread over accelerators: the layout that trains, and the axes that are estimated only.

use std::fmt;

use serde::Serialize;
use spec::{DType, ExpertRows, Layout, NumberFormat, PipelineSchedule, Reduce};

/// A layout with the choices that are estimated beside it.
///
/// Ranks are placed tp innermost, then cp, dp, pp, unless [`Placement::order`] says otherwise. Experts are spread over the
/// ranks of `cp x dp`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Placement {
    /// Axes, schedule, ZeRO stage and recompute as the trainer knows them.
    pub layout: Layout,
    /// Format of the matrix products.
    #[serde(serialize_with = "format_name")]
    pub format: NumberFormat,
    /// Which axis lies on which links.
    pub order: Order,
}

impl Placement {
    /// What other training stacks do where nothing is asked: rings, and room for an even share of rows to experts.
    pub(crate) fn foreign() -> Layout {
        Layout { reduce: Reduce::Ring, expert_rows: ExpertRows::Even, ..Layout::default() }
    }
}

fn format_name<S: serde::Serializer>(format: &NumberFormat, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(format.name())
}

/// The order in which axes fill the machine, innermost first; tp and cp always come before the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Megatron's default: replicas of a stage are near, stages are far.
    #[default]
    TpCpDpPp,
    /// Stages are near, replicas are far.
    TpCpPpDp,
}

impl fmt::Display for Placement {
    /// As [`crate::given::parse`] reads it, without what goes without saying.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = &self.layout;
        write!(f, "tp={},pp={},dp={}", l.tp, l.pp, l.dp)?;
        for (key, value) in [("cp", l.cp), ("ep", l.ep), ("chunks", l.chunks)] {
            if value > 1 {
                write!(f, ",{key}={value}")?;
            }
        }
        if l.deals_heads() {
            f.write_str(",context=heads")?;
        }
        if !l.stage_layers.is_empty() {
            let counts: Vec<String> = l.stage_layers.iter().map(usize::to_string).collect();
            write!(f, ",stage_layers={}", counts.join("/"))?;
        }
        if matches!(l.schedule, PipelineSchedule::ZeroBubble | PipelineSchedule::Gpipe) {
            write!(f, ",schedule={}", l.schedule.name())?;
        }
        write!(f, ",micro_batch={},zero={}", l.micro_batch, u8::from(l.zero))?;
        if let Some(shard) = l.shard.filter(|shard| *shard < l.dp) {
            write!(f, ",shard={shard}")?;
        }
        if l.tp > 1 {
            write!(f, ",sequence_parallel={}", l.sequence_parallel)?;
        }
        write!(f, ",recompute={}", l.recompute.name())?;
        if self.order == Order::TpCpPpDp { f.write_str(",order=tp-cp-pp-dp") } else { Ok(()) }
    }
}

impl Placement {
    /// The placement of a step's layout.
    pub fn of(layout: Layout, format: NumberFormat) -> Self {
        Placement { layout, format, order: Order::default() }
    }

    /// The precision of parameters and activations: products in less than 16 bit take bf16.
    pub fn precision(&self) -> DType {
        if self.format.bytes() > 2.0 { DType::F32 } else { DType::Bf16 }
    }

    /// Places from one data-parallel neighbour to the next.
    pub fn dp_stride(&self) -> usize {
        let inner = self.layout.tp * self.layout.cp;
        match self.order {
            Order::TpCpDpPp => inner,
            Order::TpCpPpDp => inner * self.layout.pp,
        }
    }

    /// Places from one stage to the next.
    pub fn pp_stride(&self) -> usize {
        let inner = self.layout.tp * self.layout.cp;
        match self.order {
            Order::TpCpDpPp => inner * self.layout.dp,
            Order::TpCpPpDp => inner,
        }
    }
}
