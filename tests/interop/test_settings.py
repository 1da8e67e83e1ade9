"""What a config.json may say: every setting is understood, harmless, or an error with its key and value."""

from __future__ import annotations

from typing import Any

import pytest

from tests.interop.families import MODELS, make
from tinytron.errors import ConfigError
from tinytron.interop.architectures import facts, read_architecture, read_config
from tinytron.model import ModelConfig

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 41, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 41,
}  # fmt: skip
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 41, "max_position_embeddings": 32,
}  # fmt: skip
QWEN: dict[str, Any] = LLAMA | {"model_type": "qwen3"}
MIXTRAL: dict[str, Any] = LLAMA | {"model_type": "mixtral"}


def read(values: dict[str, Any], **more: Any) -> ModelConfig:
    return read_architecture(values | more, "config.json")[1]


def refusal(values: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ConfigError, match=r"^.+$") as caught:
        read(values, **more)
    return str(caught.value)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("base", "more", "text"),
    [
        (LLAMA, {"model_type": "bert"}, "model_type = 'bert' is not supported; supported are llama, mistral, qwen2, "),
        (LLAMA, {"model_type": None}, "config.json does not say its model_type"),
        (LLAMA, {"hidden_size": None}, "config.json does not say its hidden_size"),
        (LLAMA, {"hidden_size": "16"}, "hidden_size = '16' is not supported; a whole number up to 2,147,483,648"),
        (LLAMA, {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 is not supported; a whole number up to 10,000"),
        (LLAMA, {"hidden_size": True}, "hidden_size = True is not supported; a whole number"),
        (LLAMA, {"hidden_size": -16}, "hidden_size = -16 is not supported; a whole number"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan is not supported; a number is expected"),
        (LLAMA, {"rope_theta": float("inf")}, "rope_theta = inf is not supported; a number is expected"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps = 'small' is not supported; a number is expected"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is not supported; true or false is expected"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; only silu, swish are supported"),
        (LLAMA, {"hidden_act": []}, "hidden_act = [] is not supported; only silu, swish are supported"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved = True is not supported; Tinytron does not know"),
        (LLAMA, {"is_causal": False}, "is_causal = False is not supported; only True is supported"),
        (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported; Tinytron does not know"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported; Tinytron does not "),
        (LLAMA, {"embedding_multiplier": 12}, "embedding_multiplier = 12 is not supported; Tinytron does not know"),
        (LLAMA, {"attention_temperature": 2}, "attention_temperature = 2 is not supported; Tinytron does not know"),
        (LLAMA, {"num_dropped_layers": 1}, "num_dropped_layers = 1 is not supported; Tinytron does not know"),
        *(
            (LLAMA, {key: value}, f"{key} = {value!r} is not supported; Tinytron does not know this setting")
            for key, value in {
                "scoring_func": "sigmoid", "n_group": 8, "interleave": True, "pre_ln": 1, "zero_centered": True,
                "num_meta_tokens": 128, "attention_sink_token": 4, "fp8": True, "load_in_4bit": True, "use_post_ln": True,
            }.items()
        ),
        (LLAMA, {"use_qk_norm": True}, "use_qk_norm = True is not supported; Tinytron does not know"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; other keys say 1.0"),
        (
            LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5 is not supported; this family rotates whole heads",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "note": 1}}, "rope_scaling: note = 1 is not supported"),
        (
            LLAMA, {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types = ['full_attention', 'sliding_attention'] is not supported; only full_attention fits",
        ),
        (
            LLAMA | {"model_type": "mistral"}, {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
            "layer_types = ['full_attention', 'full_attention'] is not supported; only sliding_attention fits",
        ),
        (NEOX, {"rope_theta": 500.0}, "rope_theta = 500.0 is not supported; other keys say 10000.0"),
        (NEOX, {"rotary_pct": 1.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; other"),
        (LLAMA, {"rope_scaling": 3}, "rope_scaling = 3 is not supported; an object is expected"),
        (
            LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "config.json: rope_scaling: type = 'dynamic' is not supported; only default, linear, llama3, yarn are ",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "config.json: rope_scaling does not say its factor"),
        (LLAMA, {"rope_scaling": ROPE | {"short_factor": [1]}}, "rope_scaling: short_factor = [1] is not supported"),
        (LLAMA, {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters: full_attention = {'rope_type': 'llama3'"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate = False is not supported"),
        (
            LLAMA, {"rope_scaling": ROPE | {"low_freq_factor": 5.0}},
            "config.json describes a model that Tinytron cannot build: --rope_low_freq_factor 5.0 must be below",
        ),
        (
            LLAMA, {"num_key_value_heads": 3},
            "config.json describes a model that Tinytron cannot build: --num_key_value_heads 3 must divide",
        ),
        (
            LLAMA, {"quantization_config": {"bits": 4}},
            "quantization_config = {'bits': 4} is not supported; Tinytron does not know this setting of llama",
        ),
        (LLAMA, {"logit_scale": 0.5}, "logit_scale = 0.5 is not supported; Tinytron does not know this setting of llama"),
        (LLAMA, {"sliding_window": 8}, "sliding_window = 8 is not supported; Tinytron does not know this setting of llama"),
        (LLAMA | {"model_type": "qwen2"}, {"attention_bias": True}, "attention_bias = True is not supported; "),
        (QWEN, {"layer_types": ["full_attention"]}, "layer_types = ['full_attention'] is not supported; 2 of full"),
        (QWEN, {"layer_types": ["full_attention", "chunked"]}, "2 of full_attention and sliding_attention are expected"),
        (QWEN, {"layer_types": "full"}, "layer_types = 'full' is not supported; a list is expected"),
        (
            QWEN, {"layer_types": ["full_attention", "sliding_attention"]},
            "is not supported; use_sliding_window is false",
        ),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported; only 0 is supported"),
        (LLAMA | {"model_type": "qwen3_moe"}, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 is not supported; "),
        (LLAMA | {"model_type": "qwen3_moe"}, {"mlp_only_layers": ["a"]}, "mlp_only_layers = ['a'] is not supported; "),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported; "),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights = False is not supported; only True is supported"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not supported; Tinytron does not know"),
        (GPT2, {"activation_function": "relu"}, "only gelu, gelu_new, gelu_pytorch_tanh, gelu_fast are supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(base: dict[str, Any], more: dict[str, Any], text: str) -> None:
    assert text in refusal(base, **more)
    assert refusal(base, **more).startswith("config.json")


def test_what_says_nothing_is_passed_over() -> None:
    plain = read(LLAMA)
    harmless = {
        "torch_dtype": "bfloat16",
        "eos_token_id": [1, 2],
        "transformers_version": "4.1",
        "initializer_range": 0.5,
    }
    assert read(LLAMA, **harmless, attention_dropout=0.1, unheard_of=None, _unsloth=False, more=[]) == plain


PUBLISHED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (LLAMA, {"is_llama_config": True, "rope_interleaved": False}, ["is_llama_config"]),
    (LLAMA, {"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}}, []),
    (LLAMA, {"unsloth_fixed": True, "unsloth_version": "2025.1"}, ["unsloth_fixed", "unsloth_version"]),
    (LLAMA, {"neftune_noise_alpha": 5, "pretraining_tp": 2, "torchscript": True}, []),
    (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.X"}}, ["auto_map"]),
    (LLAMA, {"use_flash_attention_2": True}, ["use_flash_attention_2"]),
    (LLAMA, {"_flash_attn_2_enabled": True, "mask_token_id": 4}, ["_flash_attn_2_enabled", "mask_token_id"]),
    (LLAMA, {"model_max_length": 64, "max_sequence_length": 64}, ["model_max_length", "max_sequence_length"]),
    (LLAMA, {"temperature": 0.6, "do_sample": True, "num_beams": 1}, ["temperature", "do_sample", "num_beams"]),
    (LLAMA, {"pad_token": "<pad>", "eos_token": "</s>"}, ["pad_token", "eos_token"]),
    (LLAMA, {"hidden_dropout_prob": 0.1, "attention_dropout": 0.1}, []),
    (LLAMA, {"layer_types": ["full_attention"] * 2, "mlp_bias": None, "partial_rotary_factor": 1}, []),
    (LLAMA, {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21}, []),
    (LLAMA, {"is_causal": True, "pruned_heads": {}}, []),
    (LLAMA, {"rope_scaling": None, "rope_parameters": None, "rope_theta": 10000.0}, []),
    (GPT2, {"_num_labels": 1, "output_past": True, "n_special": 0}, ["output_past"]),
    (GPT2, {"predict_special_tokens": True, "finetuning_task": "x"}, ["predict_special_tokens", "finetuning_task"]),
    # As version 4 of transformers saves it.
    (NEOX, {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rotary_emb_base": 10000, "rotary_pct": 0.25}, []),
    (NEOX, {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_scaling": None, "classifier_dropout": 0.1}, []),
    (MIXTRAL, {"router_z_loss_coef": 0.1, "initializer_factor": 2.0}, ["router_z_loss_coef", "initializer_factor"]),
    (QWEN | {"model_type": "qwen2"}, {"use_mrope": False, "sliding_window": 131072, "use_sliding_window": False}, []),
]  # fmt: skip


@pytest.mark.parametrize(("base", "more", "ignored"), PUBLISHED)
def test_keys_of_published_models_that_are_not_about_the_function(
    base: dict[str, Any], more: dict[str, Any], ignored: list[str]
) -> None:
    """Those that are not known by name are returned, to be said."""
    found = read_config(base | more, "config.json")
    assert found.config == read(base)
    assert sorted(found.ignored) == sorted(ignored)


def test_second_names_of_rotary_positions_of_neox() -> None:
    four = {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 90, "rope_theta": 90}
    config = read(NEOX, **four)
    assert (config.rotary_fraction, config.rope_theta) == (0.5, 90.0)


def test_yarn_that_says_only_its_factor() -> None:
    config = read(LLAMA, rope_scaling={"type": "yarn", "factor": 2.0})
    assert (config.rope_original_block_size, config.rope_beta_fast, config.rope_beta_slow) == (32, 32.0, 1.0)


def test_what_is_left_out_is_what_transformers_takes() -> None:
    """A config.json of old says only what is not usual."""
    transformers = pytest.importorskip("transformers")
    for name, (prefix, _) in MODELS.items():
        if " " in name:
            continue
        kind = getattr(transformers, f"{prefix}Config")
        sizes = GPT2 if prefix == "GPT2" else LLAMA
        spoken = {key: value for key, value in sizes.items() if key not in ("model_type", "rms_norm_eps")}
        if prefix == "GPTNeoX":
            del spoken["num_key_value_heads"]
            spoken["num_attention_heads"] = 2  # of a quarter of whose width an even part is turned
        made = kind(**spoken).to_dict()
        assert facts(read({**spoken, "model_type": kind.model_type})) == facts(read(made)), name


def test_windows_of_qwen() -> None:
    def windows(**more: Any) -> list[int]:
        config = read(QWEN, num_hidden_layers=4, **more)
        return [config.window(layer) for layer in range(4)]

    switched = {"use_sliding_window": True, "sliding_window": 7}
    assert windows(sliding_window=7, max_window_layers=1) == [0, 0, 0, 0]
    assert windows(**switched, max_window_layers=0) == [7, 7, 7, 7]
    assert windows(**switched, max_window_layers=3) == [0, 0, 0, 7]
    assert windows(**switched, max_window_layers=4) == [0, 0, 0, 0]
    types = ["full_attention", "sliding_attention"] * 2
    assert windows(**switched, layer_types=types) == [0, 7, 0, 7]
    assert windows(use_sliding_window=True, sliding_window=None, max_window_layers=0) == [0, 0, 0, 0]


def test_layers_with_experts_of_qwen() -> None:
    def layers(**more: Any) -> tuple[int, ...]:
        return read(LLAMA, model_type="qwen3_moe", num_hidden_layers=6, **more).moe_layers

    assert layers() == (0, 1, 2, 3, 4, 5)
    assert layers(decoder_sparse_step=2) == (1, 3, 5)
    assert layers(decoder_sparse_step=2, mlp_only_layers=[0, 3]) == (1, 5)
    assert layers(mlp_only_layers=[5]) == (0, 1, 2, 3, 4)


def test_experts_of_old_and_new_names() -> None:
    assert read(LLAMA, model_type="qwen3_moe", num_experts=16).num_experts == 16
    assert read(LLAMA, model_type="qwen3_moe", num_experts=16, num_local_experts=32).num_experts == 32


def test_every_model_of_the_tests_is_of_its_kind() -> None:
    """The options of the tests are really in transformers' models."""
    biased = make("llama tied biased")
    assert biased.model.layers[0].self_attn.o_proj.bias is not None
    assert make("qwen3_moe some layers").model.layers[3].mlp.__class__.__name__ == "Qwen3MoeMLP"
    assert make("neox in turn").config.rope_parameters["rope_type"] == "linear"
