//! `svdhub demo`: the whole path once, from a Hub and back to it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value, json};
use svdhub::adapter::{Adapter, Mixture};
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::card::{bytes, thousands};
use svdhub::error::IoContext;
use svdhub::event::{Observer, Silent};
use svdhub::format::Origin;
use svdhub::hub::server::{Server, ServerOptions};
use svdhub::hub::{Claims, Hub, HubOptions, ModelRef, PushOptions, Pushed, Snapshot, Token};
use svdhub::model::ModelConfig;
use svdhub::plan::Plan;
use svdhub::source::Source;
use svdhub::sum::sha256_file;
use svdhub::{Error, Result, decompose, evaluate, heap, merge, publish, train, verify};

use super::evaluate::record;
use super::output::Table;
use super::plan::{PlanArgs, singular_values};
use super::session::{Session, shown};
use super::train::{length, positive};

/// Run everything once, from a Hub and back to it.
///
/// Without arguments: a small Hub starts on this machine, holding a model of 1.2 million parameters that has read
/// Shakespeare; it is fetched, planned, decomposed, trained on a novel, evaluated, merged, published, fetched again and
/// verified. With --model and a token the very same path runs on a real Hub.
#[derive(Args)]
pub struct Command {
    /// Another model: a directory, or a Hub id [default: the model inside this program]
    #[arg(long)]
    model: Option<ModelRef>,
    /// Train on this text [default: chapters of a novel inside this program]
    #[arg(long, value_name = "FILE", requires = "heldout")]
    data: Option<PathBuf>,
    /// Measure on this text
    #[arg(long, value_name = "FILE", requires = "data")]
    heldout: Option<PathBuf>,
    /// Publish to this account of the real Hub [default: the Hub of the demo]
    #[arg(long, value_name = "ACCOUNT")]
    namespace: Option<String>,
    /// Where everything goes [default: svdhub-demo, or the next free name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    plan: PlanArgs,
    /// Training steps of 4 windows
    #[arg(long, value_name = "N", default_value = "150")]
    steps: NonZeroUsize,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = length)]
    length: usize,
    /// Learning rate
    #[arg(long, value_name = "X", default_value_t = 5e-2, value_parser = positive)]
    lr: f64,
}

/// The fixture travels inside the program: the demo runs wherever the program does.
const MODEL: [(&str, &[u8]); 6] = [
    (
        "LICENSE",
        include_bytes!("../../fixtures/shakespeare-1m/LICENSE"),
    ),
    (
        "README.md",
        include_bytes!("../../fixtures/shakespeare-1m/README.md"),
    ),
    (
        "config.json",
        include_bytes!("../../fixtures/shakespeare-1m/config.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../../fixtures/shakespeare-1m/generation_config.json"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../fixtures/shakespeare-1m/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../fixtures/shakespeare-1m/tokenizer_config.json"),
    ),
];
const WEIGHTS: &[u8] = include_bytes!("../../fixtures/shakespeare-1m/model.safetensors");
const TRAIN: &[u8] = include_bytes!("../../fixtures/eighty-train.txt");
const HELDOUT: &[u8] = include_bytes!("../../fixtures/eighty-heldout.txt");

/// What the demo found, in the order of the path.
#[derive(Serialize)]
struct Outcome {
    model: String,
    commit: String,
    parameters: u64,
    trained_numbers: u64,
    loss_base: f64,
    loss_trained: f64,
    loss_merged: f64,
    tokens_heldout: usize,
    bytes: Map<String, Value>,
    seconds: Map<String, Value>,
    train_tokens_per_s: f64,
    rounding_loss: f64,
    /// The untrained merge is the base, by the sha256 of its files.
    untrained_is_base: bool,
    /// The published model, fetched again, is the local one, by the sha256 of its files.
    fetched_is_published: bool,
    verified: bool,
    /// The held-out loss fell, and the merged model keeps at least nine tenths of the fall.
    learned: bool,
    decomposition: Pushed,
    published: Pushed,
    directories: Map<String, Value>,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let out = match &self.out {
            Some(out) => out.clone(),
            None => free_name("svdhub-demo"),
        };
        std::fs::create_dir_all(&out).context("create", &out)?;
        let walk = Walk {
            command: self,
            session,
            out: &out,
            observer: session.observer(),
        };
        let outcome = walk.all()?;
        let sound = outcome.learned
            && outcome.untrained_is_base
            && outcome.fetched_is_published
            && outcome.verified;
        session.print(&outcome, || show(&outcome))?;
        Ok(if sound {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

/// `name`, `name-2`, `name-3` …: nothing that is there is touched.
fn free_name(name: &str) -> PathBuf {
    let numbered = (2..).map(|n| PathBuf::from(format!("{name}-{n}")));
    std::iter::once(PathBuf::from(name))
        .chain(numbered)
        .find(|path| !path.exists())
        .expect("there are more numbers than directories")
}

/// One walk along the path.
struct Walk<'a> {
    command: &'a Command,
    session: &'a Session,
    out: &'a Path,
    observer: &'a dyn Observer,
}

impl Walk<'_> {
    fn dir(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    fn step(&self, text: &str) {
        self.observer.note(format!("── {text}"));
    }

    fn all(&self) -> Result<Outcome> {
        // kept in the order of the path
        let mut seconds = Map::new();

        // a Hub, and the model on it
        let server = Server::start(&self.dir("hub"), &ServerOptions::default())
            .map_err(|e| Error::io("serve", self.dir("hub"), e))?;
        let own_hub = Hub::new(HubOptions {
            token: Some(Token::new("hf_demo")),
            ..HubOptions::new(server.endpoint(), self.dir("cache"))
        })?;
        let (source_hub, repo, revision) = match &self.command.model {
            Some(ModelRef::Repo { id, revision }) => {
                (&**self.session.hub()?, id.clone(), revision.clone())
            }
            other => {
                let (dir, name) = self.local_model(other.as_ref())?;
                let repo = format!("demo/{name}");
                own_hub.push(
                    &dir,
                    &repo,
                    &Claims::default(),
                    &PushOptions::default(),
                    &Silent,
                )?;
                (&own_hub, repo, "main".to_string())
            }
        };
        let target_hub = match &self.command.namespace {
            Some(_) => self.session.hub()?,
            None => &own_hub,
        };
        let (data, heldout) = self.texts()?;

        self.step(&format!("fetch {repo} from {}", source_hub.endpoint()));
        let started = Instant::now();
        let fetched = source_hub.snapshot(&repo, &revision, self.observer)?;
        seconds.insert("fetch".into(), json!(started.elapsed().as_secs_f64()));
        let base = Base::open(&fetched.dir, fetched.repo.clone(), fetched.commit.clone())?;

        let config = ModelConfig::read(&base.dir)?;
        let options = self.command.plan.options();
        let plan = Plan::new(&base.dir, &config, &base.checkpoint.inventory, &options)?;
        self.step(&format!(
            "plan: {} of {} parameters can move, {} linear layers, {}",
            singular_values(&plan, 0),
            thousands(plan.parameters),
            plan.linear_layers,
            plan.rank
        ));

        self.step("decompose, and publish the decomposition");
        let started = Instant::now();
        let options = decompose::Options {
            plan: options,
            ..decompose::Options::default()
        };
        let decomposed = self.dir("decomposition");
        let split = decompose::run(&base, &decomposed, &options, self.observer)?;
        seconds.insert("decompose".into(), json!(started.elapsed().as_secs_f64()));
        // after decomposing, which keeps less
        heap::keep_all();
        let name = repo.rsplit('/').next().unwrap_or(&repo).to_string();
        let account = self.command.namespace.as_deref().unwrap_or("demo");
        let artifact = self.open(&decomposed, &base)?;
        let before = self.evaluate(
            Source::Decomposition {
                artifact,
                mixture: Mixture::default(),
            },
            &heldout,
        )?;
        let decomposition =
            self.publish(target_hub, &decomposed, &format!("{account}/{name}-svd"))?;

        self.step(&format!(
            "train {} numbers",
            thousands(split.trainable.sigma)
        ));
        let adapter_dir = self.dir("adapter");
        let trained = self.train(&base, &decomposed, &decomposition, &data, &adapter_dir)?;
        seconds.insert("train".into(), json!(trained.seconds));

        self.step("evaluate, merge, evaluate");
        let artifact = self.open(&decomposed, &base)?;
        let adapter = Adapter::open(&adapter_dir, &artifact)?;
        let mixture = Mixture {
            parts: vec![(adapter, 1.0)],
        };
        let after = self.evaluate(
            Source::Decomposition {
                artifact,
                mixture: mixture.clone(),
            },
            &heldout,
        )?;
        let artifact = self.open(&decomposed, &base)?;
        let model_dir = self.dir("model");
        let started = Instant::now();
        let merged = merge::run(
            &Source::Decomposition { artifact, mixture },
            &model_dir,
            &merge::Options::default(),
            self.observer,
        )?;
        seconds.insert("merge".into(), json!(started.elapsed().as_secs_f64()));
        let at_last =
            self.evaluate(Source::Model(Base::open(&model_dir, None, None)?), &heldout)?;

        self.step("publish, fetch again, verify");
        let started = Instant::now();
        let published = self.publish(target_hub, &model_dir, &format!("{account}/{name}-tuned"))?;
        seconds.insert("publish".into(), json!(started.elapsed().as_secs_f64()));
        let again = target_hub.snapshot(&published.repo, &published.commit, self.observer)?;
        let fetched_is_published = same_files(&again, &merged.sha256)?;
        let started = Instant::now();
        let checked = verify::run(&again.dir, Some(&base), self.observer)?;
        let checked_split = verify::run(&decomposed, Some(&base), self.observer)?;
        seconds.insert("verify".into(), json!(started.elapsed().as_secs_f64()));
        let artifact = self.open(&decomposed, &base)?;
        let untrained = merge::run(
            &Source::Decomposition {
                artifact,
                mixture: Mixture::default(),
            },
            &self.dir("untrained"),
            &merge::Options::default(),
            self.observer,
        )?;

        let sizes = Map::from_iter([
            (
                "base".to_string(),
                json!(base.checkpoint.inventory.total_bytes()),
            ),
            ("decomposition".into(), json!(split.bytes)),
            ("adapter".into(), json!(trained.adapter_bytes)),
            ("merged".into(), json!(merged.bytes)),
        ]);
        Ok(Outcome {
            model: repo,
            commit: base.revision.clone().unwrap_or_default(),
            parameters: plan.parameters,
            trained_numbers: trained.parameters,
            loss_base: before.loss,
            loss_trained: after.loss,
            loss_merged: at_last.loss,
            tokens_heldout: at_last.tokens,
            bytes: sizes,
            seconds,
            train_tokens_per_s: trained.tokens_per_s,
            rounding_loss: merged.rounding_loss,
            untrained_is_base: untrained.tensors_identical_to_base,
            fetched_is_published,
            verified: checked.ok && checked_split.ok,
            learned: after.loss < before.loss
                && before.loss - at_last.loss >= 0.9 * (before.loss - after.loss),
            decomposition,
            published,
            directories: ["decomposition", "adapter", "model", "untrained", "hub"]
                .map(|name| (name.to_string(), json!(self.dir(name))))
                .into_iter()
                .collect(),
        })
    }

    /// A directory with the model to put on the demo's own Hub, and its name there.
    fn local_model(&self, given: Option<&ModelRef>) -> Result<(PathBuf, String)> {
        if let Some(ModelRef::Directory(dir)) = given {
            let full = std::fs::canonicalize(dir).context("find", dir)?;
            let name = full
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            return Ok((full, name));
        }
        let dir = self.dir("fixture");
        std::fs::create_dir_all(&dir).context("create", &dir)?;
        for (name, contents) in MODEL.into_iter().chain([("model.safetensors", WEIGHTS)]) {
            std::fs::write(dir.join(name), contents).context("write", dir.join(name))?;
        }
        Ok((dir, "shakespeare-1m".into()))
    }

    fn texts(&self) -> Result<(PathBuf, PathBuf)> {
        if let (Some(data), Some(heldout)) = (&self.command.data, &self.command.heldout) {
            return Ok((data.clone(), heldout.clone()));
        }
        let (data, heldout) = (self.dir("eighty-train.txt"), self.dir("eighty-heldout.txt"));
        std::fs::write(&data, TRAIN).context("write", &data)?;
        std::fs::write(&heldout, HELDOUT).context("write", &heldout)?;
        Ok((data, heldout))
    }

    fn open(&self, dir: &Path, base: &Base) -> Result<Artifact> {
        Artifact::open(dir, Some(base.clone()))
    }

    fn evaluate(&self, source: Source, heldout: &Path) -> Result<evaluate::Facts> {
        let options = evaluate::Options {
            length: self.command.length,
            ..evaluate::Options::default()
        };
        let facts = evaluate::run(&source, &heldout.into(), &options, self.observer)?;
        record(&source, &facts, self.observer)?;
        Ok(facts)
    }

    fn publish(&self, hub: &Hub, dir: &Path, repo: &str) -> Result<Pushed> {
        publish::run(hub, dir, repo, &PushOptions::default(), self.observer)
    }

    fn train(
        &self,
        base: &Base,
        decomposed: &Path,
        pushed: &Pushed,
        data: &Path,
        out: &Path,
    ) -> Result<train::Facts> {
        let artifact = self.open(decomposed, base)?;
        let pin = Origin {
            repo: Some(pushed.repo.clone()),
            revision: Some(pushed.commit.clone()),
            content_sha256: artifact.content_sha256.clone(),
        };
        let options = train::Options {
            duration: train::Duration::Steps(self.command.steps.get()),
            length: self.command.length,
            learning_rate: self.command.lr,
            ..train::Options::default()
        };
        let source = Source::Decomposition {
            artifact,
            mixture: Mixture::default(),
        };
        train::run(
            &source,
            Some(pin),
            &data.into(),
            out,
            &options,
            self.observer,
        )
    }
}

fn same_files(snapshot: &Snapshot, sums: &BTreeMap<String, String>) -> Result<bool> {
    for (file, sum) in sums {
        if sha256_file(&snapshot.dir.join(file), |_| {})? != *sum {
            return Ok(false);
        }
    }
    Ok(true)
}

fn show(o: &Outcome) -> String {
    let yes = |sound: bool| if sound { "yes" } else { "NO" };
    let mut table = Table::new([
        format!("{} · {} parameters", o.model, thousands(o.parameters)),
        String::new(),
    ]);
    table.row(["numbers trained", &thousands(o.trained_numbers)]);
    let held_out = format!(
        "held-out loss, {} tokens",
        thousands(o.tokens_heldout as u64)
    );
    table.row([format!("{held_out}: base"), format!("{:.4}", o.loss_base)]);
    table.row([
        format!("{held_out}: trained"),
        format!("{:.4}", o.loss_trained),
    ]);
    table.row([
        format!("{held_out}: merged"),
        format!("{:.4}", o.loss_merged),
    ]);
    for (what, n) in &o.bytes {
        table.row([format!("size: {what}"), bytes(n.as_u64().unwrap_or(0))]);
    }
    for (what, s) in &o.seconds {
        let s = s.as_f64().unwrap_or(0.0);
        table.row([format!("time: {what}"), format!("{s:.1} s")]);
    }
    table.row([
        "speed of training",
        &format!("{:.0} tokens/s", o.train_tokens_per_s),
    ]);
    table.row([
        "rounding error of the merge",
        &format!("{:.1} % of the change", 100.0 * o.rounding_loss),
    ]);
    table.row([
        "untrained merge is the base, by sha256",
        yes(o.untrained_is_base),
    ]);
    table.row([
        "fetched model is the published one, by sha256",
        yes(o.fetched_is_published),
    ]);
    table.row(["verify finds nothing", yes(o.verified)]);
    table.row([
        "the held-out loss fell, and merging kept it",
        yes(o.learned),
    ]);
    let mut text = format!("\n{}\n", table.render());
    for (what, dir) in &o.directories {
        let dir = Path::new(dir.as_str().unwrap_or_default());
        text.push_str(&format!("{what:<14} {}\n", shown(dir)));
    }
    text
}
