"""Ways to train the roles of a team, so that what each gives and costs can be compared."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed

from lragent.adapter_set import AdapterSet, RoleSpec
from lragent.attention import ATTENTION, register_attention
from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.eval.agent import ROLES
from lragent.eval.heal import heal_adapters
from lragent.models import load_model, load_tokenizer, resolve_model
from lragent.pack import read_pack, write_pack
from lragent.stacking import stack
from lragent.tied_lora import build_role_model
from lragent.train.data import Example, RoleViews
from lragent.train.distributed import matrices
from lragent.train.examples import load_examples
from lragent.train.loop import DTYPES, fit, train
from lragent.train.settings import TrainSettings
from lragent.train.tasks import Tasks

REGIMES = {
    "per_role": "each role on contexts of its own, one A learnt by all",
    "shared": "on a cache that others wrote, one A learnt by all",
    "mixed": "half as `shared`, half as `per_role`, one A learnt by all",
    "sequential": "as `per_role`, but A learnt by the first role alone",
    "apart": "each role by itself, its A its own (untied); then stacked in one pack",
    "healed": "`apart`, trained on for a little as `shared`",
}
"""By name, for people. `healed` goes on from `apart`."""

FOR_SHARING = ("shared", "mixed", "healed")
"""Those that learn to read a cache that other roles wrote."""


@dataclass(frozen=True)
class Training:
    """What all regimes have in common. Batches are of one step."""

    model: str | None = None
    """Hub id, folder or GGUF file; None = the embedded model."""
    dtype: Literal["bf16", "float32"] = "bf16"
    rank: int = 8
    epochs: int = 3
    """Of each regime; healing has one at most."""
    equal_tokens: bool = False
    """Give `shared` and `mixed` as many steps as `per_role` takes for its epochs. As batches are of like size, all
    regimes then learn from as many tokens, which cost as much time."""
    tokens_per_batch: int = 4_096
    lr: float = 2e-3
    heal_lr: float = 1e-3
    heal_share: float = 0.09
    """Of the tokens that the roles were trained on apart: what healing may learn from."""
    heal_held_out: int | None = None
    """Trajectories that are kept out of healing, to tell when it is done; None = a tenth."""

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        for name in ("rank", "epochs", "tokens_per_batch", "heal_held_out"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: must be at least 1, not {value}.")
        for name in ("lr", "heal_lr", "heal_share"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: must be above 0, not {getattr(self, name)}.")

    def held_out_of(self, trajectories: int) -> int:
        """How many of so many are kept out of healing."""
        return trajectories // 10 if self.heal_held_out is None else self.heal_held_out

    def check_healing(self, trajectories: int) -> None:
        """Raises UserError where of so many trajectories none are left to heal with, or to tell when it is done."""
        if not 1 <= self.held_out_of(trajectories) < trajectories:
            raise UserError(
                f"training.heal_held_out: {self.held_out_of(trajectories)} of {trajectories} trajectories (`train`) "
                "would be kept out of healing; keep at least one, and not all."
            )


class Teacher:
    """One seed's data, and the roles trained on it in different ways."""

    def __init__(self, training: Training, data: Path, seed: int, folder: Path) -> None:
        """data: trajectories, JSONL. folder: where runs are kept while they last, and what others go on from."""
        self.training, self.data, self.seed, self.folder = training, data, seed, folder
        self.source = resolve_model(training.model)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.renderer = Renderer(load_tokenizer(self.source))
        self.examples = self.load(data)
        register_attention()

    def load(self, path: Path) -> list[Example]:
        """Trajectories as every objective needs them."""
        return list(load_examples(path, self.renderer, ROLES, objective="mixed", prefix_writer="base"))

    def train(self, regime: str, pack: Path) -> dict[str, Any]:
        """Train one regime and write its pack; returns how many `tokens` and `steps` it took, and `seconds`."""
        began = time.monotonic()
        adapters, facts = {
            "per_role": lambda: self._trained("per_role"),
            "shared": lambda: self._trained("shared"),
            "mixed": lambda: self._trained("mixed"),
            "sequential": lambda: self._trained("per_role", tying="sequential"),
            "apart": self._apart,
            "healed": self._healed,
        }[regime]()
        write_pack(pack, adapters)
        return facts | {"seconds": round(time.monotonic() - began, 1)}

    def _settings(self, objective: str, **more: Any) -> TrainSettings:
        plan = self.training
        steps = None
        if plan.equal_tokens and objective in ("shared", "mixed"):
            alike = Tasks(
                "per_role", self.examples, tokens_per_batch=plan.tokens_per_batch, batches_per_step=1, seed=self.seed
            )
            steps = alike.steps(plan.epochs)
        return TrainSettings(
            data=self.data, out=self.folder / f"run-{objective}-{more.get('tying', 'joint')}", model=plan.model,
            dtype=plan.dtype, rank=plan.rank, alpha=2.0 * plan.rank, dropout=0.0, epochs=plan.epochs, max_steps=steps,
            lr=plan.lr, tokens_per_batch=plan.tokens_per_batch, seed=self.seed, compile=False,
            **({"objective": objective, "roles": ROLES} | more),
        )  # fmt: skip

    def _trained(self, objective: str, **more: Any) -> tuple[AdapterSet, dict[str, Any]]:
        settings = self._settings(objective, **more)
        shutil.rmtree(settings.out, ignore_errors=True)  # of one that ended just before its pack was taken
        summary = train(settings, resume=True)
        assert summary is not None, "there is one process"
        adapters = read_pack(Path(summary["pack"]))
        shutil.rmtree(summary["out"])
        return adapters, {"tokens": summary["tokens"], "steps": summary["steps"]}

    def _apart(self) -> tuple[AdapterSet, dict[str, Any]]:
        """Every role by itself on its own turns, as PEFT's users do, with an A of its own."""
        singles, tokens, steps = [], 0, 0
        rank = self.training.rank
        for number, role in enumerate(ROLES, start=1):
            set_seed(1_000 * self.seed + number)
            model = load_model(self.source, DTYPES[self.training.dtype], self.device, ATTENTION)
            built = build_role_model(model, [role], rank=rank, alpha=2.0 * rank)
            views = [_as_first(view) for view in RoleViews(self.examples, {number})]
            done = fit(self._settings("per_role", roles=(role,)), built, views)
            shared_a, role_b = matrices(built, done.weights)
            singles.append(
                AdapterSet(
                    base_model=self.source.name,
                    base_fingerprint=self.source.fingerprint(),
                    form="tied",
                    targets=built.targets,
                    roles=(RoleSpec(role, 2.0 * rank, rank),),
                    shared_a=shared_a,
                    role_b=role_b,
                )
            )
            tokens, steps = tokens + done.result.tokens, steps + done.result.steps
        return stack(singles), {"tokens": tokens, "steps": steps}

    def _healed(self) -> tuple[AdapterSet, dict[str, Any]]:
        """Until the gap is closed on training data that is kept out for that, or healing's share of the tokens that
        the roles were trained on is used up. Goes on from `apart.safetensors` in the folder, which it makes if needed.
        """
        apart = self.folder / "apart.safetensors"
        if not apart.is_file():
            self.train("apart", apart)
        plan = self.training
        kept = plan.held_out_of(len(self.examples))
        model = load_model(self.source, DTYPES[plan.dtype], self.device, ATTENTION)
        trained = plan.epochs * sum(RoleViews(self.examples).lengths)
        healed = heal_adapters(
            read_pack(apart), model, self.examples[kept:], self.examples[:kept], tolerance=0.25, epochs=1,
            lr=plan.heal_lr, tokens_per_batch=plan.tokens_per_batch, seed=self.seed,
            max_tokens=int(plan.heal_share * trained),
        )  # fmt: skip
        return healed.adapters, {"tokens": healed.tokens, "steps": healed.steps, "closed": healed.closed}


def _as_first(view: Example) -> Example:
    """A role's view as the first role's of a team of one."""
    return dataclasses.replace(view, authors=view.authors.clamp(max=1), roles=view.roles.clamp(max=1))
