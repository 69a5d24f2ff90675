//! The nearest known name, for hints.

/// The candidate that `name` was probably meant to be, or `None` when nothing is close.
///
/// Dotted names also match by their last part, so a key written in the wrong section is found.
///
/// ```
/// use spec::suggest::nearest;
/// assert_eq!(nearest("train.step", ["train.steps", "train.seed"]), Some("train.steps"));
/// assert_eq!(nearest("train.lr", ["train.seed", "optim.lr"]), Some("optim.lr"));
/// assert_eq!(nearest("checkpnt.evry", ["checkpoint.every"]), Some("checkpoint.every"));
/// assert_eq!(nearest("banana", ["train.steps"]), None);
/// ```
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name = normal(name);
    let letters = name.chars().count();
    let (mut best, mut best_cost) = (None, usize::MAX);
    for candidate in candidates {
        let other = normal(candidate);
        let others = other.chars().count();
        // A third of the letters wrong is still a typing slip; more is another word.
        let within = (letters.max(others) / 3).max(1);
        // Nothing is compared letter by letter with a name of a megabyte.
        let near = letters.abs_diff(others) <= within;
        let mut cost = if near { distance(&name, &other) } else { usize::MAX };
        if cost > within {
            cost = if last_part(&name) == last_part(&other) { within } else { continue };
        }
        if cost < best_cost {
            (best, best_cost) = (Some(candidate), cost);
        }
    }
    best
}

/// `did you mean x?`, or the list of what there is when nothing is close.
pub fn hint<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str> + Clone) -> String {
    match nearest(name, candidates.clone()) {
        Some(found) => format!("did you mean `{found}`?"),
        None => {
            let all: Vec<&str> = candidates.into_iter().collect();
            format!("known: {}", all.join(", "))
        }
    }
}

/// Letters and digits of a name in lower case, and what else is in `also`: names that differ in nothing else are one.
///
/// ```
/// use spec::suggest::plain;
/// assert_eq!(plain("DeepSeek V3.1", ""), "deepseekv31");
/// assert_eq!(plain("DeepSeek V3.1", "."), "deepseekv3.1");
/// ```
pub fn plain(name: &str, also: &str) -> String {
    let kept = name.chars().filter(|c| c.is_ascii_alphanumeric() || also.contains(*c));
    kept.map(|c| c.to_ascii_lowercase()).collect()
}

fn normal(name: &str) -> String {
    name.chars().map(|c| if c == '-' { '_' } else { c.to_ascii_lowercase() }).collect()
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Insertions, deletions, substitutions and swaps of neighbours between two words (optimal string alignment).
pub fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let same = a[i - 1] == b[j - 1];
            row[j] = (last[j - 1] + usize::from(!same)).min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "abc", 3), ("steps", "step", 1), ("sedd", "seed", 1), ("lr", "rl", 1), ("a", "a", 0)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn hints_list_everything_when_nothing_is_close() {
        assert_eq!(hint("llama_3_8b", ["llama3-8b", "gpt2"]), "did you mean `llama3-8b`?");
        assert_eq!(hint("zzzzzz", ["llama3-8b", "gpt2"]), "known: llama3-8b, gpt2");
    }
}
