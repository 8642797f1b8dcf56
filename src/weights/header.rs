//! The header of one safetensors file: what it says it holds, checked before anything believes it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::error::{Error, IoContext, Result};
use crate::json::refuse_repeated_keys;

/// The longest header that is read, as in the reference implementation.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The longest data that is read: longer than any disk, and so far from 2⁶⁴ that sums of some lengths stay below it.
const END_MAX: usize = 1 << 52;

/// One tensor of a file: `offset` counts from the start of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub offset: u64,
    pub bytes: u64,
}

impl Entry {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A checked header: entries in file order, without holes or overlaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    pub entries: Vec<Entry>,
    /// The header as stored, length prefix and padding included: the file is these bytes and then the tensors.
    pub prefix: Vec<u8>,
}

impl Header {
    /// Reads the header of a local file and checks it against the file's length.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).context("open", path)?;
        let found = file.metadata().context("read", path)?.len();
        let mut length = [0u8; 8];
        if found < 8 {
            return Err(Error::Truncated {
                path: path.into(),
                expected: 8,
                found,
            });
        }
        file.read_exact_at(&mut length, 0).context("read", path)?;
        let length = checked_length(path, length)?;
        if found < 8 + length {
            return Err(Error::Truncated {
                path: path.into(),
                expected: 8 + length,
                found,
            });
        }
        let mut prefix = vec![0u8; 8 + length as usize];
        file.read_exact_at(&mut prefix, 0).context("read", path)?;
        let header = Self::parse(path, prefix)?;
        let expected = header.file_bytes();
        if found < expected {
            return Err(Error::Truncated {
                path: path.into(),
                expected,
                found,
            });
        }
        if found > expected {
            return Err(Error::Header {
                path: path.into(),
                reason: format!("{} bytes follow the last tensor", found - expected),
            });
        }
        Ok(header)
    }

    /// Parses length prefix and JSON; `path` names the file in errors.
    pub fn parse(path: &Path, prefix: Vec<u8>) -> Result<Self> {
        let refuse = |reason: String| Error::Header {
            path: path.into(),
            reason,
        };
        let (length, json) = prefix
            .split_first_chunk::<8>()
            .ok_or_else(|| refuse("it has no length prefix".into()))?;
        if checked_length(path, *length)? != json.len() as u64 {
            return Err(refuse("its length prefix does not match its header".into()));
        }
        if json.first() != Some(&b'{') {
            return Err(refuse("its header is no JSON object".into()));
        }
        let metadata: Metadata = refuse_repeated_keys(json)
            .and_then(|()| serde_json::from_slice(json))
            .map_err(|e| refuse(misfit(json).unwrap_or_else(|| e.to_string())))?;
        let tensors = metadata.tensors();
        if let Some((name, info)) = tensors
            .iter()
            .find(|(_, info)| info.data_offsets.1 > END_MAX)
        {
            return Err(refuse(format!(
                "it ends `{name}` at byte {}, at most {END_MAX} are read",
                info.data_offsets.1
            )));
        }
        let mut entries: Vec<Entry> = tensors
            .into_iter()
            .map(|(name, info)| Entry {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: prefix.len() as u64 + info.data_offsets.0 as u64,
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
            })
            .collect();
        // empty tensors share an offset: the name settles the order
        entries.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
        Ok(Self { entries, prefix })
    }

    /// Lays out tensors one after the other in the given order.
    pub fn compose<'a>(
        tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize])>,
    ) -> Result<Self> {
        Self::compose_with(&[], tensors)
    }

    /// As [`Header::compose`], with entries for the file's metadata.
    pub fn compose_with<'a>(
        metadata: &[(&str, &str)],
        tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize])>,
    ) -> Result<Self> {
        use serde_json::{Map, Value, json};
        let mut map = Map::new();
        // transformers refuses a file whose metadata does not name its format
        let mut about = Map::from_iter([("format".to_string(), json!("pt"))]);
        about.extend(
            metadata
                .iter()
                .map(|&(key, value)| (key.to_string(), json!(value))),
        );
        map.insert("__metadata__".into(), about.into());
        let mut end = 0u64;
        for (name, dtype, shape) in tensors {
            let start = end;
            end += (shape.iter().product::<usize>() * dtype.bitsize() / 8) as u64;
            let entry =
                json!({"dtype": dtype_value(dtype), "shape": shape, "data_offsets": [start, end]});
            let repeated = map.insert(name.into(), entry).is_some();
            assert!(!repeated, "tensor names of one file are distinct: {name}");
        }
        let mut json = serde_json::to_vec(&Value::Object(map)).expect("a JSON value serialises");
        // the data starts at a multiple of eight, as the reference implementation writes it
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut prefix = (json.len() as u64).to_le_bytes().to_vec();
        prefix.extend_from_slice(&json);
        Self::parse(Path::new("<new file>"), prefix)
    }

    /// The header with one more tensor at the end, under the same metadata.
    pub fn with_tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Self> {
        let json: serde_json::Value =
            serde_json::from_slice(&self.prefix[8..]).expect("a checked header is JSON");
        let metadata: Vec<(&str, &str)> = json["__metadata__"]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
            .collect();
        let here = self.entries.iter();
        let here = here.map(|e| (e.name.as_str(), e.dtype, e.shape.as_slice()));
        Self::compose_with(&metadata, here.chain([(name, dtype, shape)]))
    }

    /// One entry of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let json: serde_json::Value = serde_json::from_slice(self.prefix.get(8..)?).ok()?;
        json["__metadata__"][key].as_str().map(str::to_string)
    }

    /// The length of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.prefix.len() as u64 + self.entries.iter().map(|e| e.bytes).sum::<u64>()
    }
}

fn dtype_value(dtype: Dtype) -> serde_json::Value {
    serde_json::to_value(dtype).expect("a dtype serialises to its name")
}

/// The first tensor of a header whose bytes are not those of its dtype and shape: the parser names none.
fn misfit(json: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Info {
        dtype: Dtype,
        shape: Vec<u64>,
        data_offsets: [u64; 2],
    }
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
    header.into_iter().find_map(|(name, info)| {
        let Info {
            dtype,
            shape,
            data_offsets: [start, end],
        } = serde_json::from_value(info).ok()?;
        let elements = shape.iter().map(|&side| u128::from(side));
        let bits = elements.fold(dtype.bitsize() as u128, u128::saturating_mul);
        let found = i128::from(end) - i128::from(start);
        let fits = bits.is_multiple_of(8) && i128::try_from(bits / 8) == Ok(found);
        (!fits).then(|| {
            let dtype = super::dtype_name(dtype);
            format!("`{name}` is {dtype} {shape:?}, and lies from byte {start} to {end}")
        })
    })
}

fn checked_length(path: &Path, prefix: [u8; 8]) -> Result<u64> {
    let length = u64::from_le_bytes(prefix);
    if length <= HEADER_BYTES_MAX {
        return Ok(length);
    }
    let reason = match &prefix {
        b"version " => {
            "it is a pointer of Git LFS: `git lfs pull` there brings the file itself".into()
        }
        _ if prefix.trim_ascii_start().starts_with(b"<") => "it is a page of the web".into(),
        _ => format!("its header claims {length} bytes, at most {HEADER_BYTES_MAX} are read"),
    };
    Err(Error::Header {
        path: path.into(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(json: &str) -> Result<Header> {
        let mut prefix = (json.len() as u64).to_le_bytes().to_vec();
        prefix.extend_from_slice(json.as_bytes());
        Header::parse(Path::new("x.safetensors"), prefix)
    }

    #[test]
    fn a_hostile_header_is_refused_with_its_reason() {
        let cases = [
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
                "twice",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                "a",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}"#,
                "lies from byte 0 to 8",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#,
                "-1",
            ),
            (
                r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
                "F99",
            ),
            ("[]", "JSON object"),
            ("{", "EOF"),
        ];
        for (json, reason) in cases {
            let error = parse(json).expect_err(json).to_string();
            assert!(error.contains(reason), "{json}: {error}");
        }
        let error =
            Header::parse(Path::new("x"), u64::MAX.to_le_bytes().to_vec()).expect_err("too long");
        assert!(error.to_string().contains("claims"), "{error}");
    }

    #[test]
    fn a_tensor_is_added_behind_the_others() {
        let shapes: [(&str, Dtype, &[usize]); 2] =
            [("b", Dtype::BF16, &[2, 3]), ("a", Dtype::F32, &[5])];
        let header = Header::compose_with(&[("made", "here")], shapes).expect("composes");
        let longer = header
            .with_tensor("head", Dtype::F16, &[4, 3])
            .expect("composes");
        let entries: Vec<(&str, u64)> = longer
            .entries
            .iter()
            .map(|e| (e.name.as_str(), e.offset - longer.prefix.len() as u64))
            .collect();
        assert_eq!(entries, [("b", 0), ("a", 12), ("head", 32)]);
        assert_eq!(
            longer.file_bytes() - longer.prefix.len() as u64,
            12 + 20 + 24
        );
        assert_eq!(longer.metadata("made").as_deref(), Some("here"));
        assert_eq!(longer.metadata("format").as_deref(), Some("pt"));
    }

    #[test]
    fn a_tensor_whose_bytes_are_not_those_of_its_shape_is_named() {
        for json in [
            r#"{"fits":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"BF16","shape":[3,0],"data_offsets":[8,14]}}"#,
            r#"{"w":{"dtype":"BF16","shape":[4611686018427387904,4],"data_offsets":[0,2]}}"#,
            r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
        ] {
            let text = parse(json).expect_err("does not fit").to_string();
            assert!(
                text.contains("`w` is ") && text.contains("lies from byte"),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn composed_headers_read_back(shapes in proptest::collection::vec(proptest::collection::vec(0usize..5, 0..4), 0..6)) {
            let names: Vec<String> = (0..shapes.len()).map(|i| format!("t{i}")).collect();
            let header = Header::compose(names.iter().zip(&shapes).map(|(n, s)| (n.as_str(), Dtype::BF16, s.as_slice()))).expect("composes");
            prop_assert_eq!(header.prefix.len() % 8, 0);
            for (name, shape) in names.iter().zip(&shapes) {
                let entry = header.entries.iter().find(|e| &e.name == name).expect("is there");
                prop_assert_eq!(&entry.shape, shape);
                prop_assert_eq!(entry.bytes as usize, 2 * shape.iter().product::<usize>());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let mut prefix = (bytes.len() as u64).to_le_bytes().to_vec();
            prefix.extend_from_slice(&bytes);
            let _ = Header::parse(Path::new("x"), prefix);
        }

        #[test]
        fn headers_with_other_numbers_and_words_never_panic(
            numbers in proptest::collection::vec(proptest::num::u64::ANY, 6),
            bits in proptest::collection::vec(0u32..64, 6),
            dtype in "(F32|BF16|F4|I64|)", name in "[a-z.\u{0}\"\\\\é]{0,6}",
        ) {
            let [a, b, c, d, e, f] = std::array::from_fn(|i| numbers[i] >> bits[i]);
            let info = |shape: [u64; 2], ends: [u64; 2]| {
                serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": ends})
            };
            let json = serde_json::json!({name: info([a, b], [0, c]), "other": info([d, 1], [e, f])});
            let json = json.to_string();
            let mut prefix = (json.len() as u64).to_le_bytes().to_vec();
            prefix.extend_from_slice(json.as_bytes());
            if let Ok(header) = Header::parse(Path::new("x"), prefix) {
                // what is believed lies within the file, and is as long as its shape says
                for entry in &header.entries {
                    let elements: u64 = entry.shape.iter().map(|&side| side as u64).product();
                    prop_assert!(entry.bytes <= header.file_bytes());
                    prop_assert!(elements == 0 || entry.bytes > 0);
                }
            }
        }
    }
}
