"""Ideas that were tried once, as small as could kill them: `PYTHONPATH=benchmarks python -m experiments.NAME`."""
