//! What clusters are asked for, and training on one.

pub(crate) mod cluster;
mod kubernetes;
mod slurm;

use crate::common::{Lab, tiny};

/// It is refused with one message that has `words` and a hint, with exit code 2.
fn refused(lab: &Lab, args: &str, words: &str) {
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(2), "{args}: {}{}", ran.out, ran.err);
    assert!(ran.err.contains(words) && ran.err.matches("error: ").count() == 1, "{args}: {}", ran.err);
    assert!(ran.out.is_empty(), "{}", ran.out);
}

#[test]
fn a_script_is_shown_before_it_is_submitted() {
    let lab = Lab::new();
    let train = tiny("run", "");
    let text = lab.ok(&format!("launch slurm --nodes 2 --ntasks 4 --time 90 -p gpu --dry-run -- {train}"));
    for line in
        ["#!/bin/bash", "#SBATCH --ntasks-per-node=2", "#SBATCH --time=01:30:00", "#SBATCH --partition=gpu"]
    {
        assert!(text.lines().any(|l| l == line), "no {line} in {text}");
    }
    assert!(!lab.path("phalanx.sbatch").exists(), "--dry-run writes nothing");
    let json = lab.json(&format!("launch slurm --dry-run --json -- {train}"));
    assert!(json["script"].as_str().is_some_and(|s| s.starts_with("#!/bin/bash\n")));
    assert!(json["decisions"].as_array().is_some_and(|d| d.len() > 3));
    let checked = std::process::Command::new("bash").arg("-n").arg("-c").arg(&text).status();
    assert!(checked.is_ok_and(|s| s.success()), "bash reads it");
}

#[test]
fn a_script_draws_a_secret_for_each_start_unless_there_is_one() {
    let lab = Lab::new();
    let script = lab.ok(&format!("launch slurm --nodes 2 --dry-run -- {}", tiny("run", "")));
    // In place of Slurm's: shows what a step would be given, and is done.
    lab.write("srun", "#!/bin/sh\nprintf '%s %s' \"$PHALANX_SECRET\" \"$SLURM_EXPORT_ENV\"\n");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(lab.path("srun"), executable).expect("a mode");
    let path = format!("{}:{}", lab.path("").display(), std::env::var("PATH").unwrap_or_default());
    let secret = |given: &[(&str, &str)]| {
        let mut bash = std::process::Command::new("bash");
        for name in ["PHALANX_SECRET", "PHALANX_SECRET_FILE", "PHALANX_INSECURE"] {
            bash.env_remove(name);
        }
        bash.env("PATH", &path).env("SLURM_EXPORT_ENV", "NONE").envs(given.iter().copied());
        let ran = bash.arg("-c").arg(&script).output().expect("start bash");
        assert!(ran.status.success(), "{ran:?}");
        let shown = String::from_utf8_lossy(&ran.stdout).into_owned();
        shown.strip_suffix(' ').expect("steps get all variables").to_owned()
    };
    let made = secret(&[]);
    assert!(made.len() == 64 && made.bytes().all(|b| b.is_ascii_hexdigit()), "{made}");
    assert_ne!(secret(&[]), made);
    assert_eq!(secret(&[("PHALANX_INSECURE", "0")]).len(), 64);
    assert_eq!(secret(&[("PHALANX_SECRET", "mine")]), "mine");
    assert_eq!(secret(&[("PHALANX_SECRET_FILE", "job.secret")]), "");
    assert_eq!(secret(&[("PHALANX_INSECURE", "1")]), "");
}

#[test]
fn what_cannot_be_asked_of_slurm_is_refused_at_once() {
    let lab = Lab::new();
    let train = tiny("run", "");
    let slurm = |flags: &str, words: &str| refused(&lab, &format!("launch slurm {flags} -- {train}"), words);
    slurm("--nodes 2 --ntasks 3", "--ntasks=3 does not divide over --nodes=2");
    slurm("--nodes 2 --ntasks 4 --ntasks-per-node 3", "contradicts");
    slurm("--nodes 0", "--nodes=0");
    slurm("--time 4:00:00:00", "--time=4:00:00:00");
    slurm("--time 1m", "is no longer than --grace");
    slurm("--mem 64", "--mem=64");
    slurm("--mem 64XB", "--mem=64XB");
    slurm("--job-name a/b", "--job-name=a/b");
    slurm("--sbatch time=4", "--sbatch --time=4");
    slurm("--sweep optim.lr", "--sweep optim.lr");
    // 4 sequences do not divide over 3 ranks.
    slurm("--ntasks 3", "3 ranks");
    refused(&lab, &format!("launch slurm -- {train} --nproc 2"), "the cluster starts the ranks");
    refused(&lab, "launch slurm -- train --set train.stepz=1", "train.stepz");
    refused(&lab, "launch slurm -- train --stepz", "train: unexpected argument '--stepz'");
    refused(&lab, "launch slurm -- python train.py", "python behind --");
    refused(&lab, "launch slurm --nodes 2", "train ...");
    refused(&lab, "launch slurm --nodse 2 -- train", "--nodse");
    lab.write("phalanx.sbatch", "mine");
    slurm("", "was not written by this command");
    assert_eq!(std::fs::read_to_string(lab.path("phalanx.sbatch")).expect("a file"), "mine");
}

#[test]
fn without_slurm_the_script_is_written_and_that_is_said() {
    let lab = Lab::new();
    let args = format!("launch slurm -- {}", tiny("run", ""));
    let output = lab.command(&args).env("PATH", "/nowhere").output().expect("start the program");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("sbatch is not here") && err.contains("hint: phalanx.sbatch is written"), "{err}");
    assert!(lab.path("phalanx.sbatch").exists());
}

#[test]
fn a_run_is_alive_while_it_writes() {
    let lab = Lab::new();
    refused(&lab, "alive nowhere", "nowhere");
    std::fs::create_dir(lab.path("empty")).expect("a folder");
    refused(&lab, "alive empty", "empty has no journal");
    lab.train("run", "");
    assert!(lab.ok("alive run").contains("last record"));
    let age = |run: &str| {
        let path = lab.path(run).join("journal-00000.jsonl");
        let file = std::fs::File::options().append(true).open(path).expect("a journal");
        let hour = std::time::Duration::from_secs(3600);
        file.set_modified(std::time::SystemTime::now() - hour).expect("set a time");
    };
    age("run");
    // It is done, and need not write any more.
    assert_eq!(lab.json("alive run --json")["done"], true);
    std::fs::create_dir(lab.path("hung")).expect("a folder");
    lab.write("hung/journal-00000.jsonl", "{\"kind\":\"step\"}\n");
    assert_eq!(lab.run("alive hung").code, Some(0));
    age("hung");
    assert_eq!(lab.run("alive hung").code, Some(1));
    assert_eq!(lab.run("alive hung --within 2h").code, Some(0));
    refused(&lab, "alive run --within 2x", "--within=2x");
}
