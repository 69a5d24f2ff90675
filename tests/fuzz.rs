//! Damaged files for the parsers of files: no panic, no abort, and memory in proportion to what is there.
//!
//! Tests include this file and make it the allocator of their binary. A short run is part of every test run; a long one:
//!
//! ```text
//! PHALANX_FUZZ_INPUTS=1000000 PHALANX_FUZZ_SEED=7 cargo test --release -p phalanx-ckpt fuzz -- --nocapture
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Inputs of a run that says nothing else.
const INPUTS: u64 = 4000;
/// Bytes that a parser may take for each byte of its input.
const BYTES_PER_BYTE: usize = 16;
/// And for any input at all: messages, and trees of values that are small whatever the file.
const FREE_BYTES: usize = 512 << 10;
/// One input in so many is blown up to about this size.
const LARGE_EVERY: u64 = 1000;
const LARGE_BYTES: usize = 1 << 20;
/// For a megabyte; asserted in long runs alone, on a machine that is not busy with a whole test suite.
const TIME_LIMIT: Duration = Duration::from_secs(1);

const RETRIES: usize = 5;

/// The system's allocator, counting what the current thread holds.
pub(crate) struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn grow(bytes: usize) {
    let live = LIVE.get().wrapping_add(bytes);
    LIVE.set(live);
    // What another thread made and this one freed would wrap around: no peak.
    if live < usize::MAX / 2 {
        PEAK.set(PEAK.get().max(live));
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grow(size);
        // SAFETY: as the caller promises.
        let moved = unsafe { System.realloc(at, layout, size) };
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        moved
    }
}

/// Calls `parse` with damaged variants of `good` inputs. `seal` mends what no damage gets past, such as a checksum.
pub(crate) fn fuzz(
    name: &str,
    good: &[Vec<u8>],
    words: &[&str],
    seal: impl Fn(Vec<u8>) -> Vec<u8>,
    parse: impl FnMut(&[u8]) -> bool,
) {
    fuzz_within((BYTES_PER_BYTE, FREE_BYTES), name, good, words, seal, parse);
}

/// What a variable says, for tests that can be told how much to do.
pub(crate) fn number(key: &str, default: u64) -> u64 {
    std::env::var(key).map_or(default, |text| text.parse().expect("a whole number"))
}

/// As [`fuzz`], where a library takes more memory: so many bytes for each byte of input, and for any input at all.
pub(crate) fn fuzz_within(
    (bytes_per_byte, free_bytes): (usize, usize),
    name: &str,
    good: &[Vec<u8>],
    words: &[&str],
    seal: impl Fn(Vec<u8>) -> Vec<u8>,
    mut parse: impl FnMut(&[u8]) -> bool,
) {
    let (inputs, seed) = (number("PHALANX_FUZZ_INPUTS", INPUTS), number("PHALANX_FUZZ_SEED", 1));
    for (i, input) in good.iter().enumerate() {
        assert!(parse(input), "{name}: good input {i} is refused");
    }
    let (mut accepted, mut slowest, mut worst) = (0, Duration::ZERO, (0, 0));
    for i in 0..inputs {
        let mut random =
            Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i.wrapping_mul(0xd134_2543_de82_ef95));
        let mut input = good[random.below(good.len())].clone();
        for _ in 0..1 + random.below(4) {
            damage(&mut input, good, words, &mut random);
        }
        if i % LARGE_EVERY == LARGE_EVERY - 1 {
            blow_up(&mut input, &mut random);
        }
        let input = seal(input);
        let before = LIVE.get();
        PEAK.set(before);
        let start = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| parse(&input)));
        let (took, peak) = (start.elapsed(), PEAK.get().wrapping_sub(before));
        let keep = || {
            let path = std::env::temp_dir().join(format!("phalanx-fuzz-{name}-{seed}-{i}"));
            std::fs::write(&path, &input).expect("write the input");
            format!("{name}: input {i} of seed {seed}, {} bytes, kept in {}", input.len(), path.display())
        };
        match done {
            Ok(ok) => accepted += u64::from(ok),
            Err(panic) => {
                eprintln!("{}", keep());
                std::panic::resume_unwind(panic);
            }
        }
        if peak > bytes_per_byte * input.len() + free_bytes {
            panic!("{}: {peak} bytes at once", keep());
        }
        let limit = TIME_LIMIT.mul_f64(1.0f64.max(input.len() as f64 / 1e6));
        // On a busy machine the thread may have waited for its turn: what is slow is slow again.
        let mut again = |took: Duration| if took > limit { took.min(time(&mut parse, &input)) } else { took };
        let took = (0..RETRIES).fold(took, |took, _| again(took));
        if inputs > INPUTS && took > limit {
            panic!("{}: it takes {took:?}", keep());
        }
        slowest = slowest.max(took);
        worst = worst.max((peak.saturating_sub(free_bytes) * 100 / input.len().max(1), peak));
    }
    println!(
        "{name}: {inputs} inputs of seed {seed}, {accepted} accepted, slowest {slowest:?}, most memory {} bytes, \
         {:.2} for each byte beyond {free_bytes}",
        worst.1,
        worst.0 as f64 / 100.0
    );
}

/// What parsing takes on a processor; where the system does not tell, as long as it takes.
fn time(parse: &mut impl FnMut(&[u8]) -> bool, input: &[u8]) -> Duration {
    let (start, busy) = (Instant::now(), busy());
    parse(input);
    let took = start.elapsed();
    busy.zip(self::busy()).map_or(took, |(before, after)| after.saturating_sub(before))
}

/// Time on a processor that this thread had so far.
fn busy() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        start..start + self.below((len - start).min(64) + 1)
    }
}

const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "255",
    "65536",
    "2147483648",
    "4294967294",
    "1099511627776",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "0.5",
    "1e999",
];

/// What texts of any kind may trip over.
const TEXTS: [&str; 18] = [
    "null",
    "true",
    "[]",
    "{}",
    "[1,1,1,1,1,1,1,1]",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    ",",
    ":",
    "[",
    "{",
    "]",
    "}",
    "\"",
    "\u{feff}",
    "\u{1b}[2J",
    "../",
];

fn damage(input: &mut Vec<u8>, good: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let len = input.len();
    match random.below(12) {
        0 if len > 0 => input[random.below(len)] ^= 1 << random.below(8),
        1 if len > 0 => input[random.below(len)] = random.next() as u8 & 0x7f,
        2 => drop(input.drain(random.range(len))),
        3 => input.truncate(random.below(len + 1)),
        4 => {
            let part = input[random.range(len)].to_vec();
            insert(input, random.below(len + 1), &part);
        }
        5 => {
            let other = &good[random.below(good.len())];
            let part = other[random.range(other.len())].to_vec();
            insert(input, random.below(len + 1), &part);
        }
        6 => insert(input, random.below(len + 1), TEXTS[random.below(TEXTS.len())].as_bytes()),
        7 if !words.is_empty() => {
            insert(input, random.below(len + 1), words[random.below(words.len())].as_bytes());
        }
        8 if len >= 8 => {
            let at = random.below(len - 7);
            let value = [0, 1, u64::MAX, 1 << 40, 1 << 63, random.next()][random.below(6)];
            input[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        _ => another_number(input, random),
    }
}

fn insert(input: &mut Vec<u8>, at: usize, part: &[u8]) {
    drop(input.splice(at..at, part.iter().copied()));
}

/// Puts another number in the place of one.
fn another_number(input: &mut Vec<u8>, random: &mut Random) {
    let from = random.below(input.len());
    let Some(start) = input[from..].iter().position(u8::is_ascii_digit).map(|i| from + i) else { return };
    let start = start - input[..start].iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let end = start + input[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    drop(input.splice(start..end, NUMBERS[random.below(NUMBERS.len())].bytes()));
}

/// Repeats a part until the input is large.
fn blow_up(input: &mut Vec<u8>, random: &mut Random) {
    let range = random.range(input.len());
    let part = match random.below(3) {
        0 => [&b"1,"[..], b"[],", b"{\"\":1},", b"\"\",", b"[[", b"{\"a\":"][random.below(6)].to_vec(),
        _ if range.is_empty() => b"0".to_vec(),
        _ => input[range.clone()].to_vec(),
    };
    let times = LARGE_BYTES / part.len();
    insert(input, range.end.min(input.len()), &part.repeat(times));
}
