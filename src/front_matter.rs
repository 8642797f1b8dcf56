//! What a card says of itself: YAML between two lines of `---`, at the top.

use serde_json::Value;

/// The metadata of a card as JSON; null where it has none.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(card: &str) -> Result<Value, String> {
    let Some(yaml) = yaml(card)? else {
        return Ok(Value::Null);
    };
    // Norwegian is `no`
    let options = serde_saphyr::options! { strict_booleans: true };
    let read = serde_saphyr::from_str_with_options(yaml, options);
    let value: Value = read.map_err(|error| error.to_string())?;
    match value {
        Value::Object(_) | Value::Null => Ok(value),
        _ => Err("the yaml metadata is no mapping".into()),
    }
}

/// What lies between the two lines.
fn yaml(card: &str) -> Result<Option<&str>, String> {
    let is_fence = |line: &str| line.trim_end() == "---";
    let mut lines = card.split_inclusive('\n');
    let Some(first) = lines.next().filter(|line| is_fence(line)) else {
        return Ok(None);
    };
    let mut end = first.len();
    for line in lines {
        if is_fence(line) {
            return Ok(Some(&card[first.len()..end]));
        }
        end += line.len();
    }
    Err("the yaml metadata does not end with a line `---`".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_is_read_as_yaml_has_it() {
        let card = "---\r\nlicense: apache-2.0 # a comment\nlanguage: [en, no]\ntags:\n- a\n- \"b: c\"\nlicense_link: >-\n  \
                    https://example.org/\n  LICENSE\nmodel-index:\n- name: x\n  results: []\nyes: 1.5\n---\n# Title\n---\n";
        let read = read(card).expect("reads");
        assert_eq!(
            read,
            json!({"license": "apache-2.0", "language": ["en", "no"], "tags": ["a", "b: c"],
                "license_link": "https://example.org/ LICENSE", "model-index": [{"name": "x", "results": []}], "yes": 1.5})
        );
    }

    #[test]
    fn a_card_without_metadata_has_none_and_broken_metadata_is_refused() {
        for none in ["", "# Title\n---\na: b\n---\n", "---\n---\n"] {
            assert_eq!(read(none), Ok(Value::Null), "{none}");
        }
        for broken in [
            "---\na: b\n",
            "---\na: \"b\n---\n",
            "---\na: b\na: c\n---\n",
            "---\na:\n\t- b\n---\n",
            "---\na: [b\n---\n",
            "---\n- a\n---\n",
            "---\na: &x [*x]\n---\n",
        ] {
            assert!(read(broken).is_err(), "{broken}");
        }
    }
}
