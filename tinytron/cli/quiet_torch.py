"""Imports torch without the messages of its C++ code; import this before anything else that imports torch.

When a launcher loses the store in which launchers meet, torch's C++ code prints some 80 lines of stack frames, before
Python knows of it. torch reads the level of these messages only while it is imported. Workers do not inherit it.
"""

import os

_LEVEL = "TORCH_CPP_LOG_LEVEL"

if _LEVEL in os.environ:  # the user's choice
    import torch
else:
    os.environ[_LEVEL] = "FATAL"
    import torch  # noqa: F401

    del os.environ[_LEVEL]
