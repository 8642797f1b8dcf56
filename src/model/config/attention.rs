//! What each layer sees, and how it turns queries and keys.

use serde_json::Value;

use super::keys::Keys;
use super::{Attention, Rope, Scaling};
use crate::error::Result;
use crate::model::family::{Family, Windows};

/// What each layer sees; `ropes` is how many ropes there are.
pub fn attention(
    key: &Keys,
    family: &Family,
    layers: usize,
    ropes: usize,
) -> Result<Vec<Attention>> {
    let json = key.json;
    let switched = json["use_sliding_window"].as_bool().unwrap_or(false);
    let listed = match &family.windows {
        Windows::Nowhere => None,
        _ => key.layer_types(layers)?,
    };
    let window = match (&family.windows, json.get("sliding_window")) {
        (Windows::Nowhere, _) => None,
        (Windows::Later, _) if !switched => None,
        // there, the switch only decides which layers are listed
        (Windows::WithoutRope, _) if !switched && listed.is_none() => None,
        (_, None) => family.window,
        (_, Some(_)) => key.optional("sliding_window")?,
    };
    let turned = turned(key, family, layers)?;
    let windowed: Vec<bool> = match (&family.windows, listed) {
        (Windows::Nowhere, _) => vec![false; layers],
        (Windows::Everywhere, _) => vec![true; layers],
        (_, Some(types)) => types,
        (Windows::Listed, None) => vec![true; layers],
        (Windows::Later, None) => {
            let first = key.optional("max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| layer >= first).collect()
        }
        (Windows::WithoutRope, None) => turned.iter().map(|turned| !turned).collect(),
        (Windows::AllBut(usual) | Windows::Pattern(usual), None) => {
            let said = match &family.windows {
                Windows::Pattern(_) => key.optional("sliding_window_pattern")?,
                _ => None,
            };
            let period = said.unwrap_or(*usual);
            let windowed = |layer: usize| !(layer + 1).is_multiple_of(period);
            (0..layers).map(windowed).collect()
        }
    };
    let layer = |(windowed, turned): (bool, bool)| Attention {
        window: window.filter(|_| windowed),
        rope: turned.then_some(if windowed { ropes - 1 } else { 0 }),
    };
    Ok(windowed.into_iter().zip(turned).map(layer).collect())
}

/// Which layers turn queries and keys.
fn turned(key: &Keys, family: &Family, layers: usize) -> Result<Vec<bool>> {
    if !family.rope_skips_layers {
        return Ok(vec![true; layers]);
    }
    match &key.json["no_rope_layers"] {
        Value::Null => {
            let period = key.optional("no_rope_layer_interval")?.unwrap_or(4);
            let turned = |layer: usize| !(layer + 1).is_multiple_of(period);
            Ok((0..layers).map(turned).collect())
        }
        // 1 where there is a rope, 0 where there is none, whatever the name says
        value => {
            let flags = value.as_array().filter(|flags| flags.len() == layers);
            flags
                .and_then(|flags| flags.iter().map(|f| Some(f.as_u64()? != 0)).collect())
                .ok_or_else(|| {
                    let reason = format!("is not a list of {layers} numbers, one for each layer");
                    key.refuse("no_rope_layers", &reason)
                })
        }
    }
}

/// The rope of most layers, and behind it that of layers with a window where they have one of their own.
pub fn ropes(
    key: &Keys,
    family: &Family,
    head_dim: usize,
    positions_max: usize,
) -> Result<Vec<Rope>> {
    let json = key.json;
    // transformers 5 keeps theta and scaling together in `rope_parameters`, once for each kind of layer where they differ; a
    // `rope_scaling` that somebody adds to what it wrote takes their place, to it and to transformers 4
    let added = match &json["rope_scaling"] {
        Value::Object(scaling) if !scaling.is_empty() => Some(&json["rope_scaling"]),
        _ => None,
    };
    let kinds = &json["rope_parameters"];
    let (written, windows) = if ["full_attention", "sliding_attention"]
        .iter()
        .any(|kind| kinds[kind].is_object())
    {
        (&kinds["full_attention"], &kinds["sliding_attention"])
    } else {
        (kinds, &Value::Null)
    };
    let is_one_for_two = family.rope_of_windows.is_some()
        && windows.is_null()
        && written.as_object().is_some_and(|object| !object.is_empty())
        && !kinds["full_attention"].is_object();
    let all = added.unwrap_or(written);
    let mut doubt = None;
    if let (Some(_), Some(theta)) = (added, written["rope_theta"].as_f64()) {
        let (spelled, usual) = family.rope_theta;
        let read = all["rope_theta"].as_f64().or(json[spelled].as_f64());
        doubt = (read.unwrap_or(usual) != theta)
            .then_some("rope_scaling beside rope_parameters with another rope_theta");
    }
    let theta = |parameters: &Value, (spelled, usual): (&str, f64)| {
        let theta = parameters["rope_theta"].as_f64();
        let theta = theta.or(json[spelled].as_f64()).unwrap_or(usual);
        // dimensions turn by powers of it, and its logarithm divides
        match theta > 1.0 {
            true => Ok(theta),
            false => Err(key.refuse(spelled, &format!("is {theta}, and no rope turns by that"))),
        }
    };
    let mut ropes = vec![rope(
        key,
        family,
        all,
        theta(all, family.rope_theta)?,
        head_dim,
        positions_max,
    )?];
    if let Some(usual) = family.rope_of_windows {
        let theta = theta(windows, usual)?;
        ropes.push(rope(key, family, windows, theta, head_dim, positions_max)?);
    }
    if is_one_for_two {
        // releases of transformers 5 differ in what one means where there are two
        doubt = Some("one rope_parameters for two kinds of layers");
    }
    if let Some(doubt) = doubt {
        for rope in &mut ropes {
            rope.scaling = Scaling::Unsupported(doubt.into());
        }
    }
    Ok(ropes)
}

/// One rope; `scaling` is the object that tells how it is stretched.
fn rope(
    key: &Keys,
    family: &Family,
    scaling: &Value,
    theta: f64,
    head_dim: usize,
    positions_max: usize,
) -> Result<Rope> {
    let json = key.json;
    let (spelled, usual) = family.rope_share.unwrap_or(("partial_rotary_factor", 1.0));
    let share = scaling["partial_rotary_factor"]
        .as_f64()
        .or(json[spelled].as_f64())
        .unwrap_or(usual);
    if !(share > 0.0 && share <= 1.0) {
        return Err(key.refuse(spelled, &format!("is {share}, not a share of a head")));
    }
    let dim = (head_dim as f64 * share) as usize;
    if dim == 0 {
        let reason = format!("is {share}: of {head_dim} elements of a head, none would turn");
        return Err(key.refuse(spelled, &reason));
    }
    let kind = scaling["rope_type"]
        .as_str()
        .or(scaling["type"].as_str())
        .unwrap_or("default");
    let unsupported = |reason: String| {
        Ok(Rope {
            theta,
            dim,
            scaling: Scaling::Unsupported(reason),
        })
    };
    // Phi-3 once called it `su`, and `yarn`
    let is_long = |kind| match family.model_type {
        "phi3" => ["longrope", "su", "yarn"].contains(&kind),
        _ => ["longrope", "su"].contains(&kind),
    };
    if let (Some(one), Some(other)) = (scaling["rope_type"].as_str(), scaling["type"].as_str())
        && one != other
        && !(is_long(one) && is_long(other))
    {
        return unsupported(format!("{one} (rope_type) and {other} (type)"));
    }
    if family.rope_share.is_none() && share != 1.0 {
        return unsupported(format!(
            "{kind} of {share} of each head, which this family has not"
        ));
    }
    let number = |name: &str| {
        let number = scaling[name].as_f64().filter(|&x| x > 0.0);
        number.ok_or_else(|| {
            key.refuse(
                &format!("rope_scaling.{name}"),
                "is missing or not a positive number",
            )
        })
    };
    let number_or = |name: &str, usual: f64| match &scaling[name] {
        Value::Null => Ok(usual),
        _ => number(name),
    };
    let list = |name: &str| -> Result<Vec<f64>> {
        let values: Option<Vec<f64>> = scaling[name]
            .as_array()
            .and_then(|a| a.iter().map(Value::as_f64).collect());
        match values {
            Some(values) if values.len() == dim / 2 => Ok(values),
            _ => Err(key.refuse(
                &format!("rope_scaling.{name}"),
                &format!("is not a list of {} numbers", dim / 2),
            )),
        }
    };
    let scaling = match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear {
            factor: number("factor")?,
        },
        "llama3" => Scaling::Llama3 {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        },
        kind if is_long(kind) => {
            let known = json["original_max_position_embeddings"].as_u64();
            let known = known.or(scaling["original_max_position_embeddings"].as_u64());
            let known = known.or(family.positions_first);
            let original = known.map_or(positions_max, |n| n as usize);
            if original < 2 {
                let reason = format!("is {original}, too few to stretch");
                return Err(key.refuse("original_max_position_embeddings", &reason));
            }
            // without it the config says itself how far it is stretched
            let there_is = positions_max as f64 / original as f64;
            let stretch = match known {
                Some(_) => there_is,
                None => number_or("factor", 1.0)?,
            };
            // transformers 4 reads the first length of the whole config only, 5 that of the scaling
            let nested = scaling["original_max_position_embeddings"].as_u64();
            let is_whole = !json["original_max_position_embeddings"].is_null();
            if !is_whole && nested.is_some() && nested != family.positions_first {
                return unsupported(format!("{kind} whose first length stands in it alone"));
            }
            let attention = scaling["attention_factor"].as_f64().unwrap_or_else(|| {
                if stretch <= 1.0 {
                    1.0
                } else {
                    (1.0 + stretch.ln() / (original as f64).ln()).sqrt()
                }
            });
            Scaling::LongRope {
                short: list("short_factor")?,
                long: list("long_factor")?,
                original,
                attention,
            }
        }
        "yarn" => {
            let factor = number("factor")?;
            let temperature = |slope: f64| match factor > 1.0 {
                true => 0.1 * slope * factor.ln() + 1.0,
                false => 1.0,
            };
            let slopes = ["mscale", "mscale_all_dim"].map(|name| scaling[name].as_f64());
            let usual = match slopes {
                [Some(one), Some(all)] if one != 0.0 && all != 0.0 => {
                    temperature(one) / temperature(all)
                }
                _ => temperature(1.0),
            };
            Scaling::Yarn {
                factor,
                attention: number_or("attention_factor", usual)?,
                fast: number_or("beta_fast", 32.0)?,
                slow: number_or("beta_slow", 1.0)?,
                original: number_or("original_max_position_embeddings", positions_max as f64)?,
                truncate: scaling["truncate"].as_bool().unwrap_or(true),
            }
        }
        "dynamic" => Scaling::Dynamic {
            factor: number("factor")?,
            original: positions_max as f64,
        },
        other => Scaling::Unsupported(other.into()),
    };
    // pairs turn
    if !dim.is_multiple_of(2) {
        return unsupported(format!("{kind} of {dim} elements, an odd number"));
    }
    Ok(Rope {
        theta,
        dim,
        scaling,
    })
}
