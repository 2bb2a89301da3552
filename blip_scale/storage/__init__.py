"""Files, folders and buckets: what every other room writes to and reads from."""
