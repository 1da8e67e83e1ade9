"""From texts to a model with preferences by jobs: pairs are tokenized, and DPO starts from another job's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.corpus import make_texts, make_tokenizer
from tests.helpers.runs import losses, read_logs
from tinytron.errors import TinytronError
from tinytron.quick import quick

pytest.importorskip("tokenizers")
ROW = 16
SIZES = {
    **{"train.precision": "fp32", "train.batch_size": 2, "train.max_steps": 3, "logging.log_every": 1},
    **{"model.num_layer": 1, "architecture.n_head": 2, "model.hidden_size": 16, "model.intermediate_size": 24},
    **{"model.vocab_size": 512, "optim.max_lr": 0.01, "optim.warmup_steps": 0},
}


def _words(options: dict[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


def test_pairs_train_a_model_of_another_job(tmp_path: Path) -> None:
    texts = make_texts(40)
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    rows = [{"prompt": text[:9], "chosen": text[:30], "rejected": text[30::-1]} for text in texts if text.strip()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out")
    with quick("data/tokenize_contrastive_dataset", out, "tok") as j:
        given = {"data.name": tmp_path / "pairs.jsonl", "data.prompt_key": "prompt", "data.val_pct": 0.2}
        tokenizing = {"tokenizer.backend": "file", "tokenizer.name": tokenizer, "system.num_proc": 1}
        j.options.override(_words({**given, **tokenizing, "architecture.block_size": ROW}))
        j()
    with quick("gpt/train/pretrain", out, "first") as j:
        j.options.override(_words({**SIZES, "train.seq_len": 32, "train.total_batch_size": 128}))
        j()
    sizes = {"train.seq_len": 2 * (ROW - 1), "train.total_batch_size": 4 * 2 * (ROW - 1), "train.do_val": True}
    from_first = {name: v for name, v in SIZES.items() if not name.startswith(("model.", "architecture."))}
    with quick("gpt/train/contrastive", out, "dpo") as j:
        j.options.override(_words({**from_first, **sizes, "optimization.dpo.beta": 0.5}))
        j.config.training.dataset = [{"name": "pairs", "rate": 1.0, "style": "CONTRASTIVE"}]
        j.restore("first/final")
        j()
    (folder,) = (tmp_path / "out/checkpoints/general/default/dpo").glob("dpo_*")
    log, records = read_logs(folder)
    assert losses(log)[1] == pytest.approx(0.6931472, rel=1e-5)
    assert losses(log)[3] < losses(log)[1]
    assert losses(log, "val")
    assert records[-1].keys() >= {"rewards/accuracy", "logps/chosen"}
    with quick("gpt/train/pretrain", out, "refused") as j:
        j.options.override(_words({**SIZES, **sizes, "data.dataset_path": tmp_path / "out/data/pairs"}))
        with pytest.raises(TinytronError, match="pairs"):
            j()
