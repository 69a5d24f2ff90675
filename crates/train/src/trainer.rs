use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use data::{Order, Prepared, Split, StreamOptions, Streams};
use journal::{Journal, Record, tensorboard::EventWriter};
use program::Request;
use spec::{Error, Result, RunSpec};

use crate::begin::{Beginning, Weights};
use crate::checkpoint::{adopt, restore};
use crate::device::Device;
use crate::documents::{attend, parts};
use crate::drill::Drill;
use crate::exec::{Executor, StepOutputs};
use crate::host::{host, now_us};
use crate::mesh::Mesh;
use crate::peak::Peak;
use crate::run_dir::RunDir;
use crate::saving::Saving;
use crate::survive::meet::Lifeline;
use crate::trouble::Watch;

mod again;
mod evaluate;
mod saves;
mod step;
mod trouble;
mod waits;

pub(crate) use step::step_inputs;
use waits::Waits;

/// One rank of a run: data, executor, journal and checkpoints around the step loop.
pub struct Trainer {
    run: RunSpec,
    dir: RunDir,
    exec: Executor,
    streams: Streams,
    journal: Journal,
    events: Option<EventWriter>,
    /// Steps done.
    step: u64,
    sample: Vec<u32>,
    /// Not measured where others would have to wait for it.
    peak: Option<Peak>,
    begin: Beginning,
    /// Checkpoint that the run went on from.
    resumed: Option<PathBuf>,
    /// Tells this start of the run from others, on all ranks alike.
    session: u64,
    /// Tells which dealing of shares the copies in memory are of; see [`crate::survive`].
    era: u64,
    /// How this rank goes on when another is lost, if it can.
    lifeline: Option<Lifeline>,
    /// What was recorded before there was anybody to tell.
    untold: Vec<Record>,
    /// What is due after the step that was done last is not done yet.
    owes: bool,
    /// Weights and moments are those after the last step: no step is in the middle of its update.
    is_whole: bool,
    /// The checkpoint that is being written.
    saving: Option<Saving>,
    /// Holds the copy that the next one is written from.
    copy: Vec<f32>,
    /// What its next step is judged by.
    watch: Watch,
    looks: trouble::Looks,
    drills: Vec<Drill>,
    waits: Waits,
}

/// What happened, for whoever shows it to people. The journal has it already.
#[derive(Clone, Debug)]
pub enum Event {
    /// A record was written.
    Record(Record),
    /// The rank has another place among the ranks that train.
    Placed {
        /// Which it is now.
        rank: usize,
        /// Steps done.
        step: u64,
    },
    /// A line was measured: progress of the run as a whole.
    Eta {
        /// Seconds to the last step at the present rate.
        seconds: f64,
        /// Whether the rate is that of steps after the first, which is slower than all others.
        settled: bool,
    },
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Asked to stop; a checkpoint was saved.
    Stopped,
    /// The others went on without this rank, to the end.
    Spare,
}

/// What is asked of the loop from outside.
#[derive(Clone, Copy)]
struct Asks {
    stop: bool,
    stop_after: Option<u64>,
}

/// What comes after a step.
enum Turn {
    GoesOn,
    Ends,
    /// All ranks leave this world, and meet in another.
    Meets,
}

/// How fast steps are done.
struct Pace {
    began: Instant,
    /// Steps done when it began.
    first: u64,
    /// Memory is touched for the first time in this one, which takes longer than any step to come.
    cold: u64,
}

impl Pace {
    fn new(step: u64) -> Pace {
        Pace { began: Instant::now(), first: step, cold: step + 1 }
    }

    fn rate_s(&self, step: u64) -> f64 {
        self.began.elapsed().as_secs_f64() / (step - self.first) as f64
    }

    fn is_settled(&self, step: u64) -> bool {
        step > self.cold + 1
    }

    fn done(&mut self, step: u64) {
        if step == self.cold {
            (self.began, self.first) = (Instant::now(), step);
        }
    }
}

impl Trainer {
    /// Opens data, compiles the program, and takes weights from where the run begins.
    ///
    /// # Errors
    /// If run file, data, layout and checkpoint do not fit together, or files cannot be written.
    pub fn open(
        run: RunSpec,
        mut begin: Beginning,
        rank: usize,
        mesh: Mesh,
        device: Box<dyn Device>,
        trace: bool,
    ) -> Result<Trainer> {
        let streams = open_data(&run, begin.prepared())?;
        begin.check_data(&run, &streams)?;
        let request = Request::of(&run, rank);
        let mut exec = Executor::on(device, &request, mesh, trace)?;
        attend(&mut exec, &run, begin.prepared())?;
        exec.set_tables(&run.model)?;
        let (step, resumed) = weights(&mut exec, &run, &mut begin)?;
        let watch = resumed.as_deref().map(remembered).transpose()?.unwrap_or_default();
        let mut sample = vec![0; run.batch.sequence + 1];
        if step < run.train.steps as u64 {
            // The first batch tells data of another tokenizer before anything is written.
            load_step(&mut exec, &run, streams.train.as_ref(), step, &mut sample)?;
        }
        // Nobody may look at the directory after rank 0 has begun to write it; all begin this session together.
        let began = exec.mesh.exchange(&now_us().to_le_bytes())?;
        let session = began[0].as_slice().try_into().map_or(0, u64::from_le_bytes);
        let dir = RunDir::of(&run);
        let mut events = None;
        again::lead(rank, &begin, &run, &dir, &mut events)?;
        let peak = Peak::measure(&mut *exec.device, &crate::text::cache(&run));
        let journal = Journal::open(dir.path(), rank)?;
        let mut t = Trainer {
            run,
            dir,
            exec,
            streams,
            journal,
            events,
            step,
            sample,
            peak: Some(peak),
            begin,
            resumed,
            session,
            era: session,
            lifeline: None,
            untold: Vec::new(),
            owes: false,
            is_whole: true,
            saving: None,
            copy: Vec::new(),
            watch,
            looks: trouble::Looks::since(step),
            drills: Vec::new(),
            waits: Waits::default(),
        };
        t.announce(rank)?;
        Ok(t)
    }

    /// The executor, for whoever looks into the program or the weights.
    pub fn executor(&mut self) -> &mut Executor {
        &mut self.exec
    }

    /// Steps done so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The checkpoint that the run went on from.
    pub fn resumed(&self) -> Option<&Path> {
        self.resumed.as_deref()
    }

    /// What was accepted, dropped or replaced when the run began, for people.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.begin.accepted.iter().chain(&self.begin.notes).map(String::as_str)
    }

    /// If all steps were done before: that, and how to go on.
    pub fn after_the_end(&self) -> Option<String> {
        self.is_past_the_end().then(|| crate::resume::after_the_end(&self.run))
    }

    fn is_past_the_end(&self) -> bool {
        self.step >= self.run.train.steps as u64 && !self.owes
    }

    fn announce(&mut self, rank: usize) -> Result<()> {
        let time_us = now_us();
        let started = Record::RunStarted {
            time_us,
            version: env!("CARGO_PKG_VERSION").into(),
            fingerprint: self.run.fingerprint(),
            world: self.run.layout.world(),
            rank,
            host: host(),
            device: self.exec.device.name(),
            threads: Some(self.exec.device.threads()),
            parameters: self.run.model.param_count(),
            peak_flops_per_s: self.peak.as_ref().map(Peak::flops_per_s),
        };
        self.journal.write(&started)?;
        let path = self.resumed.as_ref().map(|path| path.display().to_string());
        if self.journal.has_earlier() || path.is_some() {
            let path = path.unwrap_or_default();
            self.journal.write(&Record::Resumed { time_us, step: self.step, path })?;
            if let Some(events) = &mut self.events {
                events.resumed(time_us, self.step)?;
            }
        }
        for what in &self.begin.accepted {
            let what = what.clone();
            self.journal.write(&Record::Accepted { time_us, step: self.step, what })?;
        }
        for text in &self.begin.notes {
            let text = text.clone();
            self.journal.write(&Record::Warning { time_us, text })?;
        }
        if self.is_past_the_end() {
            // Nothing will follow: whoever watches must not wait for it.
            let reason = "all steps were done before".to_owned();
            self.journal.write(&Record::Finished { time_us, step: self.step, reason })?;
        }
        Ok(())
    }

    /// Trains to the last step, or until `stop` is set or `stop_after` steps are done; saves a checkpoint in the end.
    ///
    /// # Errors
    /// If the loss is not finite, the last checkpoint cannot be written, or a peer is lost. One on the way that cannot be
    /// written is said, and tried again at its next step.
    pub fn train(
        &mut self,
        stop: &AtomicBool,
        stop_after: Option<u64>,
        each: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        if let Some(text) = self.why_no_evaluation() {
            self.note(Record::Warning { time_us: now_us(), text }, each);
        }
        if stop_after.is_some_and(|n| self.step >= n) {
            let reason = "stopped on request".to_owned();
            self.note(Record::Finished { time_us: now_us(), step: self.step, reason }, each);
            return Ok(Outcome::Stopped);
        }
        self.untold.drain(..).for_each(|record| each(Event::Record(record)));
        let last = self.run.train.steps as u64;
        let mut pace = Pace::new(self.step);
        while self.step < last || self.owes {
            let asked = Asks { stop: stop.load(Ordering::Relaxed), stop_after };
            match self.turn(asked, &mut pace, each) {
                Ok(Turn::GoesOn) => {}
                Ok(Turn::Ends) => {
                    let reason = "stopped on request".to_owned();
                    self.note(Record::Finished { time_us: now_us(), step: self.step, reason }, each);
                    return Ok(Outcome::Stopped);
                }
                turn => {
                    // Either all ranks leave this world, or it has failed.
                    let lost = match turn {
                        Err(e) if !self.is_stranded() => return Err(e),
                        turn => turn.err(),
                    };
                    if !self.meet_again(lost, stop, &mut pace, each)? {
                        return Ok(Outcome::Spare);
                    }
                }
            }
        }
        self.peak.iter_mut().for_each(Peak::keep);
        let reason = "all steps done".to_owned();
        self.note(Record::Finished { time_us: now_us(), step: self.step, reason }, each);
        Ok(Outcome::Finished)
    }

    /// Does a step and what is due after it.
    fn turn(&mut self, asked: Asks, pace: &mut Pace, each: &mut dyn FnMut(Event)) -> Result<Turn> {
        let last = self.run.train.steps as u64;
        let summoned = self.is_summoned();
        let mut said = StepOutputs::default();
        if !self.owes {
            let done = self.one_step(asked.stop || summoned, each);
            let Some(done) = done.map_err(|e| self.step_failed(e, each))? else {
                *pace = Pace::new(self.step);
                return Ok(Turn::GoesOn);
            };
            said = done.outputs;
            let rate = pace.rate_s(self.step);
            each(Event::Eta {
                seconds: rate * (last - self.step) as f64,
                settled: pace.is_settled(self.step),
            });
            self.note(done.record, each);
            self.record_spans(each);
            pace.done(self.step);
            self.watch_waits(done.step_s, each).map_err(|e| self.step_failed(e, each))?;
            let followed = self.follow_up(done.decision, said, pace, each);
            if !followed.map_err(|e| self.step_failed(e, each))? {
                return Ok(Turn::GoesOn);
            }
            self.owes = true;
        }
        self.refresh_copies()?;
        let votes = self.votes(said.stop, asked.stop, summoned)?;
        if self.due(self.run.train.eval_every) || self.step == last {
            self.evaluate(each)?;
        }
        let stopping = votes.stop || asked.stop_after.is_some_and(|n| self.step >= n);
        let ends = self.step == last || stopping;
        let due = self.due(self.run.checkpoint.every) || ends;
        if said.saved || due {
            self.finish_saving(each);
        }
        if ends {
            self.save(each).map_err(|e| self.unsaved(e))?;
        } else if due {
            self.save_beside(each);
        }
        self.owes = false;
        Ok(match (stopping && self.step < last, votes.meet) {
            (true, _) => Turn::Ends,
            (false, true) => Turn::Meets,
            (false, false) => Turn::GoesOn,
        })
    }

    /// The failure of a step, unless the ranks can meet again.
    fn step_failed(&mut self, e: Error, each: &mut dyn FnMut(Event)) -> Error {
        if self.is_stranded() {
            return e;
        }
        let step = self.step + 1;
        if self.exec.mesh.is_alone() || self.exec.failed_alike {
            // All ranks are here for what is nearly on the disk.
            self.finish_saving(each);
        }
        self.exec.mesh.abort(&e.to_string());
        self.write_failed(step, &e);
        e
    }

    fn write_failed(&mut self, step: u64, e: &Error) {
        let (time_us, error, hint) = (now_us(), e.to_string(), e.hint_text().map(str::to_owned));
        // The failure itself is what the caller must see, even if the journal's disk is full too.
        let _ = self.journal.write(&Record::Failed { time_us, step, error, hint });
    }

    fn due(&self, every: Option<usize>) -> bool {
        every.is_some_and(|n| self.step.is_multiple_of(n as u64))
    }

    /// Writes a record wherever it can be written: a full disk ends no run that may still save its weights.
    fn note(&mut self, record: Record, each: &mut dyn FnMut(Event)) {
        if let Err(e) = self.journal.write(&record) {
            each(Event::Record(warning(&e)));
        }
        if let Some(Err(e)) = self.events.as_mut().map(|events| events.record(&record)) {
            // What was cut off there cannot be gone on with.
            self.events = None;
            each(Event::Record(warning(&e)));
        }
        each(Event::Record(record));
    }

    /// Writes a record that nobody reads while the run goes on.
    fn write_only(&mut self, record: &Record, each: &mut dyn FnMut(Event)) {
        if let Err(e) = self.journal.write(record) {
            each(Event::Record(warning(&e)));
        }
    }

    /// Writes start, end and bytes of every op of the last step to the journal, if they are recorded.
    fn record_spans(&mut self, each: &mut dyn FnMut(Event)) {
        if !self.exec.spans.is_on() {
            return;
        }
        let spans = self.exec.journal_spans();
        let rank = self.exec.program.rank;
        self.write_only(&Record::Spans { rank, step: self.step, spans }, each);
    }

    /// Tells the other ranks that this one gives up.
    pub fn abort(&self, reason: &str) {
        self.exec.mesh.abort(reason);
    }

    /// Adds a text sampled from the model to the journal.
    pub fn note_sample(&mut self, text: String, each: &mut dyn FnMut(Event)) {
        let record = Record::Sample { time_us: now_us(), step: self.step, text };
        self.note(record, each);
    }
}

pub(crate) fn warning(e: &Error) -> Record {
    let hint = e.hint_text().map(|h| format!("; {h}")).unwrap_or_default();
    Record::Warning { time_us: now_us(), text: format!("{e}: training goes on{hint}") }
}

/// Gives the executor its weights; returns the steps that they have seen, and the checkpoint that they came from if the
/// run goes on.
pub(crate) fn weights(
    exec: &mut Executor,
    run: &RunSpec,
    begin: &mut Beginning,
) -> Result<(u64, Option<PathBuf>)> {
    match &begin.weights {
        Weights::Seed => exec.initialise(&run.model, run.train.seed)?,
        Weights::Run(from) => adopt(exec, run, from)?,
        Weights::Checkpoints(newest_first) => {
            let (step, path, passed) = restore(exec, newest_first, begin.asked.restarted)?;
            begin.notes.extend(passed);
            return Ok((step, Some(path)));
        }
    }
    Ok((0, None))
}

/// What a checkpoint keeps of a run to judge its next step.
pub(crate) fn remembered(path: &Path) -> Result<Watch> {
    Ok(Watch::of(&ckpt::Checkpoint::open(path)?.manifest().meta.state))
}

/// Which samples were loaded.
#[derive(Default)]
pub(crate) struct Drawn {
    samples: Vec<(u64, u64)>,
    tokens_xxh3: u64,
}

impl Drawn {
    fn add(&mut self, index: u64, tokens: &[u32]) {
        self.tokens_xxh3 = self.tokens_xxh3.wrapping_add(data::sample_xxh3(index, tokens));
        match self.samples.last_mut() {
            Some((first, n)) if *first + *n == index => *n += 1,
            _ => self.samples.push((index, 1)),
        }
    }

    fn record(self, session: u64, step: u64) -> Record {
        let begun_us = Some(now_us());
        Record::Drawn { begun_us, session, step, samples: self.samples, tokens_xxh3: self.tokens_xxh3 }
    }
}

/// Makes the executor ready for the step that follows `done` steps: its size, and this rank's sequences of it.
pub(crate) fn load_step(
    exec: &mut Executor,
    run: &RunSpec,
    stream: &dyn data::TokenStream,
    done: u64,
    sample: &mut [u32],
) -> Result<Drawn> {
    exec.resize(run, run.batch.sequences_after(done))?;
    load(exec, stream, run.batch.samples_before(done), sample)
}

/// Copies this rank's sequences of the batch that begins with sample `first` into the executor.
fn load(
    exec: &mut Executor,
    stream: &dyn data::TokenStream,
    first: u64,
    sample: &mut [u32],
) -> Result<Drawn> {
    let mut drawn = Drawn::default();
    for i in 0..exec.program.local_sequences {
        let index = first + exec.program.place(i) as u64;
        stream.sample(index, sample)?;
        drawn.add(index, sample);
        exec.take(i, sample);
    }
    Ok(drawn)
}

pub(crate) fn open_data(run: &RunSpec, prepared: Option<&Prepared>) -> Result<Streams> {
    let parts = parts(run, prepared)?;
    let [train, valid, test] = run.data.split;
    let sequences = run.batch.sequences as u64;
    data::open_streams(&StreamOptions {
        parts,
        split: Split::parse(&format!("{train},{valid},{test}"))?,
        sequence: run.batch.sequence,
        seed: run.train.seed as u32,
        vocab: Some(run.model.vocab),
        train_samples: run.batch.samples_before(run.train.steps as u64),
        valid_samples: run.train.eval_batches as u64 * sequences,
        order: Order::Endless,
    })
}
