//! Progress on standard error: bars for people at a terminal, plain lines for logs, nothing for the quiet.

use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use svdhub::card::bytes;
use svdhub::event::{Event, Observer, Stage, Unit};

use super::output::plain;
use super::session::complain;

/// Draws what a verb reports.
pub struct Progress {
    mode: Mode,
    running: Mutex<Option<Running>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Bars,
    Lines,
    Silent,
}

struct Running {
    stage: Stage,
    unit: Unit,
    total: u64,
    /// What an earlier run did: it counts for the share, not for the rate.
    before: u64,
    done: u64,
    started: Instant,
    said: Instant,
    bar: Option<ProgressBar>,
}

/// Plain lines come this often, so that a log of hours stays readable.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    pub fn new(quiet: bool) -> Self {
        let mode = if quiet {
            Mode::Silent
        } else if std::io::stderr().is_terminal() {
            Mode::Bars
        } else {
            Mode::Lines
        };
        Self {
            mode,
            running: Mutex::new(None),
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn say(&self, text: &str) {
        match self.running().as_ref().and_then(|r| r.bar.as_ref()) {
            Some(bar) => bar.suspend(|| complain(text)),
            None => complain(text),
        }
    }
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Download => "download",
        Stage::Hash => "hash",
        Stage::Spectra => "spectra",
        Stage::Decompose => "decompose",
        Stage::Convert => "convert",
        Stage::Write => "write",
        Stage::Load => "load",
        Stage::Read => "read",
        Stage::Train => "train",
        Stage::Evaluate => "evaluate",
        Stage::Merge => "merge",
        Stage::Export => "export",
        Stage::Upload => "upload",
        Stage::Verify => "verify",
    }
}

fn amount(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Bytes => bytes(value as u64),
        Unit::Flops => format!("{:.1} GFLOP", value / 1e9),
        Unit::Tokens => format!("{value:.0} tokens"),
        Unit::Rows => format!("{value:.0} rows"),
        Unit::Steps if value >= 10.0 => format!("{value:.0} steps"),
        Unit::Steps => format!("{value:.1} steps"),
    }
}

impl Running {
    fn rate(&self) -> f64 {
        let done = self.done.saturating_sub(self.before);
        done as f64 / self.started.elapsed().as_secs_f64().max(1e-3)
    }

    fn left(&self) -> String {
        match self.rate() {
            rate if rate > 0.0 => clock(self.total.saturating_sub(self.done) as f64 / rate),
            _ => "–".into(),
        }
    }

    fn line(&self) -> String {
        let share = 100.0 * self.done as f64 / self.total.max(1) as f64;
        format!(
            "{} {share:.0} % · {}/s · {} left",
            name(self.stage),
            amount(self.rate(), self.unit),
            self.left()
        )
    }
}

/// Seconds as h:mm:ss or m:ss.
pub fn clock(seconds: f64) -> String {
    let s = seconds.round().min(1e7) as u64;
    if s >= 3600 {
        format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
    } else {
        format!("{}:{:02}", s / 60, s % 60)
    }
}

impl Observer for Progress {
    fn event(&self, event: &Event<'_>) {
        if let Event::Warned { message } = event {
            // a warning is no progress: the quiet want to know it too
            return self.say(&format!("warning: {message}"));
        }
        if self.mode == Mode::Silent {
            return;
        }
        match event {
            Event::Started {
                stage,
                done,
                total,
                unit,
            } => {
                let bar = (self.mode == Mode::Bars).then(|| {
                    let style =
                        ProgressStyle::with_template("{prefix:>10} {bar:28} {percent:>3} % {msg}")
                            .unwrap_or_else(|_| ProgressStyle::default_bar());
                    let target = ProgressDrawTarget::stderr_with_hz(10);
                    ProgressBar::with_draw_target(Some(*total), target)
                        .with_style(style)
                        .with_prefix(name(*stage))
                        .with_position((*done).min(*total))
                });
                let now = Instant::now();
                *self.running() = Some(Running {
                    stage: *stage,
                    unit: *unit,
                    total: *total,
                    before: *done,
                    done: *done,
                    started: now,
                    said: now,
                    bar,
                });
            }
            Event::Advanced { stage, by, item } => {
                let mut running = self.running();
                let Some(running) = running.as_mut().filter(|r| r.stage == *stage) else {
                    return;
                };
                running.done += by;
                let item = plain(item);
                match &running.bar {
                    Some(bar) => {
                        bar.set_position(running.done.min(running.total));
                        if running.unit != Unit::Steps {
                            bar.set_message(format!(
                                "{}/s · {} left · {item}",
                                amount(running.rate(), running.unit),
                                running.left()
                            ));
                        }
                    }
                    None if running.said.elapsed() >= LINE_EVERY => {
                        running.said = Instant::now();
                        complain(&running.line());
                    }
                    None => {}
                }
            }
            Event::Finished { stage } => {
                let running = self.running().take_if(|r| r.stage == *stage);
                if let Some(running) = running {
                    if let Some(bar) = &running.bar {
                        bar.finish_and_clear();
                    }
                    let seconds = running.started.elapsed().as_secs_f64();
                    let done = running.done.saturating_sub(running.before);
                    if self.mode == Mode::Lines && seconds >= 1.0 {
                        let done = match done {
                            0 => String::new(),
                            done => format!(": {}", amount(done as f64, running.unit)),
                        };
                        complain(&format!(
                            "{} done{done} in {}",
                            name(*stage),
                            clock(seconds)
                        ));
                    }
                }
            }
            Event::Stepped {
                step,
                steps,
                loss,
                learning_rate,
                tokens_per_s,
            } => {
                if let Some(running) = self.running().as_ref()
                    && let Some(bar) = &running.bar
                {
                    bar.set_message(format!(
                        "loss {loss:.4} · {tokens_per_s:.0} tokens/s · {} left",
                        running.left()
                    ));
                }
                // at a terminal as in a log, some twenty losses stay to be read
                let every = (steps / 20).max(1);
                if *step == 1 || step % every == 0 || step == steps {
                    self.say(&format!(
                        "step {step:>5} of {steps} · loss {loss:.4} · lr {learning_rate:.1e} · {tokens_per_s:.0} tokens/s"
                    ));
                }
            }
            Event::Noted { message } => self.say(message),
            Event::Warned { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_run_did_counts_for_the_share_and_not_for_the_rate() {
        let now = Instant::now();
        let running = Running {
            stage: Stage::Decompose,
            unit: Unit::Flops,
            total: 100_000_000_000,
            before: 80_000_000_000,
            done: 90_000_000_000,
            started: now
                .checked_sub(Duration::from_secs(5))
                .expect("the clock runs for longer"),
            said: now,
            bar: None,
        };
        // 10 GFLOP in 5 s, and 10 more to do
        assert_eq!(running.line(), "decompose 90 % · 2.0 GFLOP/s · 0:05 left");
    }
}
