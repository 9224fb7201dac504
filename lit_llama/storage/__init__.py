"""Files: what may be written, replaced and deleted, and checked readers of each format."""
