//! Launches of attention: [`super::super::attention`]'s twin on a GPU.

use candle_core::{DType, Result, Tensor, bail};

use super::super::family::Scores;
use super::super::segments::Sight;
use super::launch::card;
use super::{Arg, BLOCK, Card, Geometry, MOST_BLOCKS, WARP, kind, room, run};

/// Sides of q (b, t, h, d), and of k and v (b, s, kv, d).
#[derive(Debug, Clone, Copy)]
struct Sides {
    b: usize,
    t: usize,
    s: usize,
    h: usize,
    kv: usize,
    d: usize,
}

/// How attention is launched, as `attention.cu` says.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    /// The width that a kernel is compiled for: the next above d.
    width: usize,
    /// Bytes of a number.
    size: usize,
    /// Whether four warps multiply together, as those of compute capability 9.0 can.
    by_warpgroups: bool,
}

impl Tiles {
    /// On a GPU with warpgroups or without.
    fn of(d: usize, size: usize, warpgroups: bool) -> Option<Self> {
        let width = [32, 64, 96, 128, 256]
            .into_iter()
            .find(|&width| d <= width)?;
        Some(Self {
            width,
            size,
            by_warpgroups: warpgroups && size == 2 && (64..=128).contains(&width),
        })
    }

    /// The same on this card; nothing where it has no room for one of the three launches, because gradients go the way that
    /// their result went.
    fn on(card: Card, sides: &Sides, size: usize) -> Option<Self> {
        let tiles = Self::of(sides.d, size, card.has_warpgroups)?;
        let launches = [
            tiles.forward(sides),
            tiles.back_q(sides),
            tiles.back_kv(sides),
        ];
        let has_room = |launch: &Geometry| launch.shared_bytes <= card.shared_bytes_max;
        launches.iter().all(has_room).then_some(tiles)
    }

    /// Whether the kernels are those of 16 bits on the matrix unit.
    fn halves(&self) -> bool {
        self.size == 2
    }

    /// For kernels whose blocks write `rows` queries of a head each.
    fn by_queries(&self, sides: &Sides, rows: usize, shared_bytes: usize) -> Geometry {
        Geometry {
            grid: [sides.t.div_ceil(rows), sides.h, sides.b],
            block: match (self.halves(), self.width) {
                _ if self.by_warpgroups => 2 * rows,
                (false, _) => 64,
                (true, 256) => 256,
                (true, _) => 128,
            },
            shared_bytes,
        }
    }

    fn forward(&self, sides: &Sides) -> Geometry {
        let width = self.width;
        if !self.halves() {
            return self.by_queries(sides, 32, 384 * (width + 4) + 5120);
        }
        let step = if width <= 96 || self.by_warpgroups {
            64
        } else {
            32
        };
        self.by_queries(sides, 128, 2 * width * (128 + 4 * step))
    }

    fn back_q(&self, sides: &Sides) -> Geometry {
        let width = self.width;
        if !self.halves() {
            return self.by_queries(sides, 32, 512 * (width + 4) + 5120);
        }
        let (rows, step) = match width {
            _ if self.by_warpgroups => (64, 64),
            0..=64 => (128, 64),
            256 => (128, 16),
            _ => (128, 32),
        };
        let shared_bytes = 4 * width * (rows + 2 * step) + 8 * rows + 128;
        self.by_queries(sides, rows, shared_bytes)
    }

    fn back_kv(&self, sides: &Sides) -> Geometry {
        let width = self.width;
        let (rows, block, shared_bytes) = if self.halves() {
            let (rows, step, block) = match width {
                _ if self.by_warpgroups => (64, 64, 128),
                0..=64 => (128, 64, 128),
                96 => (128, 64, 256),
                128 => (128, 32, 256),
                _ => (64, 32, 256),
            };
            let shared_bytes = 4 * width * (rows + 2 * step) + 32 * step + 512;
            (rows, block, shared_bytes)
        } else {
            let block = if width == 256 { 128 } else { 64 };
            (32, block, 512 * (width + 4) + 80 * block + 512)
        };
        Geometry {
            grid: [sides.s.div_ceil(rows), sides.kv, sides.b],
            block,
            shared_bytes,
        }
    }
}

/// Attention between given tensors.
pub struct Attention<'a> {
    kind: &'static str,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    sight: &'a Sight,
    scores: Scores,
    sides: Sides,
    tiles: Tiles,
}

impl<'a> Attention<'a> {
    /// `q (b, t, h, d), k and v (b, s, kv, d)`
    pub fn of(
        q: &'a Tensor,
        k: &'a Tensor,
        v: &'a Tensor,
        sight: &'a Sight,
        scores: Scores,
    ) -> Result<Option<Self>> {
        let Some(kind) = kind(&[q, k, v]) else {
            return Ok(None);
        };
        let (b, t, h, d) = q.dims4()?;
        let (_, s, kv, _) = k.dims4()?;
        let sides = Sides { b, t, s, h, kv, d };
        let tiles = Tiles::on(card(q)?, &sides, q.dtype().size_in_bytes());
        Ok(tiles.map(|tiles| Self {
            kind,
            q,
            k,
            v,
            sight,
            scores,
            sides,
            tiles,
        }))
    }

    fn run(
        &self,
        verb: &str,
        geometry: Geometry,
        given: &[&Tensor],
        made: &[&Tensor],
    ) -> Result<()> {
        let Some([first, end]) = self.sight.bounds() else {
            bail!("what attention sees lies on its GPU");
        };
        let Sides { b, t, s, h, kv, d } = self.sides;
        let name = format!("attention{verb}_{}_d{}", self.kind, self.tiles.width);
        let tensors = [self.q, self.k, self.v]
            .into_iter()
            .chain(given.iter().copied());
        let mut args: Vec<Arg> = tensors.map(Arg::Tensor).collect();
        args.extend([Arg::Tensor(first), Arg::Tensor(end)]);
        args.push(Arg::Count(self.sight.runs().len()));
        args.extend(made.iter().map(|tensor| Arg::Tensor(tensor)));
        args.extend([b, t, s, h, kv, d].map(Arg::Count));
        args.push(Arg::F32(self.scores.scale as f32));
        args.push(Arg::F32(self.scores.cap.unwrap_or(0.0) as f32));
        run(&self.module(), &name, geometry, &args)
    }

    /// Each width has its own: a driver need not compile them all.
    fn module(&self) -> String {
        let by = if self.tiles.by_warpgroups {
            "_by_warpgroups"
        } else {
            ""
        };
        format!("attention_{}{by}", self.tiles.width)
    }

    /// y (b, t, h, d), and the logarithm of each query's sum, (b, h, t) in f32, for the gradients.
    pub fn forward(&self) -> Result<(Tensor, Tensor)> {
        let Sides { b, t, h, .. } = self.sides;
        let y = room(self.q.shape(), self.q.dtype(), self.q)?;
        let lse = room((b, h, t), DType::F32, self.q)?;
        self.run("", self.tiles.forward(&self.sides), &[], &[&y, &lse])?;
        Ok((y, lse))
    }

    /// (dq, dk, dv) from what [`Self::forward`] gave and the gradient of y.
    pub fn gradients(&self, y: &Tensor, lse: &Tensor, g: &Tensor) -> Result<[Tensor; 3]> {
        let Sides { b, t, h, d, .. } = self.sides;
        let dots = room((b, h, t), DType::F32, self.q)?;
        let rows = b * t * h;
        let sides = [rows, t, h, d].map(Arg::Count);
        let args = [[y, g, &dots].map(Arg::Tensor).as_slice(), &sides].concat();
        let blocks = (rows * WARP).div_ceil(BLOCK).min(MOST_BLOCKS);
        let dots_name = format!("attention_dots_{}", self.kind);
        run(
            "attention_dots",
            &dots_name,
            Geometry::blocks(blocks, 1),
            &args,
        )?;
        let like = |x: &Tensor| room(x.shape(), x.dtype(), x);
        let [dq, dk, dv] = [like(self.q)?, like(self.k)?, like(self.v)?];
        let given = [g, lse, &dots];
        self.run("_back_q", self.tiles.back_q(&self.sides), &given, &[&dq])?;
        self.run(
            "_back_kv",
            self.tiles.back_kv(&self.sides),
            &given,
            &[&dk, &dv],
        )?;
        Ok([dq, dk, dv])
    }
}

#[cfg(test)]
mod tests {
    use super::super::SHARED_BYTES_MAX;
    use super::*;

    #[test]
    fn launches_of_common_models_are_within_what_a_gpu_takes() {
        // heads, key-value heads and their width: Phi-3-mini, Llama 3.2 1B, SmolLM2-135M, Llama 3.1 405B, Gemma 2, tiny
        for (h, kv, d) in [
            (32, 32, 96),
            (32, 8, 64),
            (9, 3, 64),
            (128, 8, 128),
            (8, 4, 256),
            (1, 1, 8),
        ] {
            for (b, t, s) in [
                (1, 1, 1),
                (8, 2048, 2048),
                (1, 131_072, 131_072),
                (64, 1, 37),
            ] {
                let sides = Sides { b, t, s, h, kv, d };
                for (size, warpgroups) in [(2, false), (2, true), (4, true)] {
                    let tiles = Tiles::of(d, size, warpgroups).expect("a width");
                    // what an H100 has, an A100, and smaller cards; two blocks share an H100's
                    let most = match tiles.width {
                        _ if tiles.by_warpgroups => SHARED_BYTES_MAX / 2,
                        256 => 163 << 10,
                        _ => 99 << 10,
                    };
                    for geometry in [
                        tiles.forward(&sides),
                        tiles.back_q(&sides),
                        tiles.back_kv(&sides),
                    ] {
                        assert!(geometry.fits(), "{geometry:?} of {sides:?}");
                        assert!(geometry.shared_bytes <= most, "{geometry:?} of {sides:?}");
                    }
                }
            }
        }
        assert!(Tiles::of(257, 2, true).is_none());
    }

    #[test]
    fn heads_that_a_card_has_no_room_for_are_left_to_others() {
        // of compute capability 8.6, 8.9 and 12.0; of 8.0; of 9.0
        let cards = [(99 << 10, false), (163 << 10, false), (227 << 10, true)];
        let cards = cards.map(|(shared_bytes_max, has_warpgroups)| Card {
            has_warpgroups,
            shared_bytes_max,
        });
        let takes = |d: usize, size: usize| {
            let (b, t, s, h, kv) = (2, 128, 128, 8, 4);
            let sides = Sides { b, t, s, h, kv, d };
            cards.map(|card| Tiles::on(card, &sides, size).is_some())
        };
        for size in [2, 4] {
            for d in [1, 32, 64, 80, 96, 128] {
                assert_eq!(takes(d, size), [true; 3], "{size} {d}");
            }
            for d in [129, 192, 256] {
                assert_eq!(takes(d, size), [false, true, true], "{size} {d}");
            }
            assert_eq!(takes(257, size), [false; 3]);
        }
    }
}
