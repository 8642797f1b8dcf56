//! Rotations of heads, by themselves and on their way out of what holds them, or back.

use candle_core::{D, Result, Tensor};

use super::{
    Arg, Geometry, by_rows, copy_columns, kind, kind_of_rows, pitched, room, run, threads_for,
};

/// Rotates the leading 2·half elements of each head of `x (b, t, h, d)` by angles (rows, half), back where `back` says so.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, back: bool) -> Result<Option<Tensor>> {
    if kind(&[x]).is_none() {
        return Ok(None);
    }
    let (b, t, h, d) = x.dims4()?;
    let y = room(x.shape(), x.dtype(), x)?;
    let by_token = |x: &Tensor| x.reshape((b * t, h * d));
    let done = rotate_rows([&by_token(x)?, &by_token(&y)?], d, [cos, sin], back)?;
    Ok(done.then_some(y))
}

/// The same from x to y (tokens, h·d), of which either may be a part of wider rows.
fn rotate_rows(
    [x, y]: [&Tensor; 2],
    d: usize,
    [cos, sin]: [&Tensor; 2],
    back: bool,
) -> Result<bool> {
    let (Some(kind), Some("f32")) = (kind_of_rows(&[x, y]), kind(&[cos, sin])) else {
        return Ok(false);
    };
    let (Some((tokens, width, x_pitch)), Some((_, _, y_pitch))) = (pitched(x), pitched(y)) else {
        return Ok(false);
    };
    let half = cos.dim(D::Minus1)?;
    let (h, rows) = (width / d, cos.elem_count() / half);
    run(
        "rope",
        &format!("rotate_{kind}"),
        Geometry {
            block: threads_for(h * (d - half)),
            ..by_rows(tokens)
        },
        &[
            Arg::Part(x),
            Arg::Tensor(cos),
            Arg::Tensor(sin),
            Arg::Part(y),
            Arg::Count(tokens),
            Arg::Count(h),
            Arg::Count(d),
            Arg::Count(half),
            Arg::Count(rows),
            Arg::Count(x_pitch),
            Arg::Count(y_pitch),
            Arg::F32(if back { -1.0 } else { 1.0 }),
        ],
    )?;
    Ok(true)
}

/// Queries, keys and values (b, t, heads, d) from `x (b, t, Σ heads·d)`, which holds them one behind the other: so many heads
/// of each, the first two rotated on their way.
pub fn split_heads(
    x: &Tensor,
    heads: [usize; 3],
    angles: [&Tensor; 2],
) -> Result<Option<[Tensor; 3]>> {
    let Some(kind) = kind(&[x]) else {
        return Ok(None);
    };
    let (b, t, width) = x.dims3()?;
    let d = width / heads.iter().sum::<usize>();
    let part = |heads: usize| room((b, t, heads, d), x.dtype(), x);
    let parts = [part(heads[0])?, part(heads[1])?, part(heads[2])?];
    for (at, within) in places(x, heads, d)?.iter().enumerate() {
        let alone = parts[at].reshape(within.shape())?;
        let done = match at {
            0 | 1 => rotate_rows([within, &alone], d, angles, false)?,
            _ => copy_columns(kind, [within, &alone], 1, [width, heads[at] * d]).map(|()| true)?,
        };
        if !done {
            return Ok(None);
        }
    }
    Ok(Some(parts))
}

/// What [`split_heads`] took apart: the gradient of x from those of the parts.
pub fn joined_heads(parts: &[Tensor; 3], angles: [&Tensor; 2]) -> Result<Option<Tensor>> {
    let all: Vec<&Tensor> = parts.iter().collect();
    let Some(kind) = kind(&all) else {
        return Ok(None);
    };
    let (b, t, _, d) = parts[0].dims4()?;
    let mut heads = [0; 3];
    for (heads, part) in heads.iter_mut().zip(parts) {
        *heads = part.dim(2)?;
    }
    let width = d * heads.iter().sum::<usize>();
    let x = room((b, t, width), parts[0].dtype(), &parts[0])?;
    for (at, within) in places(&x, heads, d)?.iter().enumerate() {
        let alone = parts[at].reshape(within.shape())?;
        let done = match at {
            0 | 1 => rotate_rows([&alone, within], d, angles, true)?,
            _ => copy_columns(kind, [&alone, within], 1, [heads[at] * d, width]).map(|()| true)?,
        };
        if !done {
            return Ok(None);
        }
    }
    Ok(Some(x))
}

/// The parts (b·t, heads·d) of x (b, t, Σ heads·d).
fn places(x: &Tensor, heads: [usize; 3], d: usize) -> Result<[Tensor; 3]> {
    let (b, t, width) = x.dims3()?;
    let x = x.reshape((b * t, width))?;
    let [first, second, third] = heads.map(|heads| heads * d);
    Ok([
        x.narrow(1, 0, first)?,
        x.narrow(1, first, second)?,
        x.narrow(1, first + second, third)?,
    ])
}
