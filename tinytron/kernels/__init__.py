"""Floor 1: one file per operation. It has the definition, a hand-written backward pass, and the calls of our Triton kernel
(in ``*_triton.py`` next to it) and of the optional package; ``choice.py`` selects one of them."""
