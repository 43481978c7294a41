"""Benchmarks of editing fidelity, speed and memory. Not part of the installed library; run from a checkout."""
