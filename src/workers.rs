//! Threads for work that BLAS does not parallelise, and the memory they may take together.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, Result};

/// How much may go on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub threads: usize,
    /// Bytes of all running items together. An item that needs more runs alone.
    pub memory: u64,
    /// Finished results that may wait to be consumed; a worker with one more waits with it.
    pub waiting: usize,
}

impl Limits {
    /// So many threads, whatever they take.
    pub fn threads(threads: usize) -> Self {
        Self {
            threads,
            memory: u64::MAX,
            waiting: usize::MAX,
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
    let drain = |results: &Receiver<()>| {
        results.iter().for_each(drop);
        Ok(())
    };
    run(items, Limits::threads(threads), |_| 0, work, drain)
}

/// Runs `work` on every item within the limits, and `consume` beside it on the results as they come.
///
/// Items start in the order given, each as soon as its `cost` in bytes fits beside what is running. The first error, of
/// `work` or of `consume`, stops the rest; after an error of `work` the results end early.
pub fn run<T: Sync, R: Send, C>(
    items: &[T],
    limits: Limits,
    cost: impl Fn(&T) -> u64 + Sync,
    work: impl Fn(&T) -> Result<R> + Sync,
    consume: impl FnOnce(&Receiver<R>) -> Result<C>,
) -> Result<C> {
    let queue = Queue {
        items,
        cost,
        memory: limits.memory,
        state: Mutex::default(),
        changed: Condvar::new(),
    };
    let first_error: Mutex<Option<Error>> = Mutex::new(None);
    let fail = |error: Error| {
        queue.stop();
        lock(&first_error).get_or_insert(error);
    };
    let (sender, receiver) = mpsc::sync_channel(limits.waiting.min(items.len()));
    let worker = |sender: SyncSender<R>| {
        while let Some(admitted) = queue.admit() {
            match work(admitted.item) {
                // a consumer that has gone away has failed, and that error is kept
                Ok(result) => drop(sender.send(result)),
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
        let consumed = consume(&receiver).map_err(fail).ok();
        // nobody waits for a consumer that is gone
        drop(receiver);
        consumed
    });
    match lock(&first_error).take() {
        Some(error) => Err(error),
        None => Ok(consumed.expect("a consumer that failed has left its error")),
    }
}

/// Items waiting for a worker and for memory.
struct Queue<'a, T, C> {
    items: &'a [T],
    cost: C,
    memory: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: usize,
    running: usize,
    taken: u64,
    stopped: bool,
}

impl<T, C: Fn(&T) -> u64> Queue<'_, T, C> {
    /// Waits until the next item fits. `None` when there is no more to do.
    fn admit(&self) -> Option<Admitted<'_, T, C>> {
        let mut state = lock(&self.state);
        loop {
            let item = self.items.get(state.next).filter(|_| !state.stopped)?;
            let cost = (self.cost)(item);
            let fits = state
                .taken
                .checked_add(cost)
                .is_some_and(|t| t <= self.memory);
            if fits || state.running == 0 {
                state.next += 1;
                state.running += 1;
                state.taken += cost;
                return Some(Admitted {
                    queue: self,
                    item,
                    cost,
                });
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_all();
    }
}

/// An item at work: what it takes is given back when this is dropped.
struct Admitted<'q, T, C: Fn(&T) -> u64> {
    queue: &'q Queue<'q, T, C>,
    item: &'q T,
    cost: u64,
}

impl<T, C: Fn(&T) -> u64> Drop for Admitted<'_, T, C> {
    fn drop(&mut self) {
        let mut state = lock(&self.queue.state);
        state.running -= 1;
        state.taken -= self.cost;
        // a panic stops the rest as an error does; the scope then passes it on
        state.stopped |= std::thread::panicking();
        drop(state);
        self.queue.changed.notify_all();
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
        Error::BrokenLoss { path: "x".into() }
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
            |&cost| cost,
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
            |results| Ok(results.iter().collect::<Vec<u64>>()),
        );
        let mut results = results.expect("works");
        results.sort_unstable();
        let mut sorted = costs.to_vec();
        sorted.sort_unstable();
        assert_eq!(results, sorted);
        assert!(*lock(&seen) > 1, "small items run side by side");
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
                waiting: 1,
                ..Limits::threads(2)
            },
            |_| 1,
            |item| work(&(item + 10)),
            |_| Err(broken()),
        );
        assert!(consumed.is_err());
        assert!(*lock(&done) < 900, "{} items", *lock(&done));
    }
}
