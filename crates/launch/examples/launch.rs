//! `phalanx launch` alone: `cargo run -p phalanx-launch --example launch -- --nproc-per-node 2 sh -c 'echo $RANK'`.

fn main() {
    std::process::exit(launch::cli(std::env::args_os().skip(1).collect()));
}
