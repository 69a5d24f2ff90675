//! What fits and what does not, by runs that ran or ended out of memory: nanotron's benchmark of the Ultra-Scale Playbook
//! (Hugging Face 2025), of the half that was kept back from the fit a quarter, by the hash of its ids.

use plan::calibration::Calibration;
use published::validate::validate;
use spec::Catalog;

const TABLE: &str = include_str!("memory.csv");

#[test]
fn calls_are_right_on_rows_that_no_constant_saw() {
    let catalog = Catalog::builtin().unwrap();
    let v = validate("memory.csv", TABLE, &catalog, &Calibration::default()).unwrap();
    let m = v.memory.expect("outcomes");
    assert_eq!((m.all, m.fitted.rows, v.priced), (m.kept_back, 0, 0), "all kept back");
    assert!(m.not_called.is_empty() && v.not_priced.is_empty(), "{:?}", m.not_called);
    assert!(m.all.rows > 150 && m.all.right >= 0.97, "{:?}", m.all);
    assert!(m.all.missed <= 0.04 && m.all.false_alarms < 0.03, "{:?}", m.all);
    assert!((m.all.median_ratio - 1.0).abs() <= 0.05, "{:?}", m.all);
}

#[test]
fn outcomes_and_times_stand_in_one_table_and_nonsense_is_refused() {
    let catalog = Catalog::builtin().unwrap();
    let header = "id,accelerator,n_accel,layers,hidden,seq_len,global_batch,micro_batch,tp,pp,step_time_s,outcome,reserved_gb";
    let table = |rows: &[&str]| format!("{header}\n{}\n", rows.join("\n"));
    let run = |rows: &[&str]| validate("t.csv", &table(rows), &catalog, &Calibration::default());
    let timed = "a,h100,8,24,2048,2048,64,1,1,1,2.5,,";
    let both = "b,h100,8,24,2048,2048,64,1,1,1,2.5,ran,40";
    let out = "c,h100,8,96,12288,2048,64,1,1,1,,out of memory,";
    let v = run(&[timed, both, out]).unwrap();
    let memory = v.memory.expect("outcomes");
    assert_eq!((v.priced, memory.all.rows, v.not_priced.len()), (2, 2, 0));
    assert_eq!((memory.all.missed, memory.all.right > 0.0), (0.0, true));
    assert!(run(&[timed]).unwrap().memory.is_none());
    let refused = run(&["a,h100,8,24,2048,2048,64,1,1,1,2.5,perhaps,"]).unwrap_err();
    assert_eq!(refused.to_string(), "t.csv:2: outcome = \"perhaps\"");
    assert!(refused.hint_text().is_some());
}
