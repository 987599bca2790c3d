//! JSON from container runtimes. Errors name the place in the document.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_path_to_error::{Path, Segment};

/// Deserializes a document.
///
/// # Errors
/// If the input is not JSON or has the wrong types: the path of the field, and the error.
pub fn read<T: DeserializeOwned>(input: &[u8]) -> Result<T, String> {
    let mut source = serde_json::Deserializer::from_slice(input);
    let read = serde_path_to_error::deserialize(&mut source).map_err(|error| at_path(&error));
    read.and_then(|value| source.end().map(|()| value).map_err(|error| error.to_string()))
}

/// Deserializes a part of a document that is already parsed.
///
/// # Errors
/// As for [`read`].
pub fn read_value<T: DeserializeOwned>(value: &serde_json::Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| at_path(&error))
}

/// Deserializes a field that may be null, which stands for the default.
///
/// # Errors
/// If the value has another type.
pub fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A value that must be a JSON object. Derived implementations also accept a list of the fields in their
/// order; this type does not.
#[derive(Debug, Default)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

/// Accepts maps only.
struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

/// Deserializes a field that must be an object.
///
/// # Errors
/// If the value has another type.
pub fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Object::deserialize(deserializer).map(|Object(value)| value)
}

/// Deserializes a field that must be an object or null.
///
/// # Errors
/// If the value has another type.
pub fn object_or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    let value: Option<Object<T>> = Option::deserialize(deserializer)?;
    Ok(value.map(|Object(value)| value).unwrap_or_default())
}

/// Deserializes a list of objects. The list may be null, and nulls in it are skipped.
///
/// # Errors
/// If the value has another type.
pub fn objects_without_nulls<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(list_without_nulls(deserializer)?.into_iter().map(|Object(value)| value).collect())
}

/// Deserializes a list. The list may be null, and nulls in it are skipped.
///
/// # Errors
/// If the value has another type.
pub fn list_without_nulls<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let list: Option<Vec<Option<T>>> = Option::deserialize(deserializer)?;
    Ok(list.unwrap_or_default().into_iter().flatten().collect())
}

/// Deserializes an object as a map. The object may be null, and fields that are null are skipped.
///
/// # Errors
/// If the value has another type.
pub fn map_without_nulls<'de, D, T>(deserializer: D) -> Result<BTreeMap<String, T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let map: Option<BTreeMap<String, Option<T>>> = Option::deserialize(deserializer)?;
    let non_null = |(name, value): (String, Option<T>)| Some((name, value?));
    Ok(map.unwrap_or_default().into_iter().filter_map(non_null).collect())
}

/// Formats an error with the path of its field.
fn at_path(error: &serde_path_to_error::Error<serde_json::Error>) -> String {
    match format_path(error.path()) {
        path if path.is_empty() => error.inner().to_string(),
        path => format!("{path}: {}", error.inner()),
    }
}

/// Formats a path, such as `list[1].name`, without the segments that serde adds.
fn format_path(path: &Path) -> String {
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } => {
                let dot = if text.is_empty() { "" } else { "." };
                text.push_str(&format!("{dot}{key}"));
            }
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Sample {
        #[serde(deserialize_with = "or_default")]
        list: Vec<BTreeMap<String, u8>>,
    }

    #[test]
    fn type_error_names_the_field_and_the_index() {
        let sample = |text: &str| read::<Sample>(text.as_bytes());
        assert_eq!(sample(r#"{"list": null, "more": 1}"#), Ok(Sample::default()));
        let error = sample(r#"{"list": [{"a": 1}, {"b": "c"}]}"#).expect_err("no number");
        assert!(error.starts_with("list[1].b: invalid type: string"), "{error}");
        let error = sample("7").expect_err("no object");
        assert!(error.starts_with("invalid type"), "{error}");
        let error = sample("{} x").expect_err("more behind it");
        assert!(error.contains("trailing characters"), "{error}");
    }

    #[derive(Debug, Deserialize)]
    struct Nested {
        #[serde(deserialize_with = "object")]
        inner: Sample,
        #[serde(default, deserialize_with = "objects_without_nulls")]
        all: Vec<Sample>,
    }

    #[test]
    fn object_refuses_a_list_and_errors_inside_it_name_their_path() {
        let nested = |text: &str| read::<Object<Nested>>(text.as_bytes());
        let Object(read) =
            nested(r#"{"inner": {}, "all": [null, {"list": null}]}"#).expect("an object");
        assert_eq!((read.inner, read.all.len()), (Sample::default(), 1));
        for (wrong, place) in [
            ("[{}, []]", "invalid type: sequence, expected an object"),
            (r#"{"inner": []}"#, "inner: invalid type: sequence, expected an object"),
            (r#"{"inner": {}, "all": [[]]}"#, "all[0]: invalid type: sequence"),
            (r#"{"inner": {"list": [{"a": "b"}]}}"#, "inner.list[0].a: invalid type: string"),
        ] {
            let error = nested(wrong).expect_err(wrong);
            assert!(error.starts_with(place), "{wrong}: {error}");
        }
    }

    #[test]
    fn syntax_error_names_the_field() {
        let error = read::<Value>(br#"{"a": {"b": [1, x]}}"#).expect_err("no JSON");
        assert!(error.starts_with("a.b[1]: expected value"), "{error}");
        let error = read_value::<Vec<u8>>(&json!([1, null])).expect_err("no number");
        assert!(error.starts_with("[1]: invalid type: null"), "{error}");
    }
}
