//! Transfers under random faults and kills: each ends in verified bytes or in a clear error, and leaves nothing wrong.
//!
//! A few in every run of the tests; `SVDHUB_SIEGE=1000` makes it a thousand, `SVDHUB_SIEGE_SEED=N` repeats one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use svdhub::hub::published_files;
use svdhub::hub::server::{Effect, ServerOptions};
use svdhub::sum::sha256_hex;
use svdhub::weights::Dtype;

use crate::world::{Run, World, arg, files};

/// Transfers in a run of the tests.
const FEW: usize = 48;
/// They mostly wait.
const AT_ONCE: usize = 6;

/// Numbers that a seed determines (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Something goes wrong with some request.
fn mishap(dice: &mut Dice, world: &World) {
    let contents = dice.pick(&["GET /objects/", "/api/resolve-cache/"]);
    let question = dice.pick(&[
        "/revision/",
        "/tree/",
        "/resolve/",
        "/preupload/",
        "/objects/batch",
        "xet-read-token",
        "xet-write-token",
        "/lfs/verify",
        "PUT /",
        "complete_multipart",
        "/commit/",
        "/repos/create",
    ]);
    let any = dice.pick(&[contents, question]);
    let answer = |status, headers: &[(&str, &str)]| Effect::Status {
        status,
        headers: headers
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect(),
        body: "<html>trouble</html>".into(),
    };
    let (matching, effect) = match dice.below(11) {
        0 => (any, answer(dice.pick(&[500, 502, 503, 504]), &[])),
        1 => (any, answer(429, &[("Retry-After", "1")])),
        2 => (any, answer(dice.pick(&[400, 401, 403, 404, 409, 412]), &[])),
        3 => (any, Effect::StatusAfter { status: 500 }),
        4 => {
            let after_bytes = dice.below(300_000);
            (any, Effect::CutBody { after_bytes })
        }
        5 => (contents, Effect::WrongBytes),
        6 => (contents, Effect::IgnoreRange),
        // a page that calls itself a success
        7 => (contents, answer(200, &[])),
        8 => (
            dice.pick(&["/resolve/", "/objects/batch"]),
            Effect::ExpiredLink,
        ),
        9 => {
            let delay_ms = dice.pick(&[10, 100, 3000]);
            (any, Effect::Slow { delay_ms })
        }
        _ => {
            let delay_ms = dice.pick(&[5, 50]);
            (contents, Effect::SlowBody { delay_ms })
        }
    };
    let times = dice.pick(&[1, 1, 1, 2, 2, 9]);
    world.fault(matching, times, effect);
}

/// How a run of the program ended.
#[derive(Debug, PartialEq)]
enum End {
    Done,
    Refused,
    Killed,
}

/// Runs the program, and kills it some time later if the dice say so.
fn attempt(dice: &mut Dice, world: &World, arguments: &[&str]) -> End {
    let mut command = world.command(arguments);
    command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    let mut child = command.spawn().expect("starts");
    if dice.below(3) == 0 {
        std::thread::sleep(Duration::from_millis(dice.below(90)));
        // it may have ended by itself
        child.kill().expect("can be killed");
    }
    let output = child.wait_with_output().expect("ends");
    if output.status.code().is_none() {
        return End::Killed;
    }
    let run = Run::of(output);
    match run.code {
        Some(0) => End::Done,
        Some(1) => {
            assert!(run.stderr.contains("error: "), "{}", run.stderr);
            End::Refused
        }
        code => panic!("{code:?}: {}", run.stderr),
    }
}

/// The sha256 of every file that would be published.
fn sums(dir: &Path) -> BTreeMap<String, String> {
    let names = published_files(dir).expect("lists");
    let sum = |name: &String| sha256_hex(&std::fs::read(dir.join(name)).expect("reads"));
    names.iter().map(|name| (name.clone(), sum(name))).collect()
}

/// Every file under its final name is the right one.
fn nothing_is_wrong(found: &Path, truth: &BTreeMap<String, String>) {
    if found.exists() {
        for (name, sum) in sums(found) {
            assert_eq!(truth.get(&name), Some(&sum), "{name} is wrong");
        }
    }
}

fn cache_is_right(world: &World) {
    let blobs = world.path("hf/hub/models--org--base/blobs");
    if blobs.exists() {
        for (name, bytes) in files(&blobs) {
            if name.len() == 64 && !name.contains('.') {
                assert_eq!(sha256_hex(&bytes), name, "a cache entry is wrong");
            }
        }
    }
}

/// One transfer that may go wrong, and the same once more that may not.
fn besiege(seed: u64) -> End {
    let mut dice = Dice::new(seed);
    let world = World::with_hub_of(ServerOptions {
        part_bytes: dice.pick(&[None, Some(70_000)]),
        page_entries: dice.pick(&[2, 1000]) as usize,
        xet: dice.below(2) == 0,
        ..ServerOptions::default()
    });
    let base = world.model("base", Dtype::BF16, 500_000);
    let truth = sums(&base);
    let publishes = dice.below(2) == 0;
    if publishes && dice.below(2) == 0 {
        world.run(&["publish", arg(&base), "org/base"]).succeeds();
        std::fs::write(base.join("NOTICE"), seed.to_string()).expect("writes");
        let weights = published_files(&base).expect("lists").into_iter();
        let mut weights = weights.filter(|name| name.ends_with(".safetensors"));
        let shard = base.join(weights.next().expect("a shard"));
        let mut bytes = std::fs::read(&shard).expect("reads");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&shard, bytes).expect("writes");
    } else if !publishes {
        world.run(&["publish", arg(&base), "org/base"]).succeeds();
    }
    for _ in 0..1 + dice.below(4) {
        mishap(&mut dice, &world);
    }
    let fetched = world.path("fetched");
    let end = if publishes {
        publish(&mut dice, &world, &base, &fetched)
    } else if dice.below(2) == 0 {
        let arguments = ["hub", "download", "org/base", "--out", arg(&fetched)];
        let end = attempt(&mut dice, &world, &arguments);
        nothing_is_wrong(&fetched, &truth);
        if end == End::Done {
            assert_eq!(sums(&fetched), truth);
        }
        world.hub().heal();
        world.run(&arguments).succeeds();
        assert_eq!(sums(&fetched), truth);
        end
    } else {
        let end = attempt(&mut dice, &world, &["verify", "org/base"]);
        cache_is_right(&world);
        world.hub().heal();
        world.run(&["verify", "org/base"]).succeeds();
        let mut offline = world.command(&["verify", "org/base"]);
        offline.env("HF_HUB_OFFLINE", "1");
        Run::of(offline.output().expect("runs")).succeeds();
        end
    };
    cache_is_right(&world);
    end
}

fn publish(dice: &mut Dice, world: &World, base: &Path, fetched: &Path) -> End {
    let local = sums(base);
    let arguments = ["publish", arg(base), "org/base", "--message", "besieged"];
    let proposes = dice.below(4) == 0;
    let all = if proposes {
        [&arguments[..], &["--pr"]].concat()
    } else {
        arguments.to_vec()
    };
    let end = attempt(dice, world, &all);
    world.hub().heal();
    if proposes && end == End::Done {
        let refs = world.api("org/base/refs?include_prs=1");
        assert_eq!(
            refs["pullRequests"].as_array().map(Vec::len),
            Some(1),
            "{refs}"
        );
        world
            .run(&[
                "hub",
                "download",
                "org/base@refs/pr/1",
                "--out",
                arg(fetched),
            ])
            .succeeds();
    } else {
        // on main: whatever happened, the same command brings it to its end, once
        world.run(&arguments).succeeds();
        let commits = world.api("org/base/commits/main");
        let commits = commits.as_array().expect("a list").iter();
        let ours = commits.filter(|commit| commit["title"] == "besieged");
        assert_eq!(ours.count(), 1, "one push is one commit");
        world
            .run(&["hub", "download", "org/base", "--out", arg(fetched)])
            .succeeds();
    }
    assert_eq!(sums(fetched), local);
    end
}

#[test]
fn every_transfer_ends_in_verified_bytes_or_a_clear_error() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("SVDHUB_SIEGE_SEED");
    let rounds = match first {
        Some(_) => 1,
        None => number("SVDHUB_SIEGE").unwrap_or(FEW as u64),
    };
    let next = AtomicUsize::new(0);
    let ends = [End::Done, End::Refused, End::Killed];
    let counts = [const { AtomicUsize::new(0) }; 3];
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let round = next.fetch_add(1, Ordering::Relaxed) as u64;
                    if round >= rounds {
                        break;
                    }
                    let seed = first.unwrap_or(round);
                    let end = std::panic::catch_unwind(|| besiege(seed));
                    let end = end.unwrap_or_else(|_| panic!("SVDHUB_SIEGE_SEED={seed} repeats it"));
                    let kind = ends.iter().position(|kind| *kind == end).expect("a kind");
                    counts[kind].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let counts = counts.map(AtomicUsize::into_inner);
    eprintln!(
        "{rounds} transfers: {} done, {} refused, {} killed",
        counts[0], counts[1], counts[2]
    );
    assert!(
        rounds < FEW as u64 || counts.iter().all(|&count| count > 0),
        "{counts:?}"
    );
}
