//! Mutations that leave JSON well-formed, so that they get past the parser to what is made of its values.

use serde_json::{Map, Value, json};

/// Changes one value, key or member of one of the JSON objects in `bytes`; `None` where there is none.
pub fn mutated(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut random = Random(u64::from(seed) << 1 | 1);
    let begins: Vec<usize> = (0..bytes.len())
        .filter(|&i| {
            matches!(bytes[i], b'{' | b'[') && (i == 0 || matches!(bytes[i - 1], b'\n' | 0))
        })
        .collect();
    let begin = *begins.get(random.below(begins.len().max(1)))?;
    let mut stream = serde_json::Deserializer::from_slice(&bytes[begin..]).into_iter::<Value>();
    let mut value = stream.next()?.ok()?;
    let end = begin + stream.byte_offset();
    // from the outside in, so that every depth has its turn
    let places = count(&value);
    change(&mut value, &mut random.below(places), &mut random);
    let text = serde_json::to_vec(&value).ok()?;
    // a length prefix goes with its header
    if begin == 8 {
        let length = (text.len() as u64).to_le_bytes();
        return Some([&length, text.as_slice(), &bytes[end..]].concat());
    }
    Some([&bytes[..begin], &text, &bytes[end..]].concat())
}

struct Random(u64);

impl Random {
    /// SplitMix64
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum(),
        _ => 0,
    }
}

fn change(value: &mut Value, place: &mut usize, random: &mut Random) {
    if *place == 0 {
        *place = usize::MAX;
        alter(value, random);
        return;
    }
    *place -= 1;
    let mut inner: Box<dyn Iterator<Item = &mut Value>> = match value {
        Value::Array(values) => Box::new(values.iter_mut()),
        Value::Object(members) => Box::new(members.values_mut()),
        _ => return,
    };
    for value in &mut inner {
        change(value, place, random);
        if *place == usize::MAX {
            return;
        }
    }
}

fn alter(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(members) if random.below(3) > 0 => alter_members(members, random),
        Value::Array(values) if !values.is_empty() && random.below(3) > 0 => {
            let at = random.below(values.len());
            match random.below(3) {
                0 => drop(values.remove(at)),
                1 => values.insert(at, values[at].clone()),
                _ => {
                    let other = random.below(values.len());
                    values.swap(at, other);
                }
            }
        }
        Value::Number(number) if random.below(2) == 0 => {
            let step: f64 = [1.0, -1.0, 2.0, 0.5][random.below(4)];
            *value = match (number.as_u64(), number.as_f64()) {
                (Some(n), _) if step.abs() == 1.0 => json!(n.wrapping_add(step as i64 as u64)),
                (Some(n), _) => json!((n as f64 * step) as u64),
                (None, Some(x)) => json!(x * step),
                _ => json!(0),
            };
        }
        _ => *value = strange(random),
    }
}

fn alter_members(members: &mut Map<String, Value>, random: &mut Random) {
    let keys: Vec<String> = members.keys().cloned().collect();
    let Some(key) = keys.get(random.below(keys.len())).cloned() else {
        return;
    };
    match random.below(4) {
        0 => drop(members.remove(&key)),
        1 => {
            let value = members[&key].clone();
            members.insert(text(random), value);
        }
        2 => {
            let other = members[&keys[random.below(keys.len())]].clone();
            members.insert(key, other);
        }
        _ => {
            let value = strange(random);
            members.insert(key, value);
        }
    }
}

fn strange(random: &mut Random) -> Value {
    match random.below(8) {
        0 => Value::Null,
        1 => json!([]),
        2 => json!({}),
        3 => json!(random.below(2) == 0),
        4 | 5 => {
            let whole = [
                0,
                1,
                2,
                3,
                7,
                8,
                255,
                1 << 20,
                1 << 28,
                1 << 31,
                1 << 32,
                1 << 47,
                1 << 61,
                1 << 62,
                i64::MAX as u64,
                u64::MAX,
            ];
            json!(whole[random.below(whole.len())])
        }
        6 => {
            let real = [-1.0, 0.5, -0.0, 1e-320, 1e-45, 1e30, 1.7e308, -1e300];
            json!(real[random.below(real.len())])
        }
        _ => json!(text(random)),
    }
}

fn text(random: &mut Random) -> String {
    let texts = [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "x\0y",
        "\n---\n",
        "\u{1b}[2J",
        "<script>",
        "|",
        "`",
        "__metadata__",
        "model.safetensors",
        "svd-00001-of-00001.safetensors",
        "config.json",
        "lm_head",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "F32",
        "BF16",
        "F4",
        "U8",
        "I64",
        "residual",
        "sidecar",
        "F32 ",
        "ü𝔐",
        "1e999",
        "NaN",
    ];
    texts[random.below(texts.len())].into()
}
