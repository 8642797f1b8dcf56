//! The one door to Parquet, in which most datasets of the Hub are kept.

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::Type;
use serde_json::Value;

use super::rows::FIELDS;
use crate::error::{Error, IoContext, Result};

/// The rows of a table, each an object of those columns that a row may have.
///
/// # Errors
/// What is no table, or a broken one: its reader panics at some of them.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let file = File::open(path).context("open", path)?;
    let failed = |reason: String| Error::Table {
        path: path.into(),
        reason,
    };
    match std::panic::catch_unwind(AssertUnwindSafe(|| rows(file))) {
        Ok(Ok(rows)) => Ok(rows),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed("its pages contradict each other".into())),
    }
}

fn rows(file: File) -> parquet::errors::Result<Vec<Value>> {
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema();
    let known = schema.get_fields().iter();
    let known: Vec<Arc<Type>> = known
        .filter(|field| FIELDS.contains(&field.name()))
        .cloned()
        .collect();
    // without any, all of them: their names are what an error tells
    let columns = match known.is_empty() {
        true => None,
        false => Some(
            Type::group_type_builder(schema.name())
                .with_fields(known)
                .build()?,
        ),
    };
    let rows = reader.get_row_iter(columns)?;
    rows.map(|row| Ok(row?.to_json_value())).collect()
}
