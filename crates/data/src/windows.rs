use spec::{Error, Result};

use crate::batches::{TokenStream, past_the_end, wrong_buffer};

/// Tokens in memory as samples, one after another without overlap: for small data that a program brings along.
///
/// ```
/// use data::{TokenStream, Windows};
///
/// let windows = Windows::new((0..10).collect(), 4)?;
/// let mut sample = [0; 5];
/// windows.sample(1, &mut sample)?;
/// assert_eq!((windows.len(), sample), (2, [4, 5, 6, 7, 8]));
/// # Ok::<(), spec::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Windows {
    tokens: Vec<u32>,
    sequence: usize,
}

impl Windows {
    /// Samples of `sequence` tokens and the target behind them.
    ///
    /// # Errors
    /// If there is not one sample.
    pub fn new(tokens: Vec<u32>, sequence: usize) -> Result<Windows> {
        if sequence == 0 || tokens.len() <= sequence {
            return Err(Error::user(format!(
                "{} tokens, expected at least one sample of {sequence} and the target behind it",
                tokens.len()
            )));
        }
        Ok(Windows { tokens, sequence })
    }

    /// Text as its bytes: a vocabulary of 256.
    ///
    /// # Errors
    /// As [`Windows::new`].
    pub fn bytes(text: &str, sequence: usize) -> Result<Windows> {
        Windows::new(text.bytes().map(u32::from).collect(), sequence)
    }
}

impl TokenStream for Windows {
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
        if out.len() != self.sequence + 1 {
            return Err(wrong_buffer(out.len(), self.sequence));
        }
        if index >= self.len() {
            return Err(past_the_end(index, self.len(), "tokens in memory"));
        }
        let first = index as usize * self.sequence;
        out.copy_from_slice(&self.tokens[first..=first + self.sequence]);
        Ok(())
    }

    fn len(&self) -> u64 {
        ((self.tokens.len() - 1) / self.sequence) as u64
    }

    fn sequence(&self) -> usize {
        self.sequence
    }
}
