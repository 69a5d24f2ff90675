//! Drills: what goes wrong on purpose, so that people see what their settings make of it before it does by itself.

use std::str::FromStr;
use std::time::Duration;

use program::{Program, Request};
use spec::{Error, Result, RunSpec, suggest};

/// Something that goes wrong at a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drill {
    /// The gradient norm of the step is not a number.
    Nan {
        /// Which step.
        step: u64,
    },
    /// The gradient norm of the step is a million.
    Spike {
        /// Which step.
        step: u64,
    },
    /// Before the step, a bit of what a rank holds of a parameter is another.
    Flip {
        /// Which step.
        step: u64,
        /// Whose memory.
        rank: usize,
        /// Which parameter.
        param: String,
        /// Which bit, from the least.
        bit: u32,
    },
    /// A rank takes longer for its part of each step.
    Slow {
        /// The first such step.
        step: u64,
        /// The last.
        last: u64,
        /// Who.
        rank: usize,
        /// How much longer.
        delay: Duration,
    },
}

/// Bits of the widest element that parameters are stored as; of a narrower one the bit is counted around.
const BITS_MAX: u32 = 32;

impl Drill {
    /// Refuses one that can never strike `run`, of so many ranks, which ends with step `last`.
    ///
    /// # Errors
    /// If there is no such step, rank, bit or parameter.
    pub fn check(&self, run: &RunSpec, ranks: usize, last: u64) -> Result<()> {
        let (step, whose) = match self {
            Drill::Nan { step } | Drill::Spike { step } => (*step, None),
            Drill::Flip { step, rank, .. } | Drill::Slow { step, rank, .. } => (*step, Some(*rank)),
        };
        if step > last {
            return Err(Error::user(format!("step {step} never comes: the run ends with step {last}"))
                .hint("name an earlier step, or let the run go on for longer"));
        }
        if let Some(rank) = whose.filter(|rank| *rank >= ranks) {
            return Err(Error::user(format!("there is no rank {rank}: the run has {ranks}"))
                .hint(format!("ranks count from 0: the last is rank={}", ranks.saturating_sub(1))));
        }
        match self {
            Drill::Slow { step, last, .. } if last < step => {
                Err(Error::user(format!("steps {step} to {last}: the last comes before the first"))
                    .hint("write it like slow@3-9:rank=1:ms=20"))
            }
            Drill::Flip { bit, .. } if *bit >= BITS_MAX => {
                Err(Error::user(format!("there is no bit {bit} of {BITS_MAX}"))
                    .hint("bits count from 0, the least"))
            }
            // A layout that is left to the machine is not known yet.
            Drill::Flip { rank, param, .. } if !run.auto_layout => {
                let p = Program::build(&Request::of(run, *rank), &|_, _| 0)?;
                let names: Vec<&str> =
                    p.groups.iter().flat_map(|g| &g.parts).map(|part| part.name.as_str()).collect();
                match names.contains(&param.as_str()) {
                    true => Ok(()),
                    false => Err(Error::user(format!("rank {rank} has no parameter {param}"))
                        .hint(suggest::hint(param, names))),
                }
            }
            _ => Ok(()),
        }
    }
}

/// Of a sum of squares, so that the norm is a million.
pub(crate) const SPIKE_SQUARED: f64 = 1e12;

const HINT: &str = "nan@STEP, spike@STEP, flip@STEP:rank=R:param=NAME[:bit=B], slow@FIRST-LAST:rank=R:ms=T";

impl FromStr for Drill {
    type Err = Error;

    /// ```
    /// use train::Drill;
    /// assert_eq!("nan@7".parse::<Drill>()?, Drill::Nan { step: 7 });
    /// assert!("slow@3-9:rank=1:ms=20".parse::<Drill>().is_ok());
    /// assert!("flip@3:rank=1".parse::<Drill>().is_err());
    /// # Ok::<(), spec::Error>(())
    /// ```
    fn from_str(text: &str) -> Result<Drill> {
        let wrong = |what: &str| Error::user(format!("drill {text}: {what}")).hint(HINT);
        let mut words = text.split(':');
        let (kind, steps) =
            words.next().and_then(|w| w.split_once('@')).ok_or_else(|| wrong("no step is named"))?;
        let (mut rank, mut param, mut bit, mut ms) = (None, None, None, None);
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
            let number = || value.parse::<u32>().map_err(|_| wrong(&format!("{key} is no number")));
            match key {
                "rank" => rank = Some(number()? as usize),
                "param" => param = Some(value.to_owned()),
                "bit" => bit = Some(number()?),
                "ms" => ms = Some(number()?),
                _ => return Err(wrong(&format!("{key} is unknown"))),
            }
        }
        let step = |text: &str| text.parse::<u64>().ok().filter(|s| *s > 0);
        let (first, last) = steps.split_once('-').unwrap_or((steps, steps));
        let (Some(first), Some(last)) = (step(first), step(last)) else {
            return Err(wrong("steps count from 1"));
        };
        let whose = || rank.ok_or_else(|| wrong("no rank is named"));
        Ok(match kind {
            "nan" => Drill::Nan { step: first },
            "spike" => Drill::Spike { step: first },
            "flip" => Drill::Flip {
                step: first,
                rank: whose()?,
                param: param.ok_or_else(|| wrong("no parameter is named"))?,
                bit: bit.unwrap_or(20),
            },
            "slow" => Drill::Slow {
                step: first,
                last,
                rank: whose()?,
                delay: Duration::from_millis(u64::from(ms.ok_or_else(|| wrong("ms is not named"))?)),
            },
            _ => return Err(wrong("unknown")),
        })
    }
}
