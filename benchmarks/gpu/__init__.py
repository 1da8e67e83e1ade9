"""The first ten minutes of a GPU: ``bash benchmarks/gpu.sh``. Each part is one file and one row in parts.py."""
