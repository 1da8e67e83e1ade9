"""Experiments: jobs of one short file each. To add one, write a file here or in ``models``, decorate its class with
``@job``, and import it below, or list it in ``builtin.py``, which imports nothing."""
