//! A run owns its tokenizer, its data and its past by content: nothing of them is exchanged without a word.

use std::fs;

use crate::common::{Lab, Ran, sets};

/// Trains in `run` with `args`.
fn train(lab: &Lab, run: &str, args: &str) -> Ran {
    lab.run(&format!("train {} --set run.dir={run} {args}", sets()))
}

/// Trains on, which must succeed and say `said`.
#[track_caller]
fn goes_on(lab: &Lab, run: &str, args: &str, said: &str) {
    let ran = train(lab, run, args);
    assert_eq!(ran.code, Some(0), "{args}\n{}{}", ran.out, ran.err);
    assert!(ran.err.contains(said), "{args}\nfound    {}\nexpected {said}", ran.err);
}

/// Trains on, which must be refused with all of `said` in message and hint, and leave the run's tokenizer alone.
#[track_caller]
fn is_refused(lab: &Lab, run: &str, args: &str, said: &[&str]) {
    let tokenizer = || fs::read(lab.path(run).join("tokenizer.json")).ok();
    let before = tokenizer();
    let ran = train(lab, run, args);
    assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
    assert!(ran.err.contains("error: ") && ran.err.contains("hint: "), "{args}\n{}", ran.err);
    for said in said {
        assert!(ran.err.contains(said), "{args}\nfound    {}\nexpected {said}", ran.err);
    }
    assert_eq!(tokenizer(), before, "{args}");
}

/// What the journal of rank 0 says was accepted.
fn accepted(lab: &Lab, run: &str) -> Vec<String> {
    let records = journal::read(&journal::path(&lab.path(run), 0)).expect("a journal");
    let what = |r| match r {
        journal::Record::Accepted { what, .. } => Some(what),
        _ => None,
    };
    records.into_iter().filter_map(what).collect()
}

/// Another text than the lab's.
fn other_text(n: usize) -> String {
    (0..n).map(|i| format!("{{\"text\": \"other words {} and numbers {}\"}}\n", i % 17, i * i % 97)).collect()
}

#[test]
fn text_that_changed_is_refused_and_the_tokenizer_stays() {
    let lab = Lab::new();
    lab.write("a.jsonl", other_text(900));
    let started = "--text a.jsonl --set checkpoint.keep=0";
    goes_on(&lab, "r", &format!("{started} --stop-after 2"), "data ./cache/corpus-");
    goes_on(&lab, "r", &format!("{started} --stop-after 3"), "from cache");

    lab.write("a.jsonl", other_text(1200));
    is_refused(
        &lab,
        "r",
        started,
        &[
            "the data of r has changed: ",
            "until step 3",
            "set data.prefix=./cache/corpus-",
            "--accept-changed-data",
        ],
    );
    // The same bytes under another name, and the same file spelt otherwise, are the same data.
    lab.write("b.jsonl", other_text(900));
    goes_on(&lab, "r", &started.replace("a.jsonl", "b.jsonl --stop-after 4"), "the data has moved");
    goes_on(&lab, "r", &started.replace("a.jsonl", "./b.jsonl --stop-after 5"), "the data has moved");
    // Touched is not changed, and what is gone was prepared before.
    lab.write("b.jsonl", other_text(900));
    goes_on(&lab, "r", &started.replace("a.jsonl", "./b.jsonl"), "resumed from r/checkpoints/step-00000005");
    fs::remove_dir_all(lab.path("r/checkpoints/step-00000006")).expect("one step back");
    fs::remove_file(lab.path("b.jsonl")).expect("remove the text");
    goes_on(&lab, "r", &started.replace("a.jsonl", "./b.jsonl"), "the text is no longer there since the run");

    fs::remove_dir_all(lab.path("r/checkpoints/step-00000006")).expect("one step back");
    let tokenizer = fs::read(lab.path("r/tokenizer.json")).expect("a tokenizer");
    assert_eq!(accepted(&lab, "r"), [""; 0]);
    goes_on(&lab, "r", &format!("{started} --accept-changed-data"), "--accept-changed-data: the data of r");
    assert_eq!(accepted(&lab, "r").len(), 1);
    assert_eq!(fs::read(lab.path("r/tokenizer.json")).expect("a tokenizer"), tokenizer);
    let again = train(&lab, "r", &format!("{started} --set data.tokenizer=none.json"));
    assert_eq!(again.code, Some(2), "{}", again.err);
}

#[test]
fn text_that_was_tokenised_before_may_be_gone_from_the_cache() {
    let lab = Lab::new();
    goes_on(&lab, "r", "--text text.txt --stop-after 2", "built");
    fs::remove_dir_all(lab.path("cache")).expect("remove the cache");
    goes_on(&lab, "r", "--text text.txt", "are gone: its text is tokenised again");
    assert_eq!(accepted(&lab, "r"), [""; 0]);
}

/// What cargo downloads between two runs of the same line changes nothing.
#[test]
fn the_default_text_is_that_which_the_run_was_started_with() {
    let lab = Lab::new();
    let source = |name: &str, lines: usize| {
        let dir = lab.path(&format!("home/registry/src/index/{name}/src"));
        fs::create_dir_all(&dir).expect("a crate");
        let text: String = (0..lines)
            .map(|i| format!("fn {}_{i}() {{ step({}) }}\n", name.replace(['-', '.'], "_"), i % 7))
            .collect();
        fs::write(dir.join("lib.rs"), text).expect("a source");
    };
    for n in 0..8 {
        source(&format!("crate-{n}-1.0.{n}"), 5000);
    }
    let run = |args: &str| {
        let mut command = lab.command(&format!("train {} --set run.dir=r {args}", sets()));
        let done = command.env("CARGO_HOME", lab.path("home")).output().expect("start the program");
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (code, err) = run("--stop-after 2");
    assert_eq!(code, Some(0), "{err}");
    let tokenizer = fs::read(lab.path("r/tokenizer.json")).expect("a tokenizer");
    source("newer-2.0.0", 900);
    let (code, err) = run("--stop-after 4");
    assert_eq!(code, Some(0), "{err}");
    assert!(
        err.contains("sources of crates, has changed since the run was started: it goes on with its own"),
        "{err}"
    );
    assert_eq!(fs::read(lab.path("r/tokenizer.json")).expect("a tokenizer"), tokenizer);
    fs::remove_dir_all(lab.path("cache")).expect("remove the cache");
    let (code, err) = run("");
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("are gone") || err.contains("the data of r has changed"), "{err}");
}

#[test]
fn datasets_are_known_by_content() {
    let lab = Lab::new();
    lab.write("other.jsonl", other_text(900));
    lab.ok("data build text.txt -o set --vocab-size 300");
    lab.ok("data build other.jsonl -o other --tokenizer set.tokenizer.json");
    lab.ok("data build other.jsonl -o foreign --vocab-size 290");
    let copy = |from: &str, to: &str| {
        for end in [".bin", ".idx", ".json", ".tokenizer.json"] {
            fs::copy(lab.path(&format!("{from}{end}")), lab.path(&format!("{to}{end}"))).expect("a copy");
        }
    };
    goes_on(&lab, "r", "--set data.prefix=set --stop-after 2", "run r");
    let absolute = format!("--set data.prefix={}", lab.path("set").display());
    goes_on(&lab, "r", &format!("{absolute} --stop-after 3"), "the data has moved");
    copy("set", "moved");
    goes_on(&lab, "r", "--set data.prefix=moved --stop-after 4", "the data has moved");
    goes_on(&lab, "r", "--set data.prefix=moved --stop-after 5 --nproc 2", "resumed");
    copy("other", "moved");
    let said = ["the data of r has changed: ", "until step 5", "--accept-changed-data"];
    is_refused(&lab, "r", "--set data.prefix=moved", &said);
    is_refused(&lab, "r", "--set data.prefix=moved --nproc 2", &said);
    is_refused(
        &lab,
        "r",
        "--set data.prefix=foreign --accept-changed-data",
        &[
            "foreign.tokenizer.json (290 entries",
            "is not the tokenizer of r",
            "r/tokenizer.json (298 entries",
        ],
    );
    goes_on(
        &lab,
        "r",
        "--set data.prefix=moved --accept-changed-data",
        "--accept-changed-data: the data of r",
    );
    assert_eq!(accepted(&lab, "r").len(), 1);

    let blend = "--set data.blend=[{prefix=\"set\",weight=1},{prefix=\"foreign\",weight=1}]";
    is_refused(&lab, "mixed", blend, &["two tokenizers in one run", "set.tokenizer", "foreign.tokenizer"]);
    let own = fs::read(lab.path("r/tokenizer.json")).expect("a tokenizer");
    fs::copy(lab.path("foreign.tokenizer.json"), lab.path("r/tokenizer.json")).expect("exchanged");
    is_refused(&lab, "r", "--set data.prefix=moved", &["is not the tokenizer that the checkpoint of step 6"]);
    fs::remove_file(lab.path("r/tokenizer.json")).expect("remove it");
    is_refused(&lab, "r", "--set data.prefix=moved", &["r/tokenizer.json is gone"]);
    fs::write(lab.path("r/tokenizer.json"), own).expect("put it back");
    goes_on(&lab, "r", "--set data.prefix=moved", "all 6 steps were done before");
}

#[test]
fn weights_keep_the_tokenizer_that_they_were_learnt_with() {
    let lab = Lab::new();
    lab.write("t.jsonl", other_text(900));
    lab.ok("data build t.jsonl -o foreign --vocab-size 290");
    lab.train("run", "");
    lab.ok("export run hf");
    lab.ok("import hf imp --set data.vocab_size=300");
    let own = fs::read(lab.path("imp/tokenizer.json")).expect("a tokenizer");
    let has_own = |run: &str| {
        let found = data::tokenizer_fingerprint(&lab.path(run).join("tokenizer.json")).expect("a tokenizer");
        let expected = data::tokenizer_fingerprint(&lab.path("imp/tokenizer.json")).expect("a tokenizer");
        assert_eq!(found, expected, "{run}");
    };
    goes_on(
        &lab,
        "tuned",
        "--init imp --text t.jsonl",
        "text is tokenised by the tokenizer of imp, of 298 entries",
    );
    has_own("tuned");
    let both = [
        "foreign.tokenizer.json (290 entries",
        "is not the tokenizer of imp",
        "imp/tokenizer.json (298 entries",
    ];
    is_refused(&lab, "bad", "--init imp --set data.prefix=foreign", &both);
    is_refused(&lab, "bad", "--init imp --text t.jsonl --set data.tokenizer=foreign.tokenizer.json", &both);
    assert!(!lab.path("bad").exists());
    goes_on(
        &lab,
        "tuned",
        "--init imp --text t.jsonl",
        "--init imp is not used: tuned goes on from its own step 6",
    );

    // The imported run itself goes on as any other, on whatever text.
    is_refused(&lab, "imp", "--set data.prefix=foreign", &["is not the tokenizer of imp"]);
    goes_on(&lab, "imp", "--text t.jsonl", "resumed from imp/checkpoints/step-00000000 at step 0");
    assert_eq!(fs::read(lab.path("imp/tokenizer.json")).expect("a tokenizer"), own);

    fs::remove_file(lab.path("hf/tokenizer.json")).expect("remove it");
    lab.ok("import hf bare --set data.vocab_size=300");
    is_refused(&lab, "bad", "--init bare --text t.jsonl", &["bare has no tokenizer", "data.tokenizer"]);
}

/// What is asked of a run, the exit code, and what the program then says.
type Then<'a> = (&'a str, i32, &'a [&'a str]);

/// Trains six steps in `run`, then asks one thing after the other; what changes the run comes last.
#[track_caller]
fn check_longer(lab: &Lab, run: &str, first: &str, then: &[Then<'_>]) {
    lab.train(run, first);
    for (args, code, said) in then {
        let ran = train(lab, run, &format!("--text text.txt {first} {args}"));
        assert_eq!(ran.code, Some(*code), "{run} {args}\n{}", ran.err);
        for said in *said {
            assert!(ran.err.contains(said), "{run} {args}\nfound    {}\nexpected {said}", ran.err);
        }
        let recorded = accepted(lab, run);
        assert_eq!(recorded.len(), usize::from(args.contains("--accept") && *code == 0), "{recorded:?}");
    }
}

#[test]
fn a_finished_run_says_truly_how_to_go_on() {
    let lab = Lab::new();
    let longer = "--set train.steps=12";
    let accepted = "--set train.steps=12 --accept-changed-schedule";
    check_longer(
        &lab,
        "constant",
        "--set schedule.kind=constant",
        &[
            ("", 0, &["all 6 steps were done before; a larger train.steps goes on"]),
            // Other keys are no matter of the schedule.
            (&format!("{accepted} --set train.seed=1"), 2, &["train.seed = 1, was 42"]),
            (longer, 0, &["resumed from constant/checkpoints/step-00000006"]),
        ],
    );
    // A longer run would have a longer warmup by default; this one's is past.
    check_longer(
        &lab,
        "warmup",
        "--set schedule.kind=constant --set train.steps=30 --set train.eval_every=0",
        &[("--set train.steps=60 --stop-after 31", 0, &["resumed"])],
    );
    for kind in ["cosine", "linear"] {
        let init = format!("--init {kind} --set run.dir=NEW");
        let refused = [
            "train.steps = 12, was 6: the learning rate of step",
            "cannot be extended; constant can at any time, wsd until its decay begins",
            &init,
            "--accept-changed-schedule",
        ];
        check_longer(
            &lab,
            kind,
            &format!("--set schedule.kind={kind}"),
            &[
                ("", 0, &["all 6 steps were done before", refused[1], refused[2], refused[3]]),
                (longer, 2, &refused),
                (accepted, 0, &["--accept-changed-schedule: train.steps = 12, was 6", "resumed"]),
            ],
        );
    }
    let decay = "--set schedule.kind=wsd --set schedule.decay_steps=2";
    check_longer(
        &lab,
        "wsd",
        decay,
        &[(longer, 2, &["until its decay begins, here after step 4"]), (accepted, 0, &["resumed"])],
    );
    lab.train("before-decay", &format!("{decay} --stop-after 4"));
    goes_on(&lab, "before-decay", &format!("--text text.txt {decay} {longer}"), "resumed");
}

#[test]
fn weights_of_a_finished_run_begin_another() {
    let lab = Lab::new();
    lab.train("r", "");
    goes_on(&lab, "next", "--init r --text text.txt", "text is tokenised by the tokenizer of r");
    assert_eq!(lab.newest("next"), lab.path("next/checkpoints/step-00000006"));
}
