"""Experiments with models of your own, one short file each."""
