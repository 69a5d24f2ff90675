//! What cannot be used or is lost is named, with what to do.

use cuda::Cuda;
use spec::{DType, Layout, Result};

use crate::common::{fill, inputs};
use crate::{FAULT, executor, models};

/// A fault of the emulated driver, and words of the error that it must lead to.
pub(crate) const REFUSALS: [(&str, &str); 5] = [
    ("no-device", "the driver sees no GPU"),
    ("old-driver", "the driver is for CUDA 11.4, expected 12.0 or later"),
    ("sm70", "is sm_70: bf16 products need sm_80 or later"),
    ("lost-after:40", "card 0 (Emulated GPU): "),
    ("failed-after:40", "launch failed (CUDA_ERROR_LAUNCH_FAILED)"),
];

/// Runs until something fails.
fn use_it() -> Result<()> {
    let model = &models()[1];
    let mut exec = executor(
        Box::new(Cuda::new(0)?),
        model,
        &Layout { micro_batch: 2, ..Layout::default() },
        DType::Bf16,
        false,
    );
    for step in 1..9 {
        let valid = fill(&mut exec, model.vocab, step);
        exec.step(&inputs(step, valid))?;
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_said() {
    let fault = std::env::var(FAULT).unwrap_or_default();
    let Some((_, words)) = REFUSALS.iter().find(|(f, _)| *f == fault) else { return };
    let error = use_it().expect_err("refused or lost");
    assert!(error.to_string().contains(words), "{fault}: {error}");
    assert!(error.hint_text().is_some(), "{fault}: {error} has no hint");
}
