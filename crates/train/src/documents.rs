//! Documents of a run's data: where they lie, which token ends one, and where each begins in a sequence that several fill.

use std::ops::Range;
use std::path::PathBuf;

use data::Prepared;
use spec::run::{Attend, DataSource};
use spec::{Error, Result, RunSpec};

use crate::exec::Executor;

/// Tells an executor whose attention keeps inside documents which token ends one.
pub(crate) fn attend(exec: &mut Executor, run: &RunSpec, prepared: Option<&Prepared>) -> Result<()> {
    if run.data.attend == Attend::All {
        return Ok(());
    }
    let named = || -> Result<Option<u32>> {
        let Some(path) = &run.data.tokenizer else { return Ok(None) };
        let mut tokenizer = data::Tokenizer::load(path)?;
        run.data.eod.as_ref().map(|end| tokenizer.set_eod(end)).transpose()?;
        Ok(tokenizer.eod())
    };
    let mut end = None;
    for (prefix, _) in parts(run, prepared)? {
        let Some(found) = data::dataset_end(&prefix)?.map_or_else(named, |end| Ok(Some(end)))? else {
            return Err(Error::user(format!(
                "data.attend = \"documents\", but nothing says which token ends a document of {}",
                prefix.display()
            ))
            .hint(
                "name its tokenizer with data.tokenizer, and the token with data.eod; or set data.attend=all",
            ));
        };
        if end.is_some_and(|end| end != found) {
            return Err(Error::user(format!(
                "data.attend = \"documents\", but documents of {} end with another token than those before",
                prefix.display()
            ))
            .hint("build all parts of the data with one tokenizer"));
        }
        end = Some(found);
    }
    end.into_iter().for_each(|end| exec.set_document_end(end));
    Ok(())
}

/// The datasets of a run, with their weights.
pub(crate) fn parts(run: &RunSpec, prepared: Option<&Prepared>) -> Result<Vec<(PathBuf, f64)>> {
    Ok(match (&run.data.source, prepared) {
        (_, Some(p)) => vec![(p.prefix.clone(), 1.0)],
        (DataSource::Prefix(prefix), _) => vec![(prefix.clone(), 1.0)],
        (DataSource::Blend(parts), _) => parts.iter().map(|p| (p.prefix.clone(), p.weight)).collect(),
        _ => return Err(Error::failure("text was not prepared before training")),
    })
}

/// Where the document of each token of `piece` begins; it lies behind the last `end` before the token.
pub(crate) fn document_starts(sequence: &[u32], end: u32, piece: Range<usize>, starts: &mut [u32]) {
    let before = |at: usize| sequence[..at].iter().rposition(|t| *t == end).map_or(0, |p| p + 1);
    let mut begins = before(piece.start);
    for (at, start) in piece.zip(starts) {
        if at > 0 && sequence[at - 1] == end {
            begins = at;
        }
        *start = begins as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::document_starts;

    #[test]
    fn documents_begin_behind_the_token_that_ends_one() {
        let check = |sequence: &[u32], piece: std::ops::Range<usize>, expected: &[u32]| {
            let mut starts = vec![9; piece.len()];
            document_starts(sequence, 0, piece, &mut starts);
            assert_eq!(starts, expected, "{sequence:?}");
        };
        check(&[5, 6, 0, 7, 8, 0, 0, 9], 0..8, &[0, 0, 0, 3, 3, 3, 6, 7]);
        check(&[5, 6, 0, 7, 8, 0, 0, 9], 4..7, &[3, 3, 6]);
        check(&[0, 1, 2], 0..3, &[0, 1, 1]);
        check(&[1, 2, 3], 1..3, &[0, 0]);
    }
}
