//! Which groups talk through NCCL: what each rank knows of itself, and what follows for ranks that know it of each other.

use spec::run::MessageChoice;
use spec::{Error, Result};

use crate::nccl::dotted;

/// What a rank tells the others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    /// NCCL's version, or why it cannot be used.
    pub(crate) nccl: Result<i32, String>,
    /// Which card of which machine.
    pub(crate) card: String,
}

impl Facts {
    pub(crate) fn write(&self) -> String {
        match &self.nccl {
            Ok(version) => format!("{}\n{version}", self.card),
            Err(why) => format!("{}\n{why}", self.card),
        }
    }

    pub(crate) fn read(text: &str) -> Facts {
        let (card, nccl) = text.split_once('\n').unwrap_or((text, "says nothing of NCCL"));
        Facts { nccl: nccl.parse().map_err(|_| nccl.to_owned()), card: card.to_owned() }
    }
}

/// Whether these ranks can talk through NCCL, and if not, why.
pub(crate) fn agree(ranks: &[usize], facts: &[Facts]) -> Result<(), String> {
    let mut first: Option<(usize, i32)> = None;
    for &rank in ranks {
        let version = facts[rank].nccl.as_ref().map_err(|why| format!("rank {rank}: {why}"))?;
        let (other, of_first) = *first.get_or_insert((rank, *version));
        if *version != of_first {
            let (a, b) = (dotted(of_first), dotted(*version));
            return Err(format!("rank {other} has NCCL {a}, rank {rank} {b}"));
        }
    }
    for (i, &rank) in ranks.iter().enumerate() {
        if let Some(other) = ranks[..i].iter().find(|other| facts[**other].card == facts[rank].card) {
            return Err(format!("ranks {other} and {rank} share a card, which NCCL refuses"));
        }
    }
    Ok(())
}

/// The error where NCCL was asked for and cannot be had.
pub(crate) fn refusal(why: &str) -> Error {
    let hint = if why.contains("share a card") {
        "start no more ranks than a machine has cards (CUDA_VISIBLE_DEVICES may hide some), or set run.messages=auto"
    } else if why.contains(" has NCCL ") {
        "install one version on all machines, or set run.messages=auto"
    } else {
        "phalanx devices says where NCCL was looked for (nvidia-nccl-cu13 has it); or set run.messages=auto"
    };
    Error::user(format!("run.messages = \"nccl\": {why}")).hint(hint)
}

/// How ranks talk, in a line.
pub(crate) fn summary(
    choice: MessageChoice,
    carried: usize,
    refused: Option<(&str, &str)>,
    nccl: &str,
) -> String {
    match (choice, refused) {
        (MessageChoice::Host, _) => "messages go over the host's memory, as run.messages says".to_owned(),
        (_, None) => format!("messages go through NCCL {nccl}"),
        (_, Some((_, why))) if carried == 0 => format!("messages go over the host's memory: {why}"),
        (_, Some((group, why))) => {
            format!("messages go through NCCL {nccl}, among {group} over the host's memory: {why}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(of: &[(&str, &str)]) -> Vec<Facts> {
        of.iter().map(|(card, nccl)| Facts::read(&format!("{card}\n{nccl}"))).collect()
    }

    #[test]
    fn facts_are_read_as_they_were_written() {
        let all = [Ok(22_809), Err("NCCL not found".to_owned())];
        for nccl in all {
            let facts = Facts { nccl, card: "host 3b".into() };
            assert_eq!(Facts::read(&facts.write()), facts);
        }
    }

    #[test]
    fn nccl_is_taken_where_every_rank_has_it_and_a_card_of_its_own() {
        let all =
            facts(&[("a", "22809"), ("b", "22809"), ("a", "22809"), ("c", "22705"), ("d", "not found")]);
        assert_eq!(agree(&[0, 1], &all), Ok(()));
        let why = |ranks: &[usize]| agree(ranks, &all).expect_err("refused");
        assert_eq!(why(&[1, 2, 0]), "ranks 2 and 0 share a card, which NCCL refuses");
        assert_eq!(why(&[0, 3]), "rank 0 has NCCL 2.28.9, rank 3 2.27.5");
        assert_eq!(why(&[0, 4]), "rank 4: not found");
        for why in [why(&[1, 2, 0]), why(&[0, 3]), why(&[0, 4])] {
            let error = refusal(&why);
            assert!(
                error.to_string().starts_with("run.messages = \"nccl\": ") && error.hint_text().is_some()
            );
        }
    }
}
