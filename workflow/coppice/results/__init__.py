"""Results as typed Parquet tables: schemas, collection, failures, comparisons, reading."""
