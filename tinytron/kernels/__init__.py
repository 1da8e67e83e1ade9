"""Floor 1: one file per operation, with its definition, the backward pass by hand, our Triton kernel (in the file
next to it, ``*_triton.py``) and the optional package; ``choice.py`` says which of them computes it."""
