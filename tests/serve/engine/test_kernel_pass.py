"""The engine as it runs on a GPU, against the engine in plain torch; on a CPU the kernels' torch forms stand in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engines import KERNEL_WAYS, ROLES, WAYS, Recorder, drive, tiny_engine
from reference import reference_logits
from tiny import make_adapter_set, tiny_model
from tolerances import MODEL_TOLERANCES, assert_close

from lragent.kernels.low_rank import role_up_reference
from lragent.modes import SharingMode
from lragent.role_linear import RoleLinear
from lragent.routing import Route, Router
from lragent.serve.engine.kernel_pass import KernelAttention, KernelPass
from lragent.serve.engine.step import SHORT, Step
from lragent.serve.engine.step_tensors import StepTensors

TARGETS = {
    "q_v": ("q_proj", "v_proj"),
    "q_k_v": ("q_proj", "k_proj", "v_proj"),
    "q_only": ("q_proj",),
    "v_and_mlp": ("v_proj", "up_proj", "down_proj"),
}
each_way = pytest.mark.parametrize("way", KERNEL_WAYS)
each_mode = pytest.mark.parametrize("mode", list(SharingMode))


def assert_kernels(recorder: Recorder) -> None:
    made = recorder.engine._runner.attention
    assert made.__class__.__name__ == "KernelAttention", "the engine did not use the kernels"


@each_way
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@each_mode
def test_logits_equal_the_reference(mode: SharingMode, targets: tuple[str, ...], way: str) -> None:
    """Role switches, LR prefills, and prompts cut into pieces of several roles."""
    model = tiny_model()
    adapters = make_adapter_set(model, ROLES, targets=targets)
    for recorder, _, role, ids, writers, got in drive(mode, adapters, token_budget=9, **WAYS[way]):
        assert_kernels(recorder)
        if mode is SharingMode.NON_SHARED:
            writers = [role] * len(ids)
        expected = reference_logits(model, adapters, ids, writers, mode)
        torch.testing.assert_close(got.cpu(), expected[-len(got) :], **MODEL_TOLERANCES[torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the tests above run the kernels")
@pytest.mark.parametrize("by_kernels", ["split", "prefill"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("mode", ["base_shared", "base_lr_shared"])
def test_the_kernels_in_tritons_interpreter_equal_plain_torch(mode: str, family: str, by_kernels: str) -> None:
    targets = TARGETS["q_v" if family == "gemma2" else "q_k_v"]
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=targets)
    options: dict[str, Any] = {"model_options": {"family": family}, "token_budget": 9}
    shared = list(range(20, 33))
    writers = ["base"] * 5 + ["plan"] * 3 + ["action"] * 5
    logits = []
    for way in (None, by_kernels):
        recorder = Recorder(tiny_engine(mode, adapters, by_kernels=way, **options))
        recorder.submit("plan", [*shared, 5, 6], 3, position_roles=[*writers, "plan", "plan"])
        recorder.submit("action", [*shared, 9], 3, position_roles=[*writers, "action"])
        recorder.finish()
        recorder.ask("reflect", [*shared, 5, 6, 7], 2, position_roles=[*writers, "plan", "plan", "reflect"])
        logits.append(torch.cat([torch.stack(rows) for rows in recorder.logits.values()]))
    torch.testing.assert_close(logits[1], logits[0], **MODEL_TOLERANCES[torch.float32])


@each_way
@pytest.mark.parametrize("mode", ["base_shared", "base_lr_shared"])
def test_layers_without_adapters_and_of_other_ranks(mode: str, way: str) -> None:
    """What is divided for one layer must not be used for another whose tiles differ."""
    model = tiny_model(num_hidden_layers=3)
    whole = make_adapter_set(model, ROLES, targets=TARGETS["q_k_v"])
    left_out = ("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj", "layers.2.self_attn.k_proj")
    kept = [path for path in whole.module_paths if not path.endswith(left_out)]
    adapters = dataclasses.replace(
        whole,
        shared_a={path: whole.shared_a[path] for path in kept},
        role_b={path: whole.role_b[path] for path in kept},
    )
    options = {"steps": 3, "model_options": {"num_hidden_layers": 3}, **WAYS[way]}
    for _, _, _, ids, writers, got in drive(SharingMode(mode), adapters, **options):
        expected = reference_logits(model, adapters, ids, writers, mode)  # type: ignore[arg-type]
        torch.testing.assert_close(got.cpu(), expected[-len(got) :], **MODEL_TOLERANCES[torch.float32])


def side_by_side(
    mode: SharingMode, said: list[list[int]] | None = None, family: str = "llama", **options: Any
) -> Recorder:
    """Seven requests at once that share prefixes, with too few slots for all. said: answers to be given, by request."""
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=TARGETS["q_k_v"])
    options |= {"cache_tokens": 110, "max_model_len": 90, "token_budget": 16, "model_options": {"family": family}}
    recorder = Recorder(tiny_engine(mode, adapters, **options))
    random = torch.Generator().manual_seed(7)
    shared, *own = (torch.randint(3, 280, (n,), generator=random).tolist() for n in (17, 3, 9, 1, 14, 6, 2, 11))
    for i, ids in enumerate(own):
        role = (*ROLES, "base")[i % 4]
        writers = [("base", *ROLES)[at // 3 % 4] for at in range(len(shared))] + [role] * len(ids)
        name = recorder.submit(role, shared + ids, 16, position_roles=writers)
        if said is not None:
            recorder.forced[name] = iter(said[i])
    recorder.finish()
    assert recorder.engine.stats().preempted > 0
    return recorder


@each_way
@each_mode
def test_side_by_side_with_preemption_equals_plain_torch(mode: SharingMode, way: str) -> None:
    expected, got = side_by_side(mode), side_by_side(mode, **WAYS[way])
    assert_kernels(got)
    for name, logits in expected.logits.items():
        assert got.answer(name).token_ids == expected.answer(name).token_ids
        torch.testing.assert_close(
            torch.stack(got.logits[name]).cpu(), torch.stack(logits), **MODEL_TOLERANCES[torch.float32]
        )


@each_way
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@each_mode
def test_bfloat16_is_as_near_to_float32_as_plain_torch(mode: SharingMode, family: str, way: str) -> None:
    exact = side_by_side(mode, family=family)
    said = [list(exact.answer(name).token_ids) for name in exact.chunks]
    plain, got = (side_by_side(mode, said, family, dtype=torch.bfloat16, **options) for options in ({}, WAYS[way]))
    assert_kernels(got)
    wanted, theirs, mine = (torch.cat([torch.stack(r.logits[n]) for n in r.chunks]).cpu() for r in (exact, plain, got))
    off, plain_off = (float((logits - wanted).norm() / wanted.norm()) for logits in (mine.float(), theirs.float()))
    assert off < min(1.2 * plain_off, MODEL_TOLERANCES[torch.bfloat16]["rtol"]), plain_off


@pytest.mark.parametrize("apart", [False, True], ids=["beside", "apart"])
def test_what_a_step_hands_to_the_kernels(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of where everything lies, long pieces apart from short ones, and nothing written that exists."""
    of_step = KernelAttention.of_step
    seen: list[tuple[int, int, int]] = []

    def checked(self: KernelAttention, step: Step, tensors: StepTensors, route: Route) -> KernelPass:
        made = of_step(self, step, tensors, route)
        assert (self.tables.base is self.tables.low) != apart
        unwritten = spans = 0
        for at, piece in enumerate(step.pieces):
            lease, row = piece.sequence.held, piece.sequence.row
            new = slice(int(step.query_start[at]), int(step.query_start[at + 1]))
            assert self.tables.base[row, : piece.end].tolist() == lease.base_slots[: piece.end].tolist()
            low = lease.lr_slots if apart else lease.base_slots
            assert self.tables.low[row, : piece.end].tolist() == low[: piece.end].tolist()
            assert tensors.positions[new].tolist() == list(range(piece.start, piece.end))
            assert tensors.low_slots[new].tolist() == low[piece.start : piece.end].tolist()
            for position, slot in zip(range(piece.start, piece.end), tensors.base_slots[new].tolist(), strict=True):
                assert slot == (-1 if position < lease.base_reused else lease.base_slots[position])
                unwritten += slot == -1
        assert (tensors.base_slots[: step.base_from] == -1).all()
        assert made.groups[0].start == 0
        assert made.groups[-1].end == len(step.tokens)
        for group in made.groups:
            batch = group.batch
            assert (batch.spans is not None) == (batch.most_new > SHORT)
            assert batch.query_start.tolist()[0] == 0
            assert batch.query_start.tolist()[-1] == len(batch.roles) == group.end - group.start
            if batch.spans is not None:
                assert batch.roles.tolist() == [span.role for span in batch.spans for _ in range(span.start, span.end)]
                spans += len(batch.spans)
        seen.append((len(made.groups), unwritten, spans))
        return made

    monkeypatch.setattr(KernelAttention, "of_step", checked)
    mode = SharingMode.BASE_SHARED if apart else SharingMode.BASE_LR_SHARED
    recorder = Recorder(tiny_engine(mode, by_kernels="torch", token_budget=64))
    first, second = list(range(20, 50)), list(range(60, 85))
    speakers = ["base"] * 10 + ["plan"] * 15
    recorder.ask("plan", first, 3, position_roles=[*speakers, *["action"] * 5])
    recorder.submit("action", [*first, 7, 8, 9], 6, position_roles=[*speakers, *["action"] * 8])
    recorder.engine.step()
    recorder.submit("reflect", second, 2, position_roles=speakers)
    recorder.finish()
    assert {groups for groups, _, _ in seen} == {1, 2}
    assert any(unwritten for _, unwritten, _ in seen) == apart
    assert any(spans > 1 for _, _, spans in seen) != apart


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 400])
def test_mixed_roles_of_a_projection_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    roles = torch.randint(0, 4, (tokens,)).tolist()
    base = torch.nn.Linear(32, 48).to(dtype)
    down, up, hidden = torch.randn(4, 32) / 6, torch.randn(3, 4, 48) / 2, torch.randn(1, tokens, 32)
    down, up, hidden = (tensor.to(dtype) for tensor in (down, up, hidden))
    router = Router()
    expected = base(hidden)[0].float() + role_up_reference(hidden[0] @ down.T, up, torch.tensor(roles))
    projection = RoleLinear(base, "q_proj", down, up, router).to("cuda")
    with router.use(Route.of(roles, "cuda")):
        with torch.inference_mode():
            assert_close(projection(hidden.cuda())[0].cpu(), expected.detach(), dtype)
        learning = hidden.cuda().requires_grad_()
        out = projection(learning)  # not in place: gradients are needed
        assert_close(out[0].detach().cpu(), expected.detach(), dtype)
        out.sum().backward()
        assert learning.grad is not None
