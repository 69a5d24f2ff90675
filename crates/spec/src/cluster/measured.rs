//! What collectives were measured to reach on a fabric.

use super::{ACCELERATORS_MAX, need};
use crate::catalog::Entry;
use crate::{Error, Result};

/// Bus bandwidths as `nccl-tests` prints them, measured with all accelerators of so many nodes in one group.
#[derive(Clone, Debug, PartialEq)]
pub struct MeasuredBus {
    /// Bytes of the message (of the whole vector) that they were measured with.
    pub message_bytes: f64,
    /// Bytes from which on longer messages are slower a byte, if they are.
    pub full_bytes: Option<f64>,
    /// Nodes, and bytes per second of an all-reduce.
    pub all_reduce: Vec<(usize, f64)>,
    /// The same of an all-gather; a reduce-scatter is taken to be as fast.
    pub all_gather: Vec<(usize, f64)>,
}

impl MeasuredBus {
    /// The table of a fabric, if it has one: `all_reduce.4 = { value = 161, unit = "GB/s", ... }` is what four nodes reach.
    ///
    /// # Errors
    /// If a key names no nodes, or the size of the messages is missing.
    pub(super) fn of(fabric: &Entry) -> Result<Option<Self>> {
        let (all_reduce, all_gather) = (rates(fabric, "all_reduce")?, rates(fabric, "all_gather")?);
        if all_reduce.is_empty() && all_gather.is_empty() {
            return Ok(None);
        }
        let message_bytes = need(fabric, "message")?.value;
        let full_bytes = fabric.measure("message_full").map(|m| m.value);
        Ok(Some(MeasuredBus { message_bytes, full_bytes, all_reduce, all_gather }))
    }
}

/// Nodes and rates of one collective, fewest nodes first.
fn rates(fabric: &Entry, what: &str) -> Result<Vec<(usize, f64)>> {
    let mut rows = Vec::new();
    for key in fabric.fields.keys() {
        let Some(nodes) = key.strip_prefix(what).and_then(|k| k.strip_prefix('.')) else { continue };
        let Some(nodes) = nodes.parse().ok().filter(|n| (2..=ACCELERATORS_MAX).contains(n)) else {
            let place = format!("{}: fabric.{}.{key}", fabric.place, fabric.name);
            return Err(Error::user(format!("{place} is no count of nodes"))
                .hint(format!("write it like {what}.4, from 2 nodes up")));
        };
        rows.push((nodes, need(fabric, key)?.value));
    }
    rows.sort_by_key(|r| r.0);
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Catalog;

    const MINE: &str = r#"
[fabric.mine]
base = "roce-400"
message = { value = 1, unit = "GB", source = "nccl-tests here", date = "2026-11" }
all_reduce.16 = { value = 50, unit = "GB/s", source = "nccl-tests here", date = "2026-11" }
all_reduce.2 = { value = 300, unit = "GB/s", source = "nccl-tests here", date = "2026-11" }

[platform.mine]
node = "dgx-h100"
fabric = "mine"
nodes = { value = 16, unit = "nodes", source = "counted here", date = "2026-11" }
"#;

    #[test]
    fn a_table_of_ones_own_is_read_in_order() {
        let catalog = Catalog::with_files(&[("mine.toml", MINE)]).unwrap();
        let found = catalog.cluster("mine", None).unwrap().scale_out.measured.unwrap();
        let expected = MeasuredBus {
            message_bytes: 1e9,
            full_bytes: None,
            all_reduce: vec![(2, 3e11), (16, 5e10)],
            all_gather: Vec::new(),
        };
        assert_eq!(found, expected);
        assert_eq!(catalog.cluster("dgx-h100", None).unwrap().scale_out.measured, None);
    }

    #[test]
    fn a_bad_table_is_refused_with_its_place() {
        let check = |from: &str, to: &str, expected: &str| {
            let text = MINE.replace(from, to);
            assert_ne!(text, MINE, "{from}");
            let e = Catalog::with_files(&[("mine.toml", &text)]).unwrap_err();
            assert!(e.to_string().contains(expected) && e.hint_text().is_some(), "{e}");
        };
        check("all_reduce.16", "all_reduce.few", "fabric.mine.all_reduce.few is no count of nodes");
        check("all_reduce.16", "all_reduce.1", "fabric.mine.all_reduce.1 is no count of nodes");
        check("value = 50,", "value = 0,", "all_reduce.16 = 0");
        check("message =", "# message =", "message is missing");
    }
}
