"""GGUF files, read back by the package of llama.cpp's authors: every tensor and key, against transformers' own names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.interop.families import VOCAB, change_config, save
from tests.interop.test_export import EXPERTS, refusal, small, write_run
from tests.interop.test_tokens import change_json
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.gguf import export_gguf
from tinytron.interop.gguf import model as gguf_model
from tinytron.interop.gguf.model import architecture_for
from tinytron.interop.gguf.tokenizer import tokenizer_metadata
from tinytron.interop.importing import import_model
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.interop.weights import HFWeights
from tinytron.model.config import ModelConfig
from tinytron.text.run_tokenizer import TokenFacts

gguf = pytest.importorskip("gguf")
Array = npt.NDArray[np.float32]
BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
KNOWN = 37  # ids of the tokenizer; its models have VOCAB
# The architecture that llama.cpp has for a model of transformers.
MODELS = {
    "llama tied biased": "llama", "llama mha head_dim": "llama", "llama llama3": "llama", "llama yarn": "llama",
    "mistral no window": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "neox": "gptneox", "gpt2": "gpt2", "gpt2 untied": "gpt2",
}  # fmt: skip


def write_tokenizer(folder: Path, **more: Any) -> Path:
    """A byte-level BPE of ``KNOWN`` tokens: an end, a user's token, 30 letters, a hole at 33, a merge, and two more."""
    letters = {chr(ord("A") + number): 2 + number for number in range(30)}
    model = {"type": "BPE", "vocab": {**letters, "AB": 32, "ABC": 34}, "merges": [["A", "B"], ["AB", "C"]]}
    added = [(0, "<end>", True), (1, "<tool>", False), (35, "<pad>", True), (36, "<unk>", True)]
    content = {
        "model": model,
        "pre_tokenizer": BYTES,
        "added_tokens": [{"id": number, "content": text, "special": special} for number, text, special in added],
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | more))
    return folder / "tokenizer.json"


def imported(name: str, root: Path) -> tuple[Path, Path]:
    """A model of transformers with that tokenizer, and the folder of its import."""
    save(name, root / "hf", torch.float32)
    change_config(root / "hf", eos_token_id=0, bos_token_id=0, pad_token_id=None)
    write_tokenizer(root / "hf")
    import_model(str(root / "hf"), root / "own", torch.float32)
    return root / "hf", root / "own"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array], dict[str, str]]:
    """The keys, the tensors in fp32, and their types."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values, types = {}, {}
    for tensor in reader.tensors:
        types[tensor.name] = tensor.tensor_type.name
        made = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = made.reshape(tuple(int(size) for size in reversed(tensor.shape.tolist())))
    return keys, values, types


def theirs_in_order(folder: Path, arch: str) -> dict[str, Array]:
    """The tensors of transformers' model, by the names and in the order of llama.cpp, written out from its layout."""
    config, weights = json.loads((folder / "config.json").read_text()), HFWeights(folder)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), layers)
    found: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name in weights.shapes:
        values = weights.get(name).float().numpy()
        if ".experts." in name:
            before, _, rest = name.partition(".experts.")
            _, _, matrix = rest.partition(".")
            experts.setdefault(f"{before}.experts.{matrix}", []).append(values)
            continue
        found[names.get_name(name, (".weight", ".bias"))] = _ordered(name, values, config, arch)
    for name, matrices in experts.items():
        found[names.get_name(name, (".weight", ".bias"))] = np.stack(matrices)
    return found


def _ordered(name: str, values: Array, config: dict[str, Any], arch: str) -> Array:
    if arch == "gpt2" and values.ndim == 2 and ".h." in name:  # stored as [in, out]
        return values.T
    if arch == "gptneox" and "query_key_value" in name:  # head by head: its query, key and value
        heads = config["num_attention_heads"]
        parts = values.reshape(heads, 3, -1, *values.shape[1:])
        return np.concatenate([parts[:, kind].reshape(-1, *values.shape[1:]) for kind in range(3)])
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # a pair of rotary elements side by side
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        rows = [
            start + half * head // 2 + pair
            for start in range(0, len(values), head)
            for pair in range(head // 2)
            for half in range(2)
        ]
        return values[rows]
    return values


@pytest.mark.parametrize(("name", "arch"), MODELS.items())
def test_all_tensors_have_their_name_place_and_order(tmp_path: Path, name: str, arch: str) -> None:
    folder, own = imported(name, tmp_path)
    made = export_gguf(own, tmp_path / "model.gguf", "f32")
    keys, found, types = read(tmp_path / "model.gguf")
    assert made.architecture == keys["general.architecture"] == arch
    assert made.tensors == len(found)
    wanted = theirs_in_order(folder, arch)
    for tensor in ("token_embd.weight", "output.weight"):
        if tensor in wanted:
            wanted[tensor] = wanted[tensor][:KNOWN]
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (name == "llama llama3")
    assert found.keys() == wanted.keys()
    for tensor, values in wanted.items():
        assert np.array_equal(found[tensor], values), tensor
    assert set(types.values()) == {"F32"}
    check_keys(keys, json.loads((folder / "config.json").read_text()), arch)


def check_keys(keys: dict[str, Any], config: dict[str, Any], arch: str) -> None:
    def key(name: str) -> Any:
        return keys.get(f"{arch}.{name}")

    def theirs(*names: str) -> Any:
        return next(config[name] for name in names if name in config)

    heads = theirs("num_attention_heads", "n_head")
    width = theirs("hidden_size", "n_embd")
    assert key("block_count") == theirs("num_hidden_layers", "n_layer")
    assert key("embedding_length") == width
    assert key("context_length") == theirs("max_position_embeddings", "n_positions")
    assert key("attention.head_count") == heads
    assert key("attention.head_count_kv") == config.get("num_key_value_heads", heads)
    head = config.get("head_dim") or width // heads
    assert key("attention.key_length") == key("attention.value_length") == head
    norm = "layer_norm_epsilon" if arch in ("gpt2", "gptneox") else "layer_norm_rms_epsilon"
    eps = theirs("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    assert key(f"attention.{norm}") == pytest.approx(eps, rel=1e-6)
    assert key("vocab_size") == len(keys["tokenizer.ggml.tokens"]) == KNOWN
    if arch != "gpt2":
        rope = config["rope_parameters"]
        assert key("rope.freq_base") == rope["rope_theta"]
        assert key("rope.dimension_count") == head * rope.get("partial_rotary_factor", 1)
        kind = rope["rope_type"] if rope["rope_type"] in ("linear", "yarn") else None
        assert (key("rope.scaling.type"), key("rope.scaling.factor")) == (kind, rope.get("factor") if kind else None)
        assert key("rope.scaling.original_context_length") == (24 if kind == "yarn" else None)
    if experts := config.get("num_local_experts", config.get("num_experts")):
        assert (key("expert_count"), key("expert_used_count")) == (experts, config["num_experts_per_tok"])
    if arch == "qwen3moe":
        assert key("expert_feed_forward_length") == config["moe_intermediate_size"]
    else:
        assert key("feed_forward_length") == (config.get("intermediate_size") or config.get("n_inner") or 4 * width)
    assert key("use_parallel_residual") == (config["use_parallel_residual"] if arch == "gptneox" else None)


def test_the_factors_of_llama_3_are_those_of_its_frequencies(tmp_path: Path) -> None:
    """By the definition: pairs that turn often stay, those that turn rarely are slowed down by the whole factor."""
    transformers = pytest.importorskip("transformers")
    folder, own = imported("llama llama3", tmp_path)
    export_gguf(own, tmp_path / "model.gguf", "f32")
    factors = read(tmp_path / "model.gguf")[1]["rope_freqs.weight"]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.AutoConfig.from_pretrained(folder), "cpu")
    plain = 500.0 ** (-np.arange(0, 4, 2) / 4)
    assert factors == pytest.approx(plain / frequencies.numpy(), rel=1e-5)
    assert factors.max() > 1.5


# Types.


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A run whose rows are whole blocks of q8_0, except those of the feed-forward's way down."""
    model = small(hidden_size=64, intermediate_size=40, qk_norm=True, **EXPERTS)
    run = write_run(tmp_path / "run", model)
    write_tokenizer(run)
    (run / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    return run


@pytest.mark.parametrize(
    ("kind", "type_", "tolerance", "number"),
    [("f16", "F16", 2**-11, 1), ("bf16", "BF16", 2**-8, 32), ("q8_0", "Q8_0", 1 / 254, 7)],
)
def test_types_of_weights(wide: Path, tmp_path: Path, kind: str, type_: str, tolerance: float, number: int) -> None:
    """Norms and routers are fp32 in all of them; rows that are not whole blocks are fp16."""
    for made in (kind, "f32"):
        export_gguf(wide, tmp_path / f"{made}.gguf", made, tokenizer=wide)
    keys, found, types = read(tmp_path / f"{kind}.gguf")
    _, exact, _ = read(tmp_path / "f32.gguf")
    assert keys["general.file_type"] == number
    assert found.keys() == exact.keys()
    for name, values in exact.items():
        full = "norm" in name or "ffn_gate_inp" in name
        wanted = "F32" if full else ("F16" if kind == "q8_0" and "ffn_down" in name else type_)
        assert types[name] == wanted, name
        if full:
            assert np.array_equal(found[name], values)
            continue
        scale = np.abs(values) if kind != "q8_0" else np.abs(values).max()  # a block's largest number is at most that
        assert (np.abs(found[name] - values) <= tolerance * scale * 1.01 + 1e-7).all(), name
        assert not np.array_equal(found[name], values)
    assert types["blk.0.ffn_gate_exps.weight"] == type_
    assert exact["blk.0.ffn_gate_exps.weight"].shape == (4, 8, 64)
    assert (tmp_path / f"{kind}.gguf").stat().st_size < 0.8 * (tmp_path / "f32.gguf").stat().st_size


# The tokenizer.

FACTS: list[tuple[TokenFacts, dict[str, Any]]] = [
    (TokenFacts((0,), True, 0), {"eos": 0, "bos": 0, "add": True}),
    (TokenFacts((0,), False), {"eos": 0, "bos": 0, "add": False}),
    (TokenFacts((0,), False, begin=36), {"eos": 0, "bos": 36, "add": False}),
    (
        TokenFacts((0, 36, 35), False, begin=0, pad=1, first=36),
        {"eos": 0, "eot": 36, "eom": 35, "bos": 36, "add": True},
    ),
]


@pytest.mark.parametrize(("facts", "wanted"), FACTS)
def test_texts_begin_and_end_as_in_training(tmp_path: Path, facts: TokenFacts, wanted: dict[str, Any]) -> None:
    files = (write_tokenizer(tmp_path),)
    keys = tokenizer_metadata(TokenizerFiles(files, facts), VOCAB)
    ids = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom", "bos")}
    assert ids == {"eot": None, "eom": None} | {name: number for name, number in wanted.items() if name != "add"}
    assert keys["tokenizer.ggml.add_bos_token"] == wanted["add"]
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys.get("tokenizer.ggml.padding_token_id") == facts.pad


def test_tokens_merges_types_and_templates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", small())
    write_tokenizer(run)
    config: dict[str, Any] = {"eos_token": "<end>", "pad_token": {"content": "<pad>"}, "unk_token": "<unk>"}
    config["chat_template"] = [{"name": "tools", "template": "T"}, {"name": "default", "template": "{{ messages }}"}]
    (run / "tokenizer_config.json").write_text(json.dumps(config))
    made = export_gguf(run, tmp_path / "model.gguf", "f32", tokenizer=run)
    assert made.left_out == VOCAB - KNOWN
    keys, values, _ = read(tmp_path / "model.gguf")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert (tokens[0], tokens[1], tokens[2], tokens[32:]) == (
        "<end>", "<tool>", "A", ["AB", "[UNUSED33]", "ABC", "<pad>", "<unk>"],
    )  # fmt: skip
    kinds = gguf.TokenType
    assert types[:3] == [kinds.CONTROL, kinds.USER_DEFINED, kinds.NORMAL]
    assert types[32:] == [kinds.NORMAL, kinds.UNUSED, kinds.NORMAL, kinds.CONTROL, kinds.CONTROL]
    assert keys["tokenizer.ggml.merges"] == ["A B", "AB C"]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (keys["tokenizer.ggml.padding_token_id"], keys["tokenizer.ggml.unknown_token_id"]) == (35, 36)
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert values["token_embd.weight"].shape == (KNOWN, 16)
    (run / "chat_template.jinja").write_text("file")
    export_gguf(run, tmp_path / "other.gguf", "f32", tokenizer=run)
    assert read(tmp_path / "other.gguf")[0]["tokenizer.chat_template"] == "file"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PLAIN = BYTES | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


SPLITS: list[tuple[dict[str, Any], bool, str]] = [
    ({}, False, "gpt-2"),
    (sequence(BYTES), False, "gpt-2"),
    (sequence(DIGITS, BYTES), False, "starcoder"),
    (sequence(split(LLAMA3), PLAIN), True, "llama-bpe"),
    (sequence(split(LLAMA3), PLAIN), False, "dbrx"),
    (sequence(split(QWEN2), PLAIN) | {"normalizer": {"type": "NFC"}}, False, "qwen2"),
]


def facts_with(path: Path) -> TokenizerFiles:
    return TokenizerFiles((path,), TokenFacts((0,)))


@pytest.mark.parametrize(("content", "whole", "name"), SPLITS)
def test_how_texts_are_split_has_a_name(tmp_path: Path, content: dict[str, Any], whole: bool, name: str) -> None:
    path = write_tokenizer(tmp_path, **content)
    change_json(path, model=json.loads(path.read_text())["model"] | {"ignore_merges": whole})
    assert tokenizer_metadata(facts_with(path), VOCAB)["tokenizer.ggml.pre"] == name


KNOWS = "supports ByteLevel alone, after Digits, or after the pattern of Llama 3 or Qwen 2"
REFUSED: list[tuple[dict[str, Any], str]] = [
    (sequence(split("x+"), PLAIN), f"the pre-tokenizer x+ and ByteLevel, but llama.cpp {KNOWS}"),
    (sequence(DIGITS, DIGITS, BYTES), f"the pre-tokenizer Digits and Digits and ByteLevel, but llama.cpp {KNOWS}"),
    (sequence(DIGITS | {"individual_digits": False}, BYTES), "the pre-tokenizer Digits and ByteLevel"),
    (sequence(split(LLAMA3), BYTES), "the pre-tokenizer (?i:"),
    (sequence(split(LLAMA3) | {"invert": True}, PLAIN), "the pre-tokenizer (?i:"),
    ({"pre_tokenizer": PLAIN}, "the pre-tokenizer ByteLevel, but"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, f"the pre-tokenizer Metaspace, but llama.cpp {KNOWS}"),
    ({"pre_tokenizer": None}, "the pre-tokenizer None"),
    (
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        "add_prefix_space, but llama.cpp puts no space before a text",
    ),
    ({"normalizer": {"type": "Lowercase"}}, "the normalizer Lowercase, but llama.cpp has no normalizers"),
    (
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
        "the model Unigram, but llama.cpp gets only byte-level BPE",
    ),
    (
        {"model": {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": True}},
        "byte_fallback, but llama.cpp gets only byte-level",
    ),
]


@pytest.mark.parametrize(("content", "text"), REFUSED)
def test_what_llama_cpp_cannot_split_is_refused(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    path = write_tokenizer(tmp_path, **content)
    with pytest.raises(ConfigError) as caught:
        tokenizer_metadata(facts_with(path), VOCAB)
    assert str(caught.value).startswith(f"--gguf: {path} has {text}")
    assert str(caught.value).endswith("; use another tokenizer")


def test_a_tokenizer_is_needed_and_an_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--gguf needs a tokenizer.json, but found none; use --tokenizer path/to/"):
        tokenizer_metadata(TokenizerFiles(()), VOCAB)
    path = write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"no token is known that ends a text, and llama.cpp would use id 11; use"):
        tokenizer_metadata(TokenizerFiles((path,)), VOCAB)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json cannot be read \(KeyError: 'model'\); use a tokenizer.json"):
        tokenizer_metadata(TokenizerFiles((path,), TokenFacts((0,))), VOCAB)


# Options that llama.cpp lacks.

SIZES: dict[str, Any] = {
    "block_size": 32, "vocab_size": 41, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 16, "intermediate_size": 20,
}  # fmt: skip
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_scaling_factor": 2.0, "rope_original_block_size": 16}
LLAMA3_SCALING = YARN | {"rope_scaling": "llama3"}
LACKING: list[tuple[str, dict[str, Any], str]] = [
    (
        "mistral",
        {"sliding_window": 5},
        "--sliding_window 5, but llama.cpp's llama supports no window below --block_size 32",
    ),
    (
        "qwen3",
        {"sliding_window": 31, "sliding_window_layers": (1,)},
        "--sliding_window 31, but llama.cpp's qwen3 supports no",
    ),
    ("qwen2", LLAMA3_SCALING, "--rope_scaling llama3, but llama.cpp's qwen2 supports none, linear and yarn"),
    ("llama", YARN | {"rope_beta_fast": 8.0}, "--rope_beta_fast 8.0, but llama.cpp's llama supports only 32.0"),
    ("llama", YARN | {"rope_beta_slow": 2.0}, "--rope_beta_slow 2.0, but llama.cpp's llama supports only 1.0"),
    (
        "llama",
        YARN | {"rope_attention_factor": 1.5},
        "--rope_attention_factor 1.5, but llama.cpp's llama supports only its default",
    ),
    (
        "qwen2",
        {"head_dim": 6},
        "--head_dim 6 of 4 heads, but llama.cpp's qwen2 needs heads whose widths add up to --hidden_size 16",
    ),
    ("qwen3", {"attention_bias": True}, "--attention_bias, but llama.cpp's qwen3 has no biases"),
    ("qwen3_moe", EXPERTS | {"attention_bias": True}, "--attention_bias, but llama.cpp's qwen3moe has no biases"),
    (
        "qwen3_moe",
        EXPERTS | {"norm_topk_prob": False},
        "--no-norm_topk_prob, but llama.cpp's qwen3moe always divides the chosen",
    ),
    (
        "qwen3_moe",
        EXPERTS | {"first_k_dense": 1},
        "layer 0 has no experts, but llama.cpp's qwen3moe needs experts in every",
    ),
    ("gpt_neox", {"qkv_bias": True}, "--no-attention_bias, but llama.cpp's gptneox needs biases in all projections"),
]


@pytest.mark.parametrize(("family", "options", "text"), LACKING)
def test_what_llama_cpp_lacks_is_named(family: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"^.+; export a Hugging Face folder instead$") as caught:
        architecture_for(family, ModelConfig(**SIZES | options))
    assert str(caught.value).startswith(f"--gguf: {text}")


def test_windows_that_are_no_windows_are_fine() -> None:
    """No token of a sequence is outside of one that is as long as the longest sequence."""
    assert architecture_for("mistral", ModelConfig(**SIZES | {"sliding_window": 32})).name == "llama"
    assert architecture_for("llama", ModelConfig(**SIZES | LLAMA3_SCALING)).name == "llama"
    assert architecture_for("qwen3", ModelConfig(**SIZES | YARN)).name == "qwen3"


def test_a_family_that_llama_cpp_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gguf_model.ARCHITECTURES, "qwen2")
    with pytest.raises(
        ConfigError, match=r"^--gguf: llama.cpp does not support the family qwen2; supported are llama, mistral, .+"
    ):
        architecture_for("qwen2", ModelConfig(**SIZES))


# The command line.


def test_the_command_writes_one_file(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(wide), "--out", str(tmp_path / "new" / "model.gguf"), "--tokenizer", str(wide)]
    assert main(["export", *words, "--gguf", "q8_0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "new" / "model.gguf").stat().st_size
    assert lines == [
        f"wrote {tmp_path}/new/model.gguf: qwen3moe, 26 tensors in q8_0, {size:,} bytes",
        "generation stops at <end> (0); 4 rows without a token are left out",
    ]
    assert read(tmp_path / "new" / "model.gguf")[0]["general.name"] == "model"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]


def test_errors_are_one_line_and_leave_nothing(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.gguf"

    def error(kind: str, *more: object) -> str:
        words = ("export", "--checkpoint", wide, "--out", out, "--tokenizer", wide, "--gguf", kind)
        return refusal(*words, *more, capsys=capsys)

    text = "error: --dtype applies to folders, but --gguf f16 writes one file; drop one of the two"
    assert error("f16", "--dtype", "bf16") == text
    assert error("f16", "--max_shard_size", "5GB") == text.replace("dtype", "max_shard_size")
    assert error("q4_0").startswith("error: argument --gguf: invalid choice: 'q4_0'")
    out.touch()
    assert error("f16") == f"error: --out {out} already exists; use another name, or remove it"
    out.unlink()
    weights = torch.load(wide / "00000_model.pt")
    weights["blocks.1.attn.out_proj.weight"][0, 0] = -1e6
    torch.save(weights, wide / "00000_model.pt")
    text = "error: --gguf f16 has a maximum of 65504, but blk.1.attn_output.weight contains 1e+06; use --gguf bf16"
    assert error("f16") == text
    assert error("q8_0") == text.replace("f16 has", "q8_0 has")
    weights["final_norm.weight"][0] = float("nan")
    torch.save(weights, wide / "00000_model.pt")
    with pytest.raises(CheckpointError, match=r"output_norm.weight has NaN or infinite weights"):
        export_gguf(wide, out, "bf16", tokenizer=wide)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert error("f16").startswith("error: the package gguf is needed (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
