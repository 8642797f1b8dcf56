//! Checkpoints of random numbers, of any shapes.

use std::path::Path;

use half::{bf16, f16};
use serde_json::Value;
use svdhub::model::ModelConfig;
use svdhub::plan::expected_inventory;
use svdhub::weights::{Dtype, ShardWriter};

use crate::Result;
use crate::random::SplitMix;

/// Writes a model of this config, of normal numbers as they are drawn; with `outlier`, each matrix has a singular value that
/// dwarfs the rest.
pub fn write_model(config: &Value, dtype: Dtype, outlier: bool, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let path = dir.join("config.json");
    std::fs::write(&path, serde_json::to_vec_pretty(config)?)?;
    let inventory = expected_inventory(&ModelConfig::parse(&path, config)?, dtype)?;
    let file = inventory.files.first().ok_or("a model has a file")?;
    eprintln!("writing {:.1} GB", inventory.total_bytes() as f64 / 1e9);

    let mut random = SplitMix(7);
    let table: Vec<f64> = (0..1 << 16).map(|_| 0.02 * random.normal()).collect();
    let encode = |x: f64, bytes: &mut Vec<u8>| match dtype {
        Dtype::BF16 => bytes.extend(bf16::from_f64(x).to_le_bytes()),
        Dtype::F16 => bytes.extend(f16::from_f64(x).to_le_bytes()),
        _ => bytes.extend((x as f32).to_le_bytes()),
    };
    let mut encoded = Vec::new();
    table.iter().for_each(|&x| encode(x, &mut encoded));
    let width = encoded.len() / table.len();

    let mut writer = ShardWriter::create(&dir.join(&file.name), file.header.clone())?;
    let mut row = Vec::new();
    for entry in &file.header.entries {
        writer.begin(&entry.name);
        let columns = *entry.shape.last().ok_or("a tensor has a shape")?;
        for _ in 0..entry.elements() / columns {
            row.clear();
            while row.len() < columns * width {
                let drawn = random.next();
                for at in [0, 16, 32, 48].map(|shift| (drawn >> shift) as u16 as usize) {
                    row.extend_from_slice(&encoded[at * width..][..width]);
                }
            }
            row.truncate(columns * width);
            if outlier {
                // a column of its own scale is a singular value of its own
                let mut first = Vec::new();
                encode(OUTLIER * 0.02 * random.normal(), &mut first);
                row[..width].copy_from_slice(&first);
            }
            writer.write(&row)?;
        }
    }
    writer.finish()?;
    Ok(())
}

/// Beyond 20 × the root mean square of the singular values single precision gives up; a wide matrix dilutes a column.
const OUTLIER: f64 = 80.0;
