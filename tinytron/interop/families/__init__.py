"""The Hugging Face families that Tinytron reads and writes, one file each.

To add a family, add a file and put its name in the list below.
"""

from tinytron.interop.families import gpt2, gpt_neox, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from tinytron.interop.families.family import Family, Part

__all__ = ["FAMILIES", "Family", "Part"]

# By model_type. An export uses the first one that can express the model.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        gpt_neox.FAMILY,
        gpt2.FAMILY,
    )
}
