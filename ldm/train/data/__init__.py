"""Pictures and captions, from files to batches."""
