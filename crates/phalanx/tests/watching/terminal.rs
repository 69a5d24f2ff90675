//! `top` on a terminal of its own.

use std::fs::File;
use std::io::Read as _;
use std::process::Stdio;

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::common::{Lab, Started};

#[test]
fn a_terminal_is_left_as_it_was() {
    let lab = Lab::new();
    lab.train("run", "");
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("a terminal of ours");
    let name = ptsname(&master, Vec::new()).expect("its name").into_string().expect("UTF-8");
    let slave = File::options().read(true).write(true).open(&name).expect("its other end");
    let mut child = lab
        .command("top run")
        .stdout(Stdio::from(slave.try_clone().expect("a copy")))
        .stderr(Stdio::from(slave))
        .spawn()
        .expect("start the program");
    let mut master = File::from(master);
    let (mut seen, mut block) = (String::new(), [0; 4096]);
    let mut read_until = |text: &str, seen: &mut String| {
        while !seen.contains(text) {
            // Once nobody has the other end open, reading fails.
            let n = master.read(&mut block).unwrap_or(0);
            assert!(n > 0, "it ended before '{text}': {seen:?}");
            seen.push_str(&String::from_utf8_lossy(&block[..n]));
        }
    };
    read_until("step 6/6", &mut seen);
    assert!(seen.starts_with("\u{1b}[?1049h\u{1b}[?25l"), "{seen:?}");
    Started::signal(child.id() as i32, Signal::INT);
    read_until("\u{1b}[?25h\u{1b}[?1049l", &mut seen);
    assert_eq!(child.wait().expect("wait").code(), Some(0));
}
