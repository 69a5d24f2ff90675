//! Rehearse: a step's program on a virtual clock, over the links of the machine, with what goes wrong.
//!
//! `plan` adds a step up in closed form; this plays it. Every rank has a main stream of kernels and a stream for each
//! axis that it talks on (`steps`); messages are flows over the machine's links, which they share max-min fairly
//! ([`flow`]). Ranks that cannot be told apart are played once ([`world`]), so that the cost grows with what differs.
//!
//! Nothing here does I/O, reads a clock or draws at random but from a seed; time is counted in whole picoseconds
//! ([`clock`]), so that folded and unfolded ranks end at the same one.

pub mod clock;
mod draw;
pub mod flow;
mod flows;
pub mod jitter;
pub mod life;
mod mesh;
mod play;
mod recording;
pub mod recovery;
pub mod scenario;
mod steps;
pub mod trace;
pub mod world;

use std::sync::atomic::AtomicBool;

use plan::estimate::{Estimator, Problem};
use plan::placement::Placement;
use serde::Serialize;
use spec::{Error, Result};

use clock::seconds;
use mesh::{AXES, Axis, RankGrid};
pub use play::Spent;
pub use recording::{Bar, PathLink, Recording, Shares};
use steps::{Beside, STREAMS, StageSteps, Stream};
use world::{Disturbed, Folding, StorageUse, World};

/// A step ready to be played, with any disturbance.
pub struct Rehearsal<'a> {
    problem: &'a Problem,
    parts: plan::estimate::parts::StepParts,
    mesh: RankGrid,
    stages: Vec<StageSteps>,
    predicted_s: f64,
    storage: Option<StorageUse>,
    stop: Option<&'a AtomicBool>,
}

/// A step as it was played.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// From the start to the last rank's end; as far as it was played, if that was not to its end.
    pub step_s: f64,
    /// Whether it was played to its end.
    pub is_whole: bool,
    /// Classes of ranks that had to be played.
    pub classes: usize,
    /// Events on the clock.
    pub events: u64,
    /// The rank that was done last.
    pub last_rank: usize,
    /// Where its time went.
    pub spent: Spent,
    /// When each rank was done, in picoseconds.
    #[serde(skip)]
    pub ends: Ends,
}

/// When ranks were done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ends {
    class_of: Vec<u32>,
    ends: Vec<clock::Ticks>,
}

impl Ends {
    /// When a rank was done.
    pub fn of(&self, rank: usize) -> clock::Ticks {
        self.ends[self.class_of[rank] as usize]
    }

    /// Of all ranks, in order.
    pub fn all(&self) -> impl Iterator<Item = clock::Ticks> + '_ {
        self.class_of.iter().map(|c| self.ends[*c as usize])
    }
}

impl<'a> Rehearsal<'a> {
    /// Gets a layout's step ready.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn new(problem: &'a Problem, placement: &Placement) -> Result<Self> {
        let (ep, stage) = (placement.layout.ep, placement.layout.stage_ranks());
        if !stage.is_multiple_of(ep.max(1)) {
            return Err(Error::user(format!(
                "layout.ep = {ep} does not divide the {stage} ranks of a stage"
            ))
            .hint("experts are dealt to ranks of one stage: dp x tp x cp"));
        }
        let mut estimator = Estimator::new(problem, placement.format)?;
        let predicted_s = estimator.estimate(placement)?.step_s;
        let parts = estimator.parts(placement)?;
        let mesh = RankGrid::of(placement);
        let spans = world::spans(&problem.cluster, &mesh, &parts);
        let span = |axis: Axis| spans[axis as usize];
        let beside =
            Beside::of(&problem.software, placement, span(Axis::Tensor).domains, span(Axis::Expert).domains);
        let stages = steps::stages(&problem.shape.model, placement, &parts, &spans, beside);
        Ok(Rehearsal { problem, parts, mesh, stages, predicted_s, storage: None, stop: None })
    }

    /// With a storage that tokens are read from, and perhaps a checkpoint written to.
    #[must_use]
    pub fn with_storage(self, storage: StorageUse) -> Self {
        Rehearsal { storage: Some(storage), ..self }
    }

    /// Plays no further once `stop` is set: the step is then not [whole](Step::is_whole).
    #[must_use]
    pub fn until(self, stop: &'a AtomicBool) -> Self {
        Rehearsal { stop: Some(stop), ..self }
    }

    /// What the closed form says of the step.
    pub fn predicted_s(&self) -> f64 {
        self.predicted_s
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.mesh.ranks()
    }

    /// Plays the step.
    ///
    /// # Errors
    /// If it takes more events than there may be.
    pub fn play(&self, disturbed: &Disturbed, folding: Folding) -> Result<Step> {
        let world = self.world(disturbed, folding);
        let played = self.played(&world, 0)?;
        Ok(Step::new(world.class_of, &world.classes, played))
    }

    /// Plays the step and keeps what happened, at some 60 bytes each; nothing if that is more than `most` things.
    ///
    /// # Errors
    /// As [`play`](Self::play).
    pub fn record(&self, disturbed: &Disturbed, folding: Folding, most: usize) -> Result<Recording<'_>> {
        let world = self.world(disturbed, folding);
        let played = self.played(&world, most)?;
        Ok(Recording::new(world, &self.stages, played))
    }

    fn world(&self, disturbed: &Disturbed, folding: Folding) -> World {
        let (cluster, storage) = (&self.problem.cluster, self.storage.as_ref());
        World::new(cluster, &self.mesh, &self.parts, disturbed, storage, folding)
    }

    fn played(&self, world: &World, keeps: usize) -> Result<play::Played> {
        let chunks = self.mesh.placement.layout.chunks;
        let micro_batches = self.parts.micro_batches;
        let mut tax = [0.0; STREAMS];
        tax[Stream::Data as usize] = self.parts.replicas.tax;
        tax[Stream::Tensor as usize] = self.problem.software.overlap_tp_tax;
        let (stages, stop) = (&self.stages, self.stop);
        play::play(play::Play { world, stages, chunks, micro_batches, tax, keeps, stop })
    }
}

impl Step {
    fn new(class_of: Vec<u32>, classes: &[world::Class], played: play::Played) -> Self {
        let last = played.last();
        Step {
            step_s: seconds(played.end),
            is_whole: played.is_whole,
            classes: classes.len(),
            events: played.events,
            last_rank: classes[last].rank,
            spent: played.spent[last],
            ends: Ends { class_of, ends: played.ends },
        }
    }
}

const _: () = assert!(Axis::ExpertFar as usize + 1 == AXES.len());
