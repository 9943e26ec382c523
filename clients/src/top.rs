//! `guest top`: what the guests that run use, as it changes.
//!
//! ```text
//!   figures (the guest manager's) --> rates: what happens a second --> view: sorted, as lines --> screen, or blocks of text
//!                                        keys: what was typed --------^
//! ```
//!
//! On a terminal it is live; otherwise, and where a number of blocks is asked for, it prints them one below the other.

mod keys;
mod rates;
mod view;

use std::{
    io::{self, IsTerminal, Read, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{FutureExt, StreamExt, channel::mpsc, pin_mut, select};
use sepal_schema::{report::now_ns, transport::Handle};
use serde::Serialize;

use self::{
    keys::{Key, Keys},
    rates::{Row, Watch},
    view::{Line, Next, View},
};
use crate::{
    args, figures,
    manager::Manager,
    place::Place,
    show, status, table,
    terminal::{self, Raw, Screen},
};

/// Keys that are typed ahead; those beyond are lost.
const TYPED_AHEAD: usize = 64;
/// The size of a screen that does not tell its own.
const USUAL: (u16, u16) = (80, 24);

/// `guest top`.
pub(crate) async fn top(handle: &Handle, place: &Place, args: &args::Top) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let blocks = if args.once { Some(1) } else { args.batch };
    let watched = io::stdin().is_terminal() && io::stdout().is_terminal();
    match blocks.is_none() && !args.json && watched {
        true => live(handle, &manager, args).await,
        false => print_blocks(handle, &manager, args, blocks).await,
    }
}

/// A block as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Block<'a> {
    time_unix_seconds: f64,
    guests: Vec<&'a Row>,
}

async fn print_blocks(handle: &Handle, manager: &Manager, args: &args::Top, blocks: Option<u32>) -> Result<u8> {
    let (begin, view) = (Instant::now(), View::new(args.sort));
    let mut watch = Watch::default();
    // There is nothing to compare the first with.
    watch.update(begin.elapsed(), &figures::of_all(&manager.client).await?);
    let mut due = begin + args.interval;
    let mut left = blocks;
    while left != Some(0) {
        handle.deadline(due).await;
        due = next_time(due, args.interval);
        let rows = watch.update(begin.elapsed(), &figures::of_all(&manager.client).await?);
        let text = if args.json {
            let block = Block {
                time_unix_seconds: show::seconds(now_ns()),
                guests: view.sorted(&rows),
            };
            format!("{}\n", serde_json::to_string(&block)?)
        } else {
            let between = if left == blocks { "" } else { "\n" };
            format!("{between}{}", view.block(&clock(), &rows))
        };
        if !show::print(text.as_bytes())? {
            break;
        }
        left = left.map(|left| left - 1);
    }
    Ok(status::SUCCESS)
}

/// Watches until the user leaves.
async fn live(handle: &Handle, manager: &Manager, args: &args::Top) -> Result<u8> {
    // Before there are threads, which are to leave that signal alone.
    let changes = terminal::size_changes(handle)?;
    let _raw = Raw::enter().context("making the terminal raw")?;
    let _screen = Screen::enter().context("switching to the alternate screen")?;
    let mut typed = typed()?;
    let (begin, mut view) = (Instant::now(), View::new(args.sort));
    let (mut watch, mut rows) = (Watch::default(), Vec::new());
    let mut due = begin;
    loop {
        let time = handle.deadline(due);
        let refresh = async {
            time.await;
            figures::of_all(&manager.client).await
        }
        .fuse();
        pin_mut!(refresh);
        let guests = loop {
            select! {
                guests = refresh => break guests?,
                // Without a terminal there is nobody to show it to.
                key = typed.next() => match key.map(|key| view.key(key, usize::from(size().1), rows.len())) {
                    None | Some(Next::Quit) => return Ok(status::SUCCESS),
                    Some(Next::Redraw) => draw(&view, &rows)?,
                    Some(Next::Nothing) => {}
                },
                changed = changes.next().fuse() => {
                    changed.context("waiting for the terminal's size")?;
                    draw(&view, &rows)?;
                }
                reason = manager.connection.ended().fuse() => {
                    bail!("the connection to the guest manager ended: {reason}")
                }
            }
        };
        rows = watch.update(begin.elapsed(), &guests);
        draw(&view, &rows)?;
        due = next_time(due, args.interval);
    }
}

/// When to look again: at even intervals, but never at a time that is over.
fn next_time(last: Instant, interval: Duration) -> Instant {
    (last + interval).max(Instant::now())
}

fn clock() -> String {
    let mut clock = table::clock(now_ns());
    // Without the milliseconds.
    clock.truncate("15:04:05".len());
    clock
}

fn size() -> (u16, u16) {
    match terminal::size() {
        Some((columns @ 1.., rows @ 1..)) => (columns, rows),
        _ => USUAL,
    }
}

/// The keys that are typed, read on a thread of its own: a terminal cannot be waited for without changing it for whoever else has it.
fn typed() -> Result<mpsc::Receiver<Key>> {
    let (mut sender, receiver) = mpsc::channel(TYPED_AHEAD);
    let work = move || {
        let mut keys = Keys::default();
        let mut buffer = [0; 64];
        loop {
            let length = match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            for key in buffer[..length].iter().filter_map(|byte| keys.byte(*byte)) {
                if sender.try_send(key).is_err_and(|error| error.is_disconnected()) {
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("keys".into())
        .spawn(work)
        .context("starting a thread for the keys")?;
    Ok(receiver)
}

/// Draws the whole screen in one write, each line over what was there.
fn draw(view: &View, rows: &[Row]) -> Result<()> {
    let (columns, height) = size();
    let lines = view.screen(&clock(), rows, (columns.into(), height.into()));
    let mut out = io::stdout().lock();
    out.write_all(paint(&lines).as_bytes())
        .and_then(|()| out.flush())
        .context("writing to the terminal")
}

/// Lines as a terminal is told to show them (ECMA-48): from the upper left corner. Each is cleared first: after a line that is as wide as the
/// screen, what is cleared is its last character.
fn paint(lines: &[Line]) -> String {
    const HOME: &str = "\x1b[H";
    const CLEAR_LINE: &str = "\x1b[2K";
    let lines: Vec<_> = lines
        .iter()
        .map(|line| format!("{CLEAR_LINE}{}", style(line)))
        .collect();
    format!("{HOME}{}", lines.join("\r\n"))
}

fn style(line: &Line) -> String {
    let mut text = line.text.clone();
    // From the end on, so that the places of the others stay.
    for range in line.bold.iter().rev() {
        text.insert_str(range.end, "\x1b[22;24m");
        text.insert_str(range.start, "\x1b[1;4m");
    }
    match line.reverse {
        true => format!("\x1b[7m{text}\x1b[27m"),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_painted_line_by_line() {
        let lines = [
            Line {
                text: "abcdef".into(),
                bold: vec![0..1, 4..6],
                reverse: true,
            },
            Line {
                text: "x".into(),
                bold: Vec::new(),
                reverse: false,
            },
        ];
        assert_eq!(
            paint(&lines),
            "\x1b[H\x1b[2K\x1b[7m\x1b[1;4ma\x1b[22;24mbcd\x1b[1;4mef\x1b[22;24m\x1b[27m\r\n\x1b[2Kx"
        );
    }

    #[test]
    fn what_is_late_is_done_at_once_and_not_twice() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(next_time(now, second * 60), now + second * 60);
        let long_ago = now - second * 10;
        assert!(next_time(long_ago, second) >= now);
    }
}
