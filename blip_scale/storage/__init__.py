"""Access to files, folders and buckets, below all other rooms."""
