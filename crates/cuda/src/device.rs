//! A GPU as the executor's device.

use std::collections::HashMap;
use std::time::Instant;

use program::{Loss, Op, OpId, OpKind, Program, Ticket};
use spec::run::MessageChoice;
use spec::{DType, Error, Result};
use train::{Device, Lack, Launch, Mesh, Message, Operand, Stretch, Turn};

use crate::cards::{Card, card, driver};
use crate::compile::HOPPER;
use crate::driver::{Context, Graph, Memory, Stream};
use crate::gemm::CublasLt;
use crate::host_messages::HostMessages;
use crate::meeting::Talks;
use crate::module::{Geometry, Kernels, Params};
use crate::numbers::Numbers;
use crate::products;
use crate::table;
use crate::update::{self, Tables, Updates};
use crate::waits::Waits;
use crate::ways::{Speaker, Ways};

/// How much of a micro-batch has logits at a time: all of it, or large vocabularies leave a card idle.
pub const LOSS: Loss = Loss::MicroBatch;

/// One GPU: an arena on it, a stream of work, and stretches of it recorded as graphs.
///
/// Fields go in this order: what was made in the context before the context.
pub struct Cuda {
    /// Stretches of a step, ready to be run again.
    graphs: HashMap<Stretch, Graph>,
    /// The stretch that is being recorded.
    recording: Option<Stretch>,
    /// Stretches that ran once, launch by launch: what is made lazily is made then.
    warm: Vec<Stretch>,
    pub(crate) talks: Talks,
    messages: HostMessages,
    waits: Waits,
    pub(crate) kernels: Kernels,
    pub(crate) products: CublasLt,
    numbers: Numbers,
    pub(crate) tables: Tables,
    /// Between [`Device::replay`] and [`Device::recorded`].
    in_stretch: bool,
    /// Whether the host computed in the stretch that runs, which nothing can record.
    asked_host: bool,
    /// The host's threads, once it has computed.
    pub(crate) host: Option<kernels::Pool>,
    /// What [`update::flush`] puts on the stream.
    pub(crate) updates: Updates,
    /// Whether it has the instructions of sm_90a.
    pub(crate) hopper: bool,
    scalar: Memory,
    pub(crate) arena: Memory,
    pub(crate) stream: Stream,
    pub(crate) context: Context,
    pub(crate) card: Card,
}

impl Cuda {
    /// The card for a rank of this machine, without memory yet. `CUDA_VISIBLE_DEVICES` says which cards there are; more
    /// ranks than cards share them.
    ///
    /// # Errors
    /// If a library is missing, there is no such card, or it is too old.
    pub fn new(local_rank: usize) -> Result<Cuda> {
        driver()?;
        let cards = crate::cards::count()?;
        let ordinal = (local_rank % cards.max(1)) as i32;
        let card = card(ordinal)?;
        card.check()?;
        let context = Context::new(ordinal)?;
        let arch = architecture(card.capability);
        let extra: &[_] = if card.capability.0 == 9 { &HOPPER } else { &[] };
        Ok(Cuda {
            graphs: HashMap::new(),
            recording: None,
            warm: Vec::new(),
            talks: Talks::default(),
            messages: HostMessages::default(),
            waits: Waits::default(),
            kernels: Kernels::load(&arch, extra)?,
            products: CublasLt::new()?,
            numbers: Numbers::new()?,
            tables: Tables::default(),
            in_stretch: false,
            asked_host: false,
            host: None,
            updates: Updates::default(),
            hopper: card.capability.0 == 9,
            scalar: Memory::new(8)?,
            arena: Memory::none(),
            stream: Stream::new()?,
            context,
            card,
        })
    }

    /// What shall carry messages, and how many bytes of card memory parts of a sum may take in each group.
    pub fn with_messages(mut self, choice: MessageChoice, staging_bytes: usize) -> Cuda {
        (self.talks.choice, self.talks.staging_bytes) = (choice, staging_bytes);
        self
    }

    /// Where an operand lies.
    ///
    /// # Panics
    /// If it does not lie in the arena.
    pub(crate) fn at(&self, of: Operand) -> u64 {
        let end = of.offset + of.bytes();
        assert!(end <= self.arena.bytes, "bytes {}..{end} of an arena of {}", of.offset, self.arena.bytes);
        self.arena.base + of.offset as u64
    }

    /// The step's numbers, on the card.
    pub(crate) fn numbers(&self) -> u64 {
        self.numbers.address()
    }

    /// Whether what goes to the stream is recorded instead of run.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Whether calls of a stretch follow, which are the same in every step.
    pub(crate) fn is_in_stretch(&self) -> bool {
        self.in_stretch
    }

    /// The host computes in this stretch: it is run call by call from here on.
    ///
    /// # Errors
    /// If it is being recorded, which no stretch is that the host computed in.
    pub(crate) fn ask_host(&mut self) -> Result<()> {
        self.asked_host = true;
        if self.is_recording() { Err(Error::failure("the host computes in a recording")) } else { Ok(()) }
    }

    /// Streaming multiprocessors.
    pub(crate) fn processors(&self) -> usize {
        usize::try_from(self.card.processors).unwrap_or(1)
    }

    /// Starts a kernel on the device's stream.
    pub(crate) fn start(&mut self, name: &'static str, geometry: Geometry, mut params: Params) -> Result<()> {
        self.kernels.launch(&self.stream, name, geometry, &mut params)
    }

    /// Leaves the ranks that it talked to: first what was recorded, which holds on to communicators.
    fn leave_ranks(&mut self, is_alone: bool) {
        self.drop_recordings();
        self.talks.leave(is_alone);
    }

    fn drop_recordings(&mut self) {
        self.graphs.clear();
        self.waits.forget();
        self.warm.clear();
    }

    /// As [`Talks::join`]; where a stage waits for its last messages to be received, that is a wait.
    fn join(&mut self) -> Result<()> {
        let sending = self.talks.ways.as_ref().and_then(Ways::sending);
        let Cuda { waits, stream, talks, recording, .. } = self;
        sending.map_or(Ok(()), |op| waits.begin(stream, *recording, op))?;
        talks.join(stream)?;
        sending.map_or(Ok(()), |_| waits.end(stream, *recording))
    }

    pub(crate) fn place(&self) -> String {
        format!("card {} ({})", self.card.ordinal, self.card.name)
    }
}

/// What kernels are compiled for: Hopper's and Blackwell's own instructions need the `a` variants.
fn architecture((major, minor): (i32, i32)) -> String {
    let own = if major >= 9 { "a" } else { "" };
    format!("sm_{major}{minor}{own}")
}

impl Device for Cuda {
    fn kind(&self) -> &'static str {
        "cuda"
    }

    fn name(&self) -> String {
        format!("cuda, {}", self.place())
    }

    fn peak_gflops(&mut self) -> f64 {
        self.context.bind().and_then(|()| products::peak_gflops(self)).unwrap_or(f64::NAN)
    }

    fn can_run(&self, op: &Op, precision: DType) -> Result<(), Lack> {
        if op.only_talks() { Ok(()) } else { table::can_run(&op.kind, precision) }
    }

    fn loss(&self) -> Loss {
        LOSS
    }

    fn workspace_len(&self, op: &Op, p: &Program) -> usize {
        table::workspace_len(op, p, self.hopper)
    }

    fn allocate(&mut self, bytes: usize, mesh: &Mesh) -> Result<()> {
        self.context.bind()?;
        self.leave_ranks(mesh.is_alone());
        let (free, total) = self.context.memory()?;
        if bytes > free {
            let gib = |b: usize| b as f64 / f64::from(1 << 30);
            return Err(Error::user(format!(
                "the step takes {:.2} GiB, {} has {:.2} of its {:.2} GiB free",
                gib(bytes),
                self.place(),
                gib(free),
                gib(total)
            ))
            .hint(
                "a smaller layout.micro_batch, layout.recompute = \"full\", layout.zero or more ranks take less; \
                 nvidia-smi lists who holds memory",
            ));
        }
        self.arena = Memory::new(bytes).map_err(|e| e.context(self.place()))?;
        self.stream.fill(self.arena.base, 0, bytes)?;
        self.stream.wait()
    }

    fn allocated_bytes(&self) -> usize {
        self.arena.bytes
    }

    fn meet(&mut self, program: &Program, mesh: &Mesh) -> Result<()> {
        self.context.bind()?;
        self.leave_ranks(mesh.is_alone());
        crate::meeting::meet(self, program, mesh)
    }

    fn ways(&self) -> Option<String> {
        self.talks.summary.clone()
    }

    fn takes_programs(&self) -> bool {
        true
    }

    fn forget(&mut self) -> Result<()> {
        self.synchronise()?;
        self.drop_recordings();
        Ok(())
    }

    fn copy_in(&mut self, to: Operand, bytes: &[u8]) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        assert_eq!(to.bytes(), bytes.len());
        self.stream.upload(self.at(to), bytes)
    }

    fn copy_out(&self, from: Operand, bytes: &mut [u8]) -> Result<()> {
        self.context.bind()?;
        if !self.updates.is_empty() {
            return Err(Error::failure("read from the card in the middle of its updates"));
        }
        assert_eq!(from.bytes(), bytes.len());
        self.stream.download(self.at(from), bytes).map_err(|e| e.context(self.place()))?;
        self.talks.check()
    }

    fn copy(&mut self, from: Operand, to: Operand) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        assert_eq!(from.bytes(), to.bytes());
        self.stream.copy(self.at(to), self.at(from), from.bytes())
    }

    fn clear(&mut self, what: Operand) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        self.stream.fill(self.at(what), 0, what.bytes())
    }

    fn sum(&mut self, what: Operand) -> Result<f64> {
        self.context.bind()?;
        update::flush(self)?;
        assert_eq!(what.dtype, DType::F64);
        let params = Params::new().with(self.at(what)).with(self.scalar.base).with(what.len() as i64);
        self.start("sum_f64", Geometry::line(1, 1024), params)?;
        let mut sum = [0; 8];
        self.stream.download(self.scalar.base, &mut sum).map_err(|e| e.context(self.place()))?;
        self.talks.check()?;
        Ok(f64::from_ne_bytes(sum))
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        self.context.bind()?;
        let changes = self.recording.is_none() && self.numbers.are_other(&launch.turn);
        if changes || !matches!(launch.kind(), OpKind::AdamW { .. }) {
            update::flush(self)?;
        }
        if self.recording.is_none() {
            self.numbers.set(&self.stream, &launch.turn)?;
        }
        table::launch(self, launch).map_err(|e| e.context(self.place()))
    }

    fn say(&mut self, mesh: &mut Mesh, message: &Message<'_>, ticket: Option<Ticket>) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        let Cuda { messages, stream, arena, talks, kernels, waits, recording, .. } = self;
        let waited = ticket.is_none();
        if let Some(ways) = talks.ways.as_mut().filter(|w| w.carries(message)) {
            if waited {
                waits.begin(stream, *recording, message.op)?;
            }
            ways.say(&mut Speaker { kernels, compute: stream, arena }, message, ticket)?;
            return if waited { waits.end(stream, *recording) } else { Ok(()) };
        }
        // What it is given before is no part of the wait.
        stream.wait()?;
        let since = Instant::now();
        messages.say(stream, arena, mesh, message, ticket)?;
        if waited {
            waits.add(message.op, since);
        }
        Ok(())
    }

    fn end(
        &mut self,
        mesh: &mut Mesh,
        (op, ticket): (OpId, Ticket),
        over: &mut dyn FnMut(Instant, Instant),
    ) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        let Cuda { waits, stream, talks, recording, messages, .. } = self;
        if let Some(ways) = talks.ways.as_mut().filter(|ways| ways.is_open(ticket)) {
            waits.begin(stream, *recording, op)?;
            ways.end(stream, ticket)?;
            waits.end(stream, *recording)?;
        }
        if !messages.are_under_way(ticket) {
            return mesh.end(ticket, over);
        }
        stream.wait()?;
        let since = Instant::now();
        mesh.end(ticket, over)?;
        messages.ended(stream, ticket)?;
        waits.add(op, since);
        Ok(())
    }

    fn waits_ns(&mut self) -> Result<Option<&mut HashMap<OpId, u64>>> {
        self.context.bind()?;
        self.waits.read().map(Some)
    }

    fn synchronise(&mut self) -> Result<()> {
        self.context.bind()?;
        update::flush(self)?;
        self.stream.wait().map_err(|e| e.context(self.place()))?;
        self.talks.check()
    }

    fn replay(&mut self, stretch: Stretch, turn: &Turn) -> Result<bool> {
        self.context.bind()?;
        update::flush(self)?;
        self.numbers.set(&self.stream, turn)?;
        if let Some(graph) = self.graphs.get(&stretch) {
            self.stream.run(graph).map_err(|e| e.context(self.place()))?;
            self.waits.run(stretch);
            return Ok(true);
        }
        self.in_stretch = true;
        self.asked_host = false;
        self.join()?;
        if !self.talks.can_be_recorded {
            return Ok(false);
        }
        if self.warm.contains(&stretch) {
            self.stream.begin_recording()?;
            self.recording = Some(stretch);
        }
        self.warm.push(stretch);
        Ok(false)
    }

    fn recorded(&mut self) -> Result<()> {
        update::flush(self)?;
        self.in_stretch = false;
        if self.asked_host && self.talks.can_be_recorded {
            self.warm.pop();
        }
        self.join()?;
        let Some(stretch) = self.recording.take() else { return Ok(()) };
        let graph = self.stream.end_recording().map_err(|e| e.context(self.place()))?;
        self.stream.run(&graph).map_err(|e| e.context(self.place()))?;
        self.waits.run(stretch);
        self.graphs.insert(stretch, graph);
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Memory goes while the context is current, and after all work.
        let _ = self.context.bind();
        self.leave_ranks(true);
        let _ = self.stream.wait();
    }
}
