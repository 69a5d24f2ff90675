//! `phalanx top`: runs on a terminal.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dash::run::State;
use dash::watch::{Shared, Watch};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::flag::register;
use spec::{Error, Result};

use crate::args::Top;
use crate::{output, watching};
use train::now_us;

mod screen;

use screen::{line, screen};

/// Between two screens.
const EVERY: Duration = Duration::from_millis(500);

/// Size of a terminal that does not say.
const USUAL: (usize, usize) = (80, 24);

pub(crate) fn run(args: &Top) -> Result<u8> {
    let watch = Watch::new(&args.dirs, &watching::lookup(Path::new("")))?;
    watch.wait_until_read();
    let shared = watch.shared();
    if args.json {
        let all: Vec<_> = shared.runs().iter().map(|r| dash::view::facts(r, now_us())).collect();
        output::print(&serde_json::Value::from(all).to_string());
    } else if args.follow {
        follow(&shared);
    } else if io::stdout().is_terminal() {
        live(&shared)?;
    } else {
        let now_us = now_us();
        let lines: Vec<String> = shared.runs().iter().map(|r| line(r, now_us)).collect();
        output::print(&lines.join("\n"));
    }
    Ok(0)
}

/// A line for every new step that is seen, until all runs have ended.
fn follow(shared: &Arc<Shared>) {
    let _viewer = shared.view();
    let mut said: Vec<Option<(Option<u64>, State)>> = vec![None; shared.runs().len()];
    loop {
        let (mut lines, mut over) = (Vec::new(), true);
        let runs = shared.runs();
        for (run, said) in runs.iter().zip(&mut said) {
            let now = (run.latest.map(|l| l.at.step), run.state);
            if *said != Some(now) {
                *said = Some(now);
                lines.push(line(run, now_us()));
            }
            over &= matches!(run.state, State::Finished | State::Failed);
        }
        if lines.is_empty() && !over {
            drop(shared.wait(runs, EVERY));
            continue;
        }
        drop(runs);
        if !lines.is_empty() {
            output::print(&lines.join("\n"));
        }
        if over {
            return;
        }
    }
}

/// A screen of its own, given back when dropped: also after an error or a panic.
struct Terminal;

impl Terminal {
    fn enter() -> io::Result<Terminal> {
        let terminal = Terminal;
        // Another screen, no cursor.
        io::stdout().write_all(b"\x1b[?1049h\x1b[?25l")?;
        Ok(terminal)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let mut out = io::stdout();
        // Nobody is left to tell when the terminal is gone.
        let _ = out.write_all(b"\x1b[?25h\x1b[?1049l").and_then(|()| out.flush());
    }
}

fn live(shared: &Arc<Shared>) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let resized = Arc::new(AtomicBool::new(false));
    let fail = |e: io::Error| Error::failure(format!("catch signals: {e}"));
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        register(signal, stop.clone()).map_err(fail)?;
    }
    register(SIGWINCH, resized).map_err(fail)?;
    let _viewer = shared.view();
    let _terminal = Terminal::enter().map_err(|e| Error::failure(format!("write to the terminal: {e}")))?;
    while !stop.load(Ordering::Relaxed) {
        let (columns, rows) = size();
        let lines = screen(&shared.runs(), now_us(), columns, rows);
        // A terminal that is gone ends it as Ctrl-C does.
        if draw(&lines).is_err() {
            break;
        }
        drop(shared.wait(shared.runs(), EVERY));
        // What comes more often than that is gathered.
        std::thread::park_timeout(EVERY / 5);
    }
    Ok(())
}

fn draw(lines: &[String]) -> io::Result<()> {
    let mut text = String::from("\x1b[H");
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            text.push_str("\r\n");
        }
        text.push_str(&spec::printable(line));
        text.push_str("\x1b[K");
    }
    text.push_str("\x1b[J");
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

/// Columns and rows.
fn size() -> (usize, usize) {
    match rustix::termios::tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
        _ => USUAL,
    }
}
