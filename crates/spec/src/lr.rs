use serde::{Deserialize, Serialize};

use crate::words::words;

/// Course of the learning rate after warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the minimum (Loshchilov and Hutter 2017).
    Cosine,
    /// Warmup, stable, linear decay over the last steps (Hu et al. 2024).
    Wsd,
    /// A line from the peak to the minimum.
    Linear,
    /// The peak until the end.
    Constant,
}

words!(ScheduleKind: "cosine" => Cosine, "wsd" => Wsd, "linear" => Linear, "constant" => Constant);

/// The learning rate of every step.
///
/// ```
/// use spec::{LrSchedule, ScheduleKind};
/// let cosine = LrSchedule { kind: ScheduleKind::Cosine, peak: 1.0, min: 0.1, steps: 110, warmup_steps: 10, decay_steps: 0 };
/// assert_eq!(cosine.at(1), 0.1); // warmup from 0: the first step gets peak / warmup_steps
/// assert_eq!(cosine.at(10), 1.0);
/// assert!((cosine.at(60) - 0.55).abs() < 1e-12); // half-way
/// assert_eq!(cosine.at(110), 0.1);
///
/// let wsd = LrSchedule { kind: ScheduleKind::Wsd, min: 0.0, decay_steps: 20, ..cosine };
/// assert_eq!([wsd.at(11), wsd.at(90), wsd.at(100), wsd.at(110)], [1.0, 1.0, 0.5, 0.0]);
///
/// let linear = LrSchedule { kind: ScheduleKind::Linear, min: 0.0, ..cosine };
/// assert_eq!(linear.at(85), 0.25);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LrSchedule {
    /// Course after warmup.
    pub kind: ScheduleKind,
    /// The rate when warmup ends.
    pub peak: f64,
    /// The rate of the last step, and after it.
    pub min: f64,
    /// Steps of the run.
    pub steps: usize,
    /// Steps of linear warmup from 0.
    pub warmup_steps: usize,
    /// WSD: steps of the final decay.
    pub decay_steps: usize,
}

impl LrSchedule {
    /// The learning rate of `step`, which counts from 1. Step 0 has the rate 0 when there is a warmup.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let from = match self.kind {
            ScheduleKind::Constant => return self.peak,
            ScheduleKind::Cosine | ScheduleKind::Linear => self.warmup_steps,
            ScheduleKind::Wsd => self.steps.saturating_sub(self.decay_steps).max(self.warmup_steps),
        };
        if step <= from {
            return self.peak;
        }
        if step >= self.steps {
            return self.min;
        }
        let done = (step - from) as f64 / (self.steps - from) as f64;
        let left = match self.kind {
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            _ => 1.0 - done,
        };
        self.min + (self.peak - self.min) * left
    }
}
