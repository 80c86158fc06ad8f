"""The stages of a run, one file each: what a stage is called, what its outcome depends on, and its work."""
