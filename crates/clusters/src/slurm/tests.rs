use super::*;

fn train() -> Vec<String> {
    ["/bin/phalanx", "train", "--set", "data.text=my text"].map(String::from).to_vec()
}

fn base() -> Request {
    Request { nodes: 2, tasks_per_node: 4, ..Request::new("mine", train()) }
}

#[test]
fn a_script_that_a_person_can_read() {
    let request = Request {
        time: Some(Time { seconds: 14_400 }),
        options: vec![("partition".into(), "gpu".into()), ("exclusive".into(), String::new())],
        gpus_per_node: Some(4),
        cpus_per_task: Some(8),
        memory: Some(Memory { bytes: 64 << 30 }),
        setup: vec!["module load cuda".into()],
        ..base()
    };
    let script = script(&request).unwrap();
    assert_eq!(script.text, include_str!("expected.sbatch"));
    assert!(script.decisions.iter().all(|d| !d.what.is_empty() && !d.why.is_empty()));
    assert!(script.text.lines().all(|l| l.len() <= 120));
}

#[test]
fn a_sweep_has_every_combination_once() {
    let axes = vec![Axis::parse("optim.lr=1e-3,3e-4").unwrap(), Axis::parse("train.seed=1, 2 ,3").unwrap()];
    let sweep = Sweep::new(axes, "runs/s".into(), Some(2)).unwrap();
    let runs = sweep.runs();
    assert_eq!(runs.len(), 6);
    assert_eq!(runs[4], ["optim.lr=3e-4", "train.seed=2", "run.dir=runs/s/4"]);
    let text = script(&Request { sweep: Some(sweep), ..base() }).unwrap().text;
    assert!(
        text.contains("#SBATCH --array=0-5%2\n") && text.contains("#SBATCH --output=mine-%A_%a.log\n"),
        "{text}"
    );
    assert!(
        text.contains("\n4) choice=(--set optim.lr=3e-4 --set train.seed=2 --set run.dir=runs/s/4) ;;\n"),
        "{text}"
    );
    assert!(text.contains("'data.text=my text' \"${choice[@]}\"\n"), "{text}");
}

fn check(request: &Request, words: &str) {
    let error = script(request).map(|s| s.text).expect_err(words);
    assert!(error.to_string().contains(words) && error.exit_code() == 2, "{error}, expected {words}");
}

#[test]
fn what_slurm_would_misread_is_refused() {
    let time = |seconds| Some(Time { seconds });
    let option = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
    check(&Request { nodes: 0, ..base() }, "--nodes=0");
    check(&Request { tasks_per_node: 0, ..base() }, "--ntasks-per-node=0");
    check(&Request { cpus_per_task: Some(0), ..base() }, "--cpus-per-task=0");
    check(
        &Request { gpus_per_node: Some(2), ..base() },
        "--gpus-per-node=2 is less than --ntasks-per-node=4",
    );
    check(&Request { time: time(120), ..base() }, "--time=00:02:00 is no longer than --grace=00:02:00");
    check(&Request { grace: Time { seconds: 70_000 }, ..base() }, "65535");
    check(&Request { name: "my job".into(), ..base() }, "--job-name=my job");
    check(&Request { name: "-x".into(), ..base() }, "--job-name=-x");
    check(&Request { options: option("nodes", "3"), ..base() }, "--sbatch --nodes=3 is decided");
    check(&Request { options: option("Partition", "x"), ..base() }, "--sbatch --Partition=x");
    check(&Request { options: option("partition", "a #b"), ..base() }, "an option of sbatch");
    check(&Request { options: option("comment", "a\nb"), ..base() }, "line break");
    check(&Request { setup: vec!["a\nb".into()], ..base() }, "line break");
}

#[test]
fn sweeps_that_make_no_sense_are_refused() {
    let check = |axes: &[&str], words: &str| {
        let made = axes.iter().map(|a| Axis::parse(a)).collect::<Result<Vec<_>>>();
        let error = made.and_then(|axes| Sweep::new(axes, "runs".into(), None)).expect_err(words);
        assert!(error.to_string().contains(words) && error.exit_code() == 2, "{error}, expected {words}");
    };
    check(&["optim.lr"], "KEY=VALUE");
    check(&["=1"], "is missing");
    check(&["a=1,,2"], "is missing");
    check(&["a=1,1"], "1 is there twice");
    check(&["a=1", "a=2"], "--sweep a is given twice");
    check(&["run.dir=a,b"], "directory of its own");
    let many = format!("a={}", (0..40).map(|i| i.to_string()).collect::<Vec<_>>().join(","));
    check(&[&many, &many.replace("a=", "b=")], "1600 runs");
}
