//! The state of an unfinished run on the disk, from which another goes on.

use super::optimizer::Moments;
use super::run::{Run, counts, numbers, set};
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::sum::Blake3;
use crate::weights::{Checkpoint, Dtype, Elements, Header, ShardWriter};
use crate::workspace::Workspace;

pub(super) const STATE_FILE: &str = "training.safetensors";
/// Its last tensor: the BLAKE3 of the bytes of all others, in hex.
const STATE_SUM: &str = "blake3";
const SECONDS: &str = "seconds";

impl Run<'_> {
    /// The state as tensors: values, moments, losses, and a sum of all these. What `resume` reads.
    pub(super) fn save(&mut self, workspace: &Workspace) -> Result<()> {
        for bundle in self.bundles() {
            self.optimizer.fetch(&counts(&bundle))?;
        }
        let mut names: Vec<(String, Vec<usize>)> = Vec::new();
        for (name, variable) in &self.decoder.variables {
            names.push((format!("value/{name}"), variable.dims().to_vec()));
            for moment in ["first", "second"] {
                names.push((format!("{moment}/{name}"), vec![variable.elem_count()]));
            }
        }
        names.push(("losses".into(), vec![self.losses.len()]));
        names.push((SECONDS.into(), vec![1]));
        let tensors = names.iter();
        let tensors = tensors.map(|(name, shape)| (name.as_str(), Dtype::F32, shape.as_slice()));
        let header = Header::compose(tensors.chain([(STATE_SUM, Dtype::U8, &[64][..])]))?;
        let mut writer = ShardWriter::create(&workspace.state(STATE_FILE), header)?;
        let mut sum = Blake3::default();
        for (name, variable) in &self.decoder.variables {
            let moments = &self.optimizer.state[name];
            for (kind, values) in [
                ("value", &numbers(variable)?),
                ("first", &moments.first),
                ("second", &moments.second),
            ] {
                let stored = Elements::from_f32(&[values.len()], values);
                sum.update(&stored.bytes);
                writer.put(&format!("{kind}/{name}"), &stored.bytes)?;
            }
        }
        let losses = Elements::from_f32(&[self.losses.len()], &self.losses);
        sum.update(&losses.bytes);
        writer.put("losses", &losses.bytes)?;
        let seconds = Elements::from_f32(&[1], &[self.seconds as f32]);
        sum.update(&seconds.bytes);
        writer.put(SECONDS, &seconds.bytes)?;
        writer.put(STATE_SUM, sum.finish().as_bytes())?;
        writer.finish().map(drop)
    }

    /// Goes on from what an earlier run saved, if there is anything.
    pub(super) fn resume(&mut self, workspace: &Workspace, observer: &dyn Observer) -> Result<()> {
        let path = workspace.state(STATE_FILE);
        if !path.exists() {
            return Ok(());
        }
        let dir = path.parent().expect("a state file lies in a folder");
        let state = Checkpoint::single(dir, STATE_FILE)?;
        let mut sum = Blake3::default();
        let mut read = |name: &str| -> Result<Vec<f32>> {
            let stored = state.read(name)?;
            sum.update(&stored.bytes);
            Ok(stored.to_f32())
        };
        for (name, variable) in &self.decoder.variables {
            let value = read(&format!("value/{name}"))?;
            let moments = Moments {
                first: read(&format!("first/{name}"))?,
                second: read(&format!("second/{name}"))?,
            };
            set(variable, value)?;
            self.optimizer.state.insert(name.clone(), moments);
        }
        self.losses = read("losses")?;
        // earlier builds wrote none
        if state.inventory.contains(SECONDS) {
            self.seconds = read(SECONDS)?.first().map_or(0.0, |&s| f64::from(s));
        }
        // nor a sum
        if state.inventory.contains(STATE_SUM) {
            let expected = state.read(STATE_SUM)?.bytes;
            let expected = String::from_utf8_lossy(&expected).into_owned();
            let found = sum.finish();
            if found != expected {
                return Err(Error::PartChanged {
                    tensor: "the state".into(),
                    path,
                    expected,
                    found,
                });
            }
        }
        self.optimizer.steps = self.losses.len() as u32;
        observer.note(format!("going on after step {}", self.losses.len()));
        Ok(())
    }
}
