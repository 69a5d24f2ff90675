//! Fits the constants of `catalog/serving.toml` on the rows of `tests/serving` that are marked `fit`, and prints them with
//! the errors on those rows and on the others.
//!
//! `cargo run --release -p phalanx-published --example fit_serving [STACK CONSTANT,CONSTANT,...]`

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "rows lie in files, constants go to a terminal"
)]

use std::path::Path;

use inference::stack::Stack;
use published::inference::fit::{CONSTANTS, fit};
use published::inference::{Prepared, Rows, Use};
use spec::{Catalog, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let catalog = Catalog::builtin()?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serving");
    let mut prepared = Vec::new();
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for file in files {
        let name = file.display().to_string();
        let rows = Rows::parse(&name, &std::fs::read_to_string(&file).unwrap(), &catalog)?;
        rows.not_priced.iter().for_each(|n| println!("{name}:{}: {}", n.line, n.reason));
        for row in rows.rows {
            prepared.push(Prepared::new(row)?);
        }
    }
    for stack in Stack::all()? {
        let of = |p: &&Prepared| p.row.stack.name == stack.name;
        let fitted = match args.as_slice() {
            [name, names] if *name == stack.name => {
                let rows: Vec<Prepared> =
                    prepared.iter().filter(of).filter(|p| p.row.used == Use::Fit).cloned().collect();
                fit(&rows, &stack, &names.split(',').collect::<Vec<_>>())
            }
            [] => stack.clone(),
            _ => continue,
        };
        println!("\n{}", stack.name);
        for c in &CONSTANTS {
            println!("  {} = {:.4}", c.name, c.value(&fitted).unwrap_or(f64::NAN));
        }
        for used in [Use::Fit, Use::Check] {
            let mut errors = Vec::new();
            for p in prepared.iter().filter(of).filter(|p| p.row.used == used) {
                match p.compare(&fitted) {
                    Ok(r) => {
                        let each: Vec<String> = r
                            .figures
                            .iter()
                            .map(|f| {
                                format!(
                                    "{} {:.4} for {} {:+.1} %",
                                    f.figure.column(),
                                    f.predicted,
                                    f.published,
                                    100.0 * f.error
                                )
                            })
                            .collect();
                        println!("  {used:?} {}: {}", r.id, each.join(", "));
                        errors.push(r.error);
                    }
                    Err(e) => println!("  {used:?} {}: {e}", p.row.id),
                }
            }
            let n = errors.len().max(1) as f64;
            let most = errors.iter().fold(0.0f64, |a, e| a.max(*e));
            println!(
                "  {used:?}: {} rows, mean {:.1} %, max {:.1} %",
                errors.len(),
                100.0 * errors.iter().sum::<f64>() / n,
                100.0 * most
            );
        }
    }
    Ok(())
}
