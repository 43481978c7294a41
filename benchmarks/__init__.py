"""Fidelity and cost of the miniature model. Not part of the installed library; run from a checkout."""
