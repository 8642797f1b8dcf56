//! Threads for work that BLAS does not parallelise, and the memory they may take together.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, Result};

/// How much may go on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub threads: usize,
    /// Bytes of all running items together. An item that needs more runs alone.
    pub memory: u64,
    /// Bytes of disk that may be taken. An item for which the consumer waits is let in all the same when nothing runs.
    pub disk: u64,
}

/// What an item takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// While it runs.
    pub memory: u64,
    /// From its beginning until the consumer says that it does not any more.
    pub disk: u64,
}

impl Limits {
    /// So many threads, whatever they take.
    pub fn threads(threads: usize) -> Self {
        Self {
            threads,
            memory: u64::MAX,
            disk: u64::MAX,
        }
    }

    /// The most that items of these costs can take together.
    pub fn peak(self, costs: impl IntoIterator<Item = u64>) -> u64 {
        let mut costs: Vec<u64> = costs.into_iter().collect();
        costs.sort_unstable_by(|a, b| b.cmp(a));
        let largest = costs.first().copied().unwrap_or(0);
        let together: u64 = costs.iter().take(self.threads.max(1)).sum();
        together.min(self.memory.max(largest))
    }
}

/// Runs `work` on every item, on `threads` threads, in the order given. The first error stops the rest.
pub fn for_each<T: Sync>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<()> {
    let drain = |results: &Arrivals<()>| {
        while results.recv().is_some() {}
        Ok(())
    };
    let nothing = |_: &T| Cost::default();
    run(items, Limits::threads(threads), nothing, work, drain)
}

/// Threads that this machine, or its container, runs at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Runs `work` on every item within the limits, and `consume` beside it on the results as they come.
///
/// Items start in the order given, each as soon as its cost fits beside what is there. The first error, of `work` or of
/// `consume`, stops the rest; after an error of `work` the results end early.
pub fn run<T: Sync, R: Send, C>(
    items: &[T],
    limits: Limits,
    cost: impl Fn(&T) -> Cost + Sync,
    work: impl Fn(&T) -> Result<R> + Sync,
    consume: impl FnOnce(&Arrivals<R>) -> Result<C>,
) -> Result<C> {
    let room = Room {
        memory: limits.memory,
        disk: limits.disk,
        state: Mutex::default(),
        changed: Condvar::new(),
    };
    let first_error: Mutex<Option<Error>> = Mutex::new(None);
    let fail = |error: Error| {
        room.stop();
        lock(&first_error).get_or_insert(error);
    };
    let (sender, results) = mpsc::channel();
    let worker = |sender: Sender<R>| {
        let _stop = StopOnPanic(&room);
        while let Some(admitted) = room.admit(items, &cost) {
            match work(admitted.item) {
                // a consumer that has gone away has failed, and that error is kept
                Ok(result) => {
                    room.change(|state| state.unseen += 1);
                    drop(sender.send(result));
                }
                Err(error) => fail(error),
            }
        }
    };
    let consumed = std::thread::scope(|scope| {
        for _ in 0..limits.threads.clamp(1, items.len().max(1)) {
            let sender = sender.clone();
            scope.spawn(|| worker(sender));
        }
        drop(sender);
        let _stop = StopOnPanic(&room);
        let arrivals = Arrivals {
            results,
            room: &room,
        };
        consume(&arrivals).map_err(fail).ok()
    });
    match lock(&first_error).take() {
        Some(error) => Err(error),
        None => Ok(consumed.expect("a consumer that failed has left its error")),
    }
}

/// Nobody waits for room that a panic will not give back.
struct StopOnPanic<'a>(&'a Room);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// Results as they come.
pub struct Arrivals<'a, R> {
    results: Receiver<R>,
    room: &'a Room,
}

impl<R> Arrivals<'_, R> {
    /// The next result; `None` after the last, or after an error.
    pub fn recv(&self) -> Option<R> {
        self.room.change(|state| state.consumer_waits = true);
        let result = self.results.recv().ok();
        self.room.change(|state| {
            state.consumer_waits = false;
            state.unseen = state.unseen.saturating_sub(1);
        });
        result
    }

    /// Corrects what is taken of the disk: by what an item takes less, or takes no more.
    pub fn release_disk(&self, bytes: u64) {
        self.room
            .change(|state| state.disk = state.disk.saturating_sub(bytes));
    }

    /// Notes what is taken of the disk from before.
    pub fn take_disk(&self, bytes: u64) {
        self.room
            .change(|state| state.disk = state.disk.saturating_add(bytes));
    }
}

/// What there is for the items, and what of it is taken.
struct Room {
    memory: u64,
    disk: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: usize,
    running: usize,
    memory: u64,
    disk: u64,
    /// The consumer has nothing to do, unless a result is on its way to it.
    consumer_waits: bool,
    unseen: usize,
    stopped: bool,
}

impl Room {
    /// Waits until the next item fits. `None` when there is no more to do.
    fn admit<'r, T>(
        &'r self,
        items: &'r [T],
        cost: &dyn Fn(&T) -> Cost,
    ) -> Option<Admitted<'r, T>> {
        let mut state = lock(&self.state);
        loop {
            let item = items.get(state.next).filter(|_| !state.stopped)?;
            let cost = cost(item);
            let fits = |taken: u64, more: u64, all: u64| {
                taken.checked_add(more).is_some_and(|sum| sum <= all)
            };
            let alone = state.running == 0;
            let memory = alone || fits(state.memory, cost.memory, self.memory);
            let disk = fits(state.disk, cost.disk, self.disk)
                || (alone && state.consumer_waits && state.unseen == 0);
            if memory && disk {
                state.next += 1;
                state.running += 1;
                state.memory += cost.memory;
                state.disk = state.disk.saturating_add(cost.disk);
                return Some(Admitted {
                    room: self,
                    item,
                    memory: cost.memory,
                });
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    fn stop(&self) {
        self.change(|state| state.stopped = true);
    }
}

/// An item at work: the memory it takes is given back when this is dropped.
struct Admitted<'r, T> {
    room: &'r Room,
    item: &'r T,
    memory: u64,
}

impl<T> Drop for Admitted<'_, T> {
    fn drop(&mut self) {
        // a panic stops the rest as an error does; the scope then passes it on
        let panics = std::thread::panicking();
        self.room.change(|state| {
            state.running -= 1;
            state.memory -= self.memory;
            state.stopped |= panics;
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Computes `work` for every item, `threads` at a time, and hands the results over in order.
///
/// At most `threads` results are alive.
pub fn in_order<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
    mut consume: impl FnMut(&T, R) -> Result<()>,
) -> Result<()> {
    for batch in items.chunks(threads.max(1)) {
        let results: Vec<Result<R>> = std::thread::scope(|scope| {
            let running: Vec<_> = batch
                .iter()
                .map(|item| scope.spawn(|| work(item)))
                .collect();
            running
                .into_iter()
                .map(|thread| match thread.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        });
        for (item, result) in batch.iter().zip(results) {
            consume(item, result?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn broken() -> Error {
        Error::BrokenLoss { data: "x".into() }
    }

    #[test]
    fn no_more_is_admitted_than_the_memory_holds() {
        let costs = [9, 4, 30, 3, 3, 5, 1, 8, 2, 2, 10, 1];
        let limits = Limits {
            memory: 10,
            ..Limits::threads(4)
        };
        let (taken, seen) = (Mutex::new(Vec::new()), Mutex::new(0));
        let results = run(
            &costs,
            limits,
            |&memory| Cost { memory, disk: 0 },
            |&cost| {
                let mut running = lock(&taken);
                running.push(cost);
                let together: u64 = running.iter().sum();
                assert!(
                    together <= 10 || running.len() == 1,
                    "{running:?} at a time"
                );
                let mut most = lock(&seen);
                *most = running.len().max(*most);
                drop((running, most));
                std::thread::sleep(Duration::from_millis(10));
                let mut running = lock(&taken);
                let at = running.iter().position(|&c| c == cost);
                running.swap_remove(at.expect("it was pushed above"));
                Ok(cost)
            },
            |results| Ok(std::iter::from_fn(|| results.recv()).collect::<Vec<u64>>()),
        );
        let mut results = results.expect("works");
        results.sort_unstable();
        let mut sorted = costs.to_vec();
        sorted.sort_unstable();
        assert_eq!(results, sorted);
        assert!(*lock(&seen) > 1, "small items run side by side");
    }

    #[test]
    fn the_disk_holds_what_nobody_has_fetched_and_one_more_where_somebody_waits() {
        let costs = [3, 3, 9, 3, 3, 1, 12, 1];
        let limits = Limits {
            disk: 10,
            ..Limits::threads(3)
        };
        // what is on the disk: the results that the consumer has not released, and those at work
        let (there, most) = (Mutex::new(0), Mutex::new(0));
        let consumed = run(
            &costs,
            limits,
            |&disk| Cost { memory: 0, disk },
            |&cost| {
                let mut there = lock(&there);
                *there += cost;
                let mut most = lock(&most);
                *most = (*most).max(*there);
                drop((there, most));
                std::thread::sleep(Duration::from_millis(2));
                Ok(cost)
            },
            |results| {
                let mut fetched = Vec::new();
                while let Some(cost) = results.recv() {
                    std::thread::sleep(Duration::from_millis(10));
                    fetched.push(cost);
                    // two at a time, as a shard holds several
                    if fetched.len() % 2 == 0 {
                        let gone = fetched[fetched.len() - 2..].iter().sum();
                        *lock(&there) -= gone;
                        results.release_disk(gone);
                    }
                }
                Ok(fetched)
            },
        );
        let mut consumed = consumed.expect("works");
        consumed.sort_unstable();
        assert_eq!(consumed, [1, 1, 3, 3, 3, 3, 9, 12]);
        let most = *lock(&most);
        assert!(most <= 3 + 12, "{most}: one fetched, and the largest");
    }

    #[test]
    fn the_peak_follows_the_admission() {
        let limits = |threads, memory| Limits {
            memory,
            ..Limits::threads(threads)
        };
        assert_eq!(limits(2, u64::MAX).peak([1, 5, 3]), 8);
        assert_eq!(limits(2, 6).peak([1, 5, 3]), 6);
        assert_eq!(limits(2, 4).peak([1, 5, 3]), 5);
        assert_eq!(limits(0, 4).peak([]), 0);
    }

    #[test]
    fn the_first_error_stops_the_rest() {
        let items: Vec<usize> = (0..1000).collect();
        let done = Mutex::new(0);
        let work = |&item: &usize| {
            *lock(&done) += 1;
            std::thread::sleep(Duration::from_millis(1));
            if item == 3 { Err(broken()) } else { Ok(()) }
        };
        assert!(for_each(&items, 2, work).is_err());
        assert!(*lock(&done) < 900, "{} items", *lock(&done));
        *lock(&done) = 0;
        let consumed: Result<()> = run(
            &items,
            Limits {
                memory: 1,
                ..Limits::threads(2)
            },
            |_| Cost { memory: 1, disk: 0 },
            |item| work(&(item + 10)),
            |_| Err(broken()),
        );
        assert!(consumed.is_err());
        assert!(*lock(&done) < 900, "{} items", *lock(&done));
    }
}
