//! Writes a journal of many steps, to see what a page makes of it: `long_journal RUN_DIR STEPS`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use journal::{Record, Step};

fn main() -> std::io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let dir = PathBuf::from(args.next().expect("RUN_DIR"));
    let steps: u64 = args.next().and_then(|n| n.to_str()?.parse().ok()).expect("STEPS");
    std::fs::create_dir_all(&dir)?;
    let mut file = BufWriter::new(File::create(journal::path(&dir, 0))?);
    let mut noise = 1_u64;
    for step in 1..=steps {
        // Marsaglia's xorshift: enough to make a curve rough.
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let rough = (noise >> 11) as f64 / (1_u64 << 53) as f64;
        let record = Record::Step(Step {
            time_us: 1_767_225_600_000_000 + 500_000 * step,
            step,
            loss: 2.0 + 8.0 / (1.0 + step as f64 / 1000.0).sqrt() + 0.2 * rough,
            grad_norm: 0.5 + rough,
            lr: 3e-4 * (1.0 - step as f64 / steps as f64),
            tokens: 4_194_304 * step,
            valid_tokens: 4_194_304,
            tokens_per_s: 8_388_608.0 * (0.95 + 0.1 * rough),
            mfu: Some(0.4 + 0.02 * rough),
            step_s: 0.5 + 0.02 * rough,
            memory_bytes: 64 << 30,
            exposed_comm_s: Some(0.05 * rough),
            ..Step::default()
        });
        serde_json::to_writer(&mut file, &record)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}
