"""Floor 3: text generation with a trained model."""

from tinytron.inference.engine import Generation, Piece, Sample, complete, stream
from tinytron.inference.kv_cache import KVCache
from tinytron.inference.sampler import SamplingOptions

__all__ = ["Generation", "KVCache", "Piece", "Sample", "SamplingOptions", "complete", "stream"]
