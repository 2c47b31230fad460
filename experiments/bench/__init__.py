"""Measurements, one module per subcommand of experiments/benchmark.py.

A module has `arguments(parser)`, which adds its flags, and `run(args)`, which measures, prints as
it goes and returns what --json keeps.
"""
