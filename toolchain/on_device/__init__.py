"""Programs that run on a device: standard library alone, Python 3.8 or newer, nothing of the project."""
