//! The matrices: three made by rule, and a model's own. Both sides read the same file.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::bf16;
use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};
use svdhub::linalg::{gemm, spectrum};
use svdhub::sum::sha256_hex;
use svdhub::weights::{Checkpoint, Dtype, Elements, Header, Layout, ShardWriter};

use crate::Result;
use crate::machine::loudly;
use crate::peers::Peers;

/// (m, n) = (out, in).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub m: usize,
    pub n: usize,
}

impl Shape {
    pub fn is_square(self) -> bool {
        self.m == self.n
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}x{}", self.m, self.n)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let sides = text.split_once('x').and_then(|(m, n)| {
            let shape = Self {
                m: m.parse().ok()?,
                n: n.parse().ok()?,
            };
            (shape.m > 0 && shape.n > 0).then_some(shape)
        });
        sides.ok_or_else(|| "expected two sides, as in 3072x3072".into())
    }
}

/// The spectra that decide between algorithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A Gaussian bulk under a power-law head, κ = σ₁/σ_q about 10 at f = 0.1: like a language model's weights
    Llm,
    /// The same with three strong outliers, κ in the hundreds
    Outlier,
    /// Gaussian alone: flat
    Gauss,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Llm => "llm",
            Self::Outlier => "outlier",
            Self::Gauss => "gauss",
        }
    }
}

/// Where a matrix comes from.
#[derive(Debug, Clone)]
pub enum Source {
    Made(Kind, Shape),
    Real {
        model: PathBuf,
        tensor: String,
        shape: Shape,
    },
}

/// A matrix that lies on the disk for the peers and in memory for us.
#[derive(Debug)]
pub struct Matrix {
    pub name: String,
    /// (m, n)
    pub values: Array2<f32>,
    pub path: PathBuf,
}

/// The singular values everybody is held against.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reference {
    /// All min(m, n), descending.
    pub sigma: Vec<f64>,
    pub how: String,
}

impl Source {
    /// A projection into the stream and one out of a wide layer, of a block in the middle.
    pub fn real(model: &Path) -> Result<Vec<Self>> {
        let checkpoint = Checkpoint::open(model, Layout::Model)?;
        let names = [
            "model.layers.15.self_attn.q_proj.weight",
            "model.layers.15.mlp.down_proj.weight",
        ];
        let mut sources = Vec::new();
        for tensor in names {
            match checkpoint.inventory.get(tensor) {
                Some((_, entry)) if entry.shape.len() == 2 => sources.push(Self::Real {
                    model: model.into(),
                    tensor: tensor.into(),
                    shape: Shape {
                        m: entry.shape[0],
                        n: entry.shape[1],
                    },
                }),
                _ => loudly(&format!("SKIPPED: no {tensor} in {}", model.display())),
            }
        }
        Ok(sources)
    }

    pub fn shape(&self) -> Shape {
        match self {
            Self::Made(_, shape) | Self::Real { shape, .. } => *shape,
        }
    }

    pub fn name(&self) -> String {
        match self {
            Self::Made(kind, shape) => format!("{}-{shape}", kind.name()),
            Self::Real { tensor, shape, .. } => {
                let parts: Vec<&str> = tensor.rsplit('.').collect();
                format!("real-{}-{shape}", parts.get(1).unwrap_or(&"weight"))
            }
        }
    }

    /// The matrix, made or copied once and kept in `folder`.
    pub fn read(&self, folder: &Path) -> Result<Matrix> {
        let name = self.name();
        let file = match self {
            Self::Made(..) => format!("{name}-{RULE}.safetensors"),
            Self::Real { model, tensor, .. } => {
                let stored = Checkpoint::open(model, Layout::Model)?.read(tensor)?;
                format!("{name}-{}.safetensors", &sha256_hex(&stored.bytes)[..8])
            }
        };
        let path = folder.join(&file);
        if !path.exists() {
            let values = match self {
                Self::Made(kind, shape) => rounded(make(*kind, *shape)),
                Self::Real { model, tensor, .. } => {
                    matrix_of(&Checkpoint::open(model, Layout::Model)?, tensor)?
                }
            };
            write(&path, &values)?;
        }
        let values = matrix_of(&Checkpoint::single(folder, &file)?, "matrix")?;
        Ok(Matrix { name, values, path })
    }
}

/// The version of the rule below, in the name of the file: another rule makes other files.
const RULE: &str = "r1";

impl Matrix {
    /// All singular values in f64, good down to the q-th; kept beside the matrix.
    pub fn reference(&self, q: usize, peers: Option<&mut Peers>) -> Result<Reference> {
        let path = self.path.with_extension(format!("q{q}.json"));
        // a file cut off by a kill is as good as none
        let kept = std::fs::read(&path).ok();
        if let Some(kept) = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
            return Ok(kept);
        }
        let Some(peers) = peers else {
            // ours against ours shows no error that both make: it is not kept
            let sigma = spectrum(self.values.view())?;
            return Ok(Reference {
                sigma: sigma.into_iter().map(f64::from).collect(),
                how: "OUR OWN Gram matrix in f64, for want of Python".into(),
            });
        };
        let reference = peers.reference(q)?;
        std::fs::write(&path, serde_json::to_vec(&reference)?)?;
        Ok(reference)
    }
}

fn make(kind: Kind, Shape { m, n }: Shape) -> Array2<f32> {
    let (short, long) = (m.min(n) as f64, m.max(n) as f64);
    let mut matrix = normal(m, n, 1);
    if kind == Kind::Gauss {
        return matrix;
    }
    // the bulk's largest value is √long + √short (Bai & Yin); its tenth percentile lies about 13 % below
    let bulk_max = long.sqrt() + short.sqrt();
    let sigma_1 = 10.0 * 0.87 * bulk_max;
    // σ_k = σ₁·k^-0.6 sinks into the bulk near k = 40: a head over it, as in trained weights
    let head = (short as usize / 4).max(1);
    let mut sigma: Vec<f64> = (1..=head)
        .map(|k| sigma_1 * (k as f64).powf(-0.6))
        .collect();
    let mut seed = 2;
    if kind == Kind::Outlier {
        sigma.splice(0..0, [18.0, 11.0, 7.0].map(|times| times * sigma_1));
        seed = 4;
    }
    // nearly orthonormal columns: Gaussian ones over √side
    let sigma: Array1<f32> = sigma
        .iter()
        .map(|s| (s / (short * long).sqrt()) as f32)
        .collect();
    let u = normal(m, sigma.len(), seed) * &sigma;
    let v = normal(sigma.len(), n, seed + 1);
    matrix += &gemm(u.view(), false, v.view(), false);
    matrix
}

/// As a checkpoint in bf16 holds it.
fn rounded(matrix: Array2<f32>) -> Array2<f32> {
    matrix.mapv_into(|x| bf16::from_f32(x).to_f32())
}

/// Normal numbers by Box–Muller from splitmix64 (the library keeps its own stream to itself).
fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    Array2::from_shape_simple_fn((rows, columns), || {
        let (a, b) = (uniform().max(1e-300), uniform());
        ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    })
}

/// A tensor of two dimensions in f32.
pub fn matrix_of(checkpoint: &Checkpoint, tensor: &str) -> Result<Array2<f32>> {
    let stored = checkpoint.read_finite(tensor)?;
    let [m, n] = stored.shape[..] else {
        return Err(format!("{tensor} is no matrix: {:?}", stored.shape).into());
    };
    Ok(Array2::from_shape_vec((m, n), stored.to_f32())?)
}

fn write(path: &Path, values: &Array2<f32>) -> Result<()> {
    let shape = [values.nrows(), values.ncols()];
    let header = Header::compose([("matrix", Dtype::F32, &shape[..])])?;
    let dense = values.as_slice().ok_or("a matrix made here is dense")?;
    let mut writer = ShardWriter::create(path, header)?;
    writer.put("matrix", &Elements::from_f32(&shape, dense).bytes)?;
    writer.finish()?;
    Ok(())
}
