//! How long the strings of a JSON file are, before anything is made of them.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// Bytes of the longest string in `json`, names of fields among them. What a field called `except` holds is passed
/// over. Where a field is there twice, both count, whichever a reader would take.
pub(super) fn longest_string(json: &[u8], except: &str) -> serde_json::Result<usize> {
    let mut longest = 0;
    let mut reader = serde_json::Deserializer::from_slice(json);
    reader.deserialize_any(Longest {
        longest: &mut longest,
        except,
    })?;
    Ok(longest)
}

struct Longest<'a> {
    longest: &'a mut usize,
    except: &'a str,
}

impl Longest<'_> {
    fn inner(&mut self) -> Longest<'_> {
        Longest {
            longest: self.longest,
            except: self.except,
        }
    }

    fn saw(&mut self, string: &str) {
        *self.longest = string.len().max(*self.longest);
    }
}

impl<'de> DeserializeSeed<'de> for Longest<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Longest<'_> {
    type Value = ();

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("JSON")
    }

    fn visit_str<E: Error>(mut self, string: &str) -> Result<(), E> {
        self.saw(string);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(self.inner())?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key::<Cow<'_, str>>()? {
            self.saw(&name);
            if name == self.except {
                fields.next_value::<IgnoredAny>()?;
            } else {
                fields.next_value_seed(self.inner())?;
            }
        }
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::longest_string;

    #[test]
    fn strings_count_wherever_they_stand() {
        let longest = |json: &str| longest_string(json.as_bytes(), "map").unwrap();
        for (json, bytes) in [
            ("[1, -2, 0.5, null, true]", 0),
            (r#"[["abc", 1]]"#, 3),
            (r#"{"ab\u00e9": ""}"#, 4),
            (r#"{"a": {"b": ["abcd"]}, "c": "xy"}"#, 4),
            (r#"{"a": "abcd", "a": "x"}"#, 4),
            (r#"{"map": "abcde", "a": {"map": ["abcdef"]}}"#, 3),
        ] {
            assert_eq!(longest(json), bytes, "{json}");
        }
        assert!(longest_string(b"[1", "").is_err());
        let deep = "[".repeat(100_000);
        assert!(longest_string(deep.as_bytes(), "").is_err());
    }
}
