"""From training to serving and to plain PEFT: the same adapters give the same probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_heal import ROLES, row
from tiny import save_tiny, tiny_model, tiny_tokenizer

from lragent.serve import Engine
from lragent.train.loop import train
from lragent.train.settings import TrainSettings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tiny(folder / "tiny")
    (folder / "d.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(8)))
    train(
        TrainSettings(
            data=folder / "d.jsonl",
            out=folder / "out",
            model=str(folder / "tiny"),
            dtype="float32",
            rank=4,
            lr=2e-2,
            max_steps=8,
            tokens_per_batch=300,
        )
    )
    return folder


@pytest.mark.parametrize("role", ROLES)
def test_a_peft_folder_gives_what_the_engine_gives_without_sharing(role: str, trained: Path) -> None:
    ids: list[int] = tiny_tokenizer()("and then the search goes on").input_ids
    model = str(trained / "tiny")
    with Engine(
        model, trained / "out" / "pack.safetensors", sharing="non_shared", dtype="float32", device="cpu"
    ) as engine:
        answer = engine.generate(role, ids, max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True)
        other = engine.generate("base", ids, max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True)
    plain = PeftModel.from_pretrained(tiny_model(), trained / "out" / "peft" / role).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*ids, *answer.token_ids]])).logits[0]
    probabilities = logits.log_softmax(-1)[len(ids) - 1 : -1]
    assert answer.token_ids == tuple(probabilities.argmax(-1).tolist())
    got = torch.tensor([entry.logprob for entry in answer.logprobs])
    torch.testing.assert_close(got, probabilities.max(-1).values, atol=2e-4, rtol=1e-3)
    assert [entry.logprob for entry in other.logprobs] != [entry.logprob for entry in answer.logprobs]
