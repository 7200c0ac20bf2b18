"""The parts of benchmarks/scenarios.py: a scenario a file, each a function from a stage to a report."""
