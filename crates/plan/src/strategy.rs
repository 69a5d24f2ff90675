//! Ways to spread a step that have names: what people and papers call them, and which layouts they are.

use serde::Serialize;
use spec::suggest::{self, plain};
use spec::{Error, Layout, Result, Zero};

/// A named way to spread a step over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Each rank has the whole model, other data; gradients are all-reduced (DDP).
    Data,
    /// Weight matrices are cut over ranks (Shoeybi et al. 2019), with copies of the model where ranks are left.
    Tensor,
    /// Layers are cut into stages (Narayanan et al. 2021), with copies of the model where ranks are left.
    Pipeline,
    /// Data, tensor and pipeline parallelism at once.
    ThreeD,
    /// Data parallelism with state sharded, in the fastest of its three stages (Rajbhandari et al. 2020).
    Zero,
    /// The same in one stage; the third is what PyTorch calls FSDP.
    ZeroStage(Zero),
}

/// A strategy with its names, the first of which is printed, and what it means in a sentence.
pub struct Named {
    /// Which one.
    pub strategy: Strategy,
    /// What it is called; blanks, dashes and case do not matter.
    pub names: &'static [&'static str],
    /// What it does.
    pub what: &'static str,
}

/// All strategies.
pub const ALL: [Named; 8] = [
    Named {
        strategy: Strategy::Data,
        names: &[
            "ddp",
            "data parallelism",
            "data parallelism (ddp)",
            "data parallel",
            "dp",
            "distributed data parallel",
        ],
        what: "every accelerator has the whole model and other data; gradients are all-reduced after each step",
    },
    Named {
        strategy: Strategy::Tensor,
        names: &["tensor", "tensor parallelism", "tensor parallel", "tp", "megatron tensor parallelism"],
        what: "weight matrices are cut by columns and rows over the accelerators of a node",
    },
    Named {
        strategy: Strategy::Pipeline,
        names: &["pipeline", "pipeline parallelism", "pipeline parallel", "pp"],
        what: "layers are cut into stages, and micro-batches flow through them",
    },
    Named {
        strategy: Strategy::ThreeD,
        names: &["3d", "3d parallelism", "dp x tp x pp", "megatron", "megatron-lm"],
        what: "data, tensor and pipeline parallelism at once",
    },
    Named {
        strategy: Strategy::Zero,
        names: &[
            "zero",
            "zero redundancy optimizer",
            "zero redundancy optimizer (zero)",
            "deepspeed",
            "deepspeed zero",
        ],
        what: "data parallelism with optimiser state, gradients or parameters sharded: the fastest of the three stages",
    },
    Named {
        strategy: Strategy::ZeroStage(Zero::Optimizer),
        names: &["zero-1", "zero stage 1", "deepspeed zero-1", "distributed optimizer"],
        what: "data parallelism with optimiser state sharded",
    },
    Named {
        strategy: Strategy::ZeroStage(Zero::Gradients),
        names: &["zero-2", "zero stage 2", "deepspeed zero-2"],
        what: "data parallelism with optimiser state and gradients sharded",
    },
    Named {
        strategy: Strategy::ZeroStage(Zero::Parameters),
        names: &["zero-3", "zero stage 3", "deepspeed zero-3", "fsdp", "fully sharded data parallel"],
        what: "data parallelism with optimiser state, gradients and parameters sharded",
    },
];

impl Strategy {
    /// The strategy of that name.
    ///
    /// ```
    /// use plan::strategy::Strategy;
    /// assert_eq!(Strategy::find("3D Parallelism").unwrap().strategy, Strategy::ThreeD);
    /// assert_eq!(Strategy::find("DeepSpeed ZeRO-3").unwrap().strategy, Strategy::find("fsdp").unwrap().strategy);
    /// assert!(Strategy::find("tp=8").is_none());
    /// ```
    pub fn find(name: &str) -> Option<&'static Named> {
        let wanted = plain(name, "");
        ALL.iter().find(|s| s.names.iter().any(|n| plain(n, "") == wanted))
    }

    /// The same, where nothing but a strategy can be meant.
    ///
    /// # Errors
    /// An unknown name, with the nearest.
    pub fn parse(name: &str) -> Result<Self> {
        Self::find(name).map(|s| s.strategy).ok_or_else(|| {
            let near = match suggest::nearest(name, ALL.iter().flat_map(|s| s.names).copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("strategies are {}", ALL.map(|s| s.names[0]).join(", ")),
            };
            Error::user(format!("\"{name}\" is neither a layout nor a strategy"))
                .hint(format!("{near}; a layout is written like --layout tp=8,pp=16,micro_batch=1"))
        })
    }

    /// Whether a layout is of this strategy.
    pub(crate) fn allows(self, l: &Layout) -> bool {
        let alone = l.tp == 1 && l.pp == 1 && l.cp == 1;
        match self {
            Strategy::Data => alone && l.zero == Zero::Off,
            Strategy::Zero => alone && l.zero != Zero::Off,
            Strategy::ZeroStage(stage) => alone && l.zero == stage,
            Strategy::Tensor => l.tp > 1 && l.pp == 1 && l.zero == Zero::Off,
            Strategy::Pipeline => l.tp == 1 && l.pp > 1 && l.zero == Zero::Off,
            Strategy::ThreeD => l.dp > 1 && l.tp > 1 && l.pp > 1,
        }
    }

    /// Whether any layout with so many tensor- and context-parallel ranks is.
    pub(crate) fn allows_inside(self, tp: usize, cp: usize) -> bool {
        match self {
            Strategy::Data | Strategy::Zero | Strategy::ZeroStage(_) => tp == 1 && cp == 1,
            Strategy::Pipeline => tp == 1,
            Strategy::Tensor | Strategy::ThreeD => tp > 1,
        }
    }
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = ALL.iter().find(|s| s.strategy == *self);
        f.write_str(named.map_or("strategy", |s| s.names[0]))
    }
}
