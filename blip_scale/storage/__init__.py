"""Access to files, folders and buckets. All other packages may import this one."""
