/// Offsets are multiples of this many bytes: a cache line, and one AVX-512 vector.
pub const ALIGN: usize = 64;

/// A buffer that needs bytes from one op to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) bytes: usize,
    /// First op that writes it.
    pub(crate) birth: usize,
    /// Last op that uses it.
    pub(crate) death: usize,
}

pub(crate) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// Gives every span an offset so that spans alive at the same time never overlap; returns offsets and total bytes.
///
/// Largest first, each into the lowest gap among the spans that it meets: for a stack-like forward and backward pass
/// this is close to the lower bound, the largest sum of bytes alive at once ([`alive_peak`]).
pub(crate) fn place(spans: &[Span]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..spans.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(spans[i].bytes), spans[i].birth, i));
    let mut offsets = vec![0; spans.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(spans.len());
    let mut total = 0;
    for i in order {
        let mut neighbours: Vec<(usize, usize)> = placed
            .iter()
            .filter(|&&j| spans[j].birth <= spans[i].death && spans[i].birth <= spans[j].death)
            .map(|&j| (offsets[j], offsets[j] + aligned(spans[j].bytes)))
            .collect();
        neighbours.sort_unstable();
        let need = aligned(spans[i].bytes);
        let mut at = 0;
        for (start, end) in neighbours {
            if start >= at + need {
                break;
            }
            at = at.max(end);
        }
        offsets[i] = at;
        total = total.max(at + need);
        placed.push(i);
    }
    (offsets, total)
}

/// The largest sum of bytes alive at one op: no placement can do with less.
pub(crate) fn alive_peak(spans: &[Span]) -> usize {
    let last = spans.iter().map(|s| s.death).max().unwrap_or(0);
    let mut delta = vec![0i64; last + 2];
    for s in spans {
        let bytes = i64::try_from(aligned(s.bytes)).expect("buffers are smaller than 2^63 bytes");
        delta[s.birth] += bytes;
        delta[s.death + 1] -= bytes;
    }
    let mut alive = 0;
    let peak = delta.into_iter().map(|d| {
        alive += d;
        alive
    });
    usize::try_from(peak.max().unwrap_or(0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reuses_the_bytes_of_the_dead() {
        let spans = [
            Span { bytes: 128, birth: 0, death: 1 },
            Span { bytes: 64, birth: 1, death: 3 },
            Span { bytes: 128, birth: 2, death: 3 },
        ];
        let (offsets, total) = place(&spans);
        assert_eq!((offsets, total), (vec![0, 128, 0], 192));
        assert_eq!(alive_peak(&spans), 192);
    }

    proptest! {
        #[test]
        fn never_overlaps_and_never_beats_the_bound(raw in prop::collection::vec((1usize..5000, 0usize..40, 0usize..40), 1..60)) {
            let spans: Vec<Span> = raw
                .iter()
                .map(|&(bytes, a, b)| Span { bytes, birth: a.min(b), death: a.max(b) })
                .collect();
            let (offsets, total) = place(&spans);
            prop_assert!(total >= alive_peak(&spans));
            for i in 0..spans.len() {
                prop_assert!(offsets[i] % ALIGN == 0 && offsets[i] + spans[i].bytes <= total);
                for j in 0..i {
                    let together = spans[i].birth <= spans[j].death && spans[j].birth <= spans[i].death;
                    let apart = offsets[i] + spans[i].bytes <= offsets[j] || offsets[j] + spans[j].bytes <= offsets[i];
                    prop_assert!(!together || apart, "{:?} and {:?} share bytes", spans[i], spans[j]);
                }
            }
        }
    }
}
