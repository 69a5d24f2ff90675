//! The guide's claims against what the project's research found of each, by hand and once.

use guide::{Claim, Verdict};

fn claims() -> Vec<Claim> {
    let catalog = spec::Catalog::builtin().expect("the catalogue");
    let calibration = plan::calibration::Calibration::builtin().expect("the calibration");
    guide::check(&catalog, &calibration).expect("claims")
}

#[test]
fn verdicts_are_those_of_the_hand_made_check() {
    use Verdict::{Ambiguous as A, Confirmed as C, NoFigure as N, Stale as S, Unconfirmed as U, Wrong as W};
    let expected = [
        C, W, W, A, U, A, C, C, A, W, C, A, W, U, C, W, C, W, W, C, A, W, C, C, S, U, C, A, W, C, W, C, W, C,
        C, W, C, W, U, C, S, A, W, C, S, W, U, C, C, W, C, W, C, W, U, N, N,
    ];
    let found = claims();
    let wrong: Vec<String> = found
        .iter()
        .zip(expected)
        .filter(|(claim, expected)| claim.verdict != *expected)
        .map(|(c, e)| format!("{} {}: {:?}, by hand {e:?}: {}", c.number, c.claim, c.verdict, c.ours))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(found.len(), 57);
}

#[test]
fn figures_are_those_of_the_hand_made_check() {
    let claims = claims();
    let check = |number: usize, expected: &str| {
        let c = &claims[number - 1];
        assert!(c.ours.contains(expected), "{number} {}: {}, by hand {expected}", c.claim, c.ours);
    };
    for (number, expected) in [
        (2, "7.8 EFLOP/s"),
        (2, "98.9 EFLOP/s"),
        (10, "31 to 2,048"),
        (12, "$9,600,000"),
        (12, "$11.85M"),
        (13, "14,400 GPUs"),
        (15, "6,144 chips"),
        (16, "3 dims"),
        (19, "16,000 A100"),
        (22, "0.231 EB"),
        (28, "450 GB/s"),
        (29, "7,200 GB/s"),
        (29, "3,600 GB/s"),
        (37, "512,000 sequences"),
        (43, "1,440,000 to 2,880,000"),
        (45, "$55.04/h"),
        (48, "$230,400"),
        (50, "1,620 GPU-days"),
        (50, "38,889 GPU-hours"),
        (52, "65.59"),
        (52, "32.8 %"),
        (53, "1,275 W"),
        (54, "$37.5M"),
        (54, "$46.3M"),
        (57, "3.09 h"),
    ] {
        check(number, expected);
    }
}

/// Nothing is a constant: where a fact of the catalogue changes, the figure and the verdict follow.
#[test]
fn figures_follow_the_catalogue() {
    let changed = "[accelerator.h100-sxm5]\nbase = \"h100-sxm5\"\npower = { value = 1400, unit = \"W\", source = \"a test\", date = \"2026\" }\n\
        [platform.meta-rsc]\nbase = \"meta-rsc\"\nnodes = { value = 2675, unit = \"nodes\", source = \"a test\", date = \"2026\" }\n";
    let catalog = spec::Catalog::with_files(&[("changed.toml", changed)]).expect("the catalogue");
    let calibration = plan::calibration::Calibration::builtin().expect("the calibration");
    let claims = guide::check(&catalog, &calibration).expect("claims");
    assert_eq!((claims[18].verdict, claims[52].verdict), (Verdict::Confirmed, Verdict::Wrong));
    assert!(claims[52].ours.contains("1,400 W") && claims[52].source.contains("a test"), "{:?}", claims[52]);
}
