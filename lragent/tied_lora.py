"""Training's projections: PEFT's LoRA layers, one adapter per role, with one and the same `A` under every role's name.

PEFT makes the adapters (its config, its injection, its initialisation) and everything that reads PEFT models still
works on them. Tying is by module: `lora_A[role]` is the same `nn.Linear` for every role, so there is one parameter,
which the optimizer meets once. Which role's `B` applies is said by the router, per token, and not by PEFT's active
adapter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lragent.adapter_set import TARGETS, AdapterSet, RoleSpec, check_role_name
from lragent.errors import LRAgentError, UserError
from lragent.kernels.low_rank import role_up
from lragent.key_norm import key_norm, unsupported_key_norm
from lragent.models import check_adaptable, target_modules
from lragent.routing import LeftForAttention, Router
from lragent.stacking import as_tied


class TiedLoraLinear(LeftForAttention, LoraLinear):
    """`W x + s B_role A x`, the role chosen per token by the router's route; made by PEFT, completed by `tie`.

    Adapter weights may be kept in float32 over a base in another dtype: the product is computed in the dtype of the
    hidden states, as it will be when served. Where the route splits this projection, `forward` returns `W x` alone and
    keeps `A x` for attention (`take_low`).
    """

    kind: str
    router: Router
    roles: tuple[str, ...]
    _dtype: torch.dtype

    def tie(self, kind: str, roles: Sequence[str], router: Router) -> None:
        """Put the first role's `A` under every role's name. kind: the projection's own name, such as `q_proj`."""
        self.kind, self.roles, self.router = kind, tuple(roles), router
        self._dtype = self.shared_a.dtype
        for role in self.roles[1:]:
            self.lora_A[role] = self.lora_A[self.roles[0]]

    @property
    def shared_a(self) -> nn.Parameter:
        """[r, d_in]"""
        weight: nn.Parameter = self.lora_A[self.roles[0]].weight
        return weight

    @property
    def role_b(self) -> list[nn.Parameter]:
        """[d_out, r] for each role, unscaled."""
        return [self.lora_B[role].weight for role in self.roles]

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """x: [..., T, d_in]. Returns [..., T, d_out]."""
        out: torch.Tensor = self.base_layer(x)
        route, self._dtype = self.router.route, x.dtype
        if self.kind in route.split:
            self.leave(self._down(x), out)
            return out
        if route.uniform == 0:
            return out
        return out + role_up(self._down(x), self.reader_up(), route.roles)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.lora_dropout[self.roles[0]](x), self.shared_a.to(x.dtype))

    def reader_up(self) -> torch.Tensor:
        """[n_roles, r, d_out]: every role's `B`, transposed and scaled, in the hidden states' dtype. Differentiable."""
        scaled = [b * self.scaling[role] for role, b in zip(self.roles, self.role_b, strict=True)]
        return torch.stack(scaled).transpose(1, 2).to(self._dtype)


@dataclass
class RoleModel:
    """A model with one tied adapter per role, ready to be trained.

    model: the PEFT model; call it under `router.use(route)`. specs: what each role is besides its matrices. modules: by
    the module's path in the transformers model.
    """

    model: PeftModel
    router: Router
    specs: tuple[RoleSpec, ...]
    modules: dict[str, TiedLoraLinear]
    _learning: frozenset[int] = frozenset()

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of the roles."""
        return tuple(spec.name for spec in self.specs)

    @property
    def targets(self) -> tuple[str, ...]:
        """Last names of the adapted modules, in the order of `TARGETS`."""
        kinds = {module.kind for module in self.modules.values()}
        return tuple(target for target in TARGETS if target in kinds)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Every shared A, once, and every B."""
        return [p for module in self.modules.values() for p in (module.shared_a, *module.role_b)]

    def split(self) -> frozenset[str]:
        """The projections that attention applies as the reader's when a trajectory is processed once for all roles.

        Raises UserError where `k_proj` is adapted and the model normalises keys by another norm than a plain RMSNorm.
        """
        split = frozenset({"k_proj", "v_proj"} & set(self.targets))
        unsupported = unsupported_key_norm(self.model.get_base_model()) if "k_proj" in split else None
        if unsupported is not None:
            raise UserError(
                f"`targets` names k_proj, but {unsupported} is no norm of keys that can be applied for each reader; "
                "take k_proj out of `targets`, or train with `objective: per_role`."
            )
        return split

    def learn(self, *, a: bool = True, roles: Collection[str] | None = None) -> None:
        """Let A, if `a`, and the B of `roles` (None = all) learn, and nothing else.

        Call it again after PEFT's `set_adapter`, which freezes what the active adapter has not.
        """
        chosen = self.roles if roles is None else roles
        self._learning = frozenset(
            id(parameter)
            for module in self.modules.values()
            for learns, parameter in [
                (a, module.shared_a),
                *((role in chosen, b) for role, b in zip(self.roles, module.role_b, strict=True)),
            ]
            if learns
        )
        self.model.requires_grad_(False)
        for parameter in self.adapter_parameters():
            parameter.requires_grad_(id(parameter) in self._learning)
        self.check()

    def check(self) -> None:
        """Raise LRAgentError unless A is one parameter under every role's name and exactly what shall learn does.

        To be asked before the model is sharded, which makes other parameters.
        """
        self.check_tied()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad != (id(parameter) in self._learning):
                state = "learns" if parameter.requires_grad else "is frozen"
                raise LRAgentError(f"{name} {state}: call `learn()` after PEFT's `set_adapter`.")

    def check_tied(self) -> None:
        """Raise LRAgentError unless A is one parameter under every role's name."""
        for path, module in self.modules.items():
            if any(module.lora_A[role].weight is not module.shared_a for role in self.roles):
                raise LRAgentError(f"{path}: the shared A is no longer tied across the roles.")


def build_role_model(
    model: nn.Module,
    roles: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] | None = None,
    rslora: bool = False,
    a_init: Literal["random", "svd"] = "random",
) -> RoleModel:
    """Inject one fresh adapter per role into `model`, in place, and tie their A.

    Roles get the indices 1, 2, … in the order given. layers: the decoder layers to adapt, None = all. B starts at zero,
    A as PEFT starts it, from torch's global random state; or (`svd`) along the directions of the input in which the
    base weight is strongest, as long as it would be otherwise. Raises UserError for role names, targets or layers that
    the model cannot have.
    """
    if not roles:
        raise UserError("`roles` is empty: name at least one role.")
    for i, role in enumerate(roles):
        check_role_name(role)
        if role in roles[:i]:
            raise UserError(f"`roles` names {role!r} twice.")
    specs = tuple(RoleSpec(role, float(alpha), rank, rslora) for role in roles)
    built = _inject(model, specs, _paths(model, targets, layers), dropout)
    if a_init == "svd":
        for module in built.modules.values():
            _strongest_directions(module)
    return built


def role_model_from(model: nn.Module, adapters: AdapterSet, *, dropout: float = 0.0) -> RoleModel:
    """Inject the roles of `adapters` into `model`, in place, to be trained on, in float32; it computes what they do.

    A stacked set becomes an ordinary tied one, in which every role may use every row. Raises UserError where `model`
    lacks a module that is adapted, or its shape differs.
    """
    adapters = as_tied(adapters)
    check_adaptable(model, adapters.targets)
    modules = dict(model.named_modules())
    for path in adapters.module_paths:
        shape = (adapters.role_b[path].shape[1], adapters.shared_a[path].shape[1])
        module = modules.get(path)
        if module is None or (module.out_features, module.in_features) != shape:
            raise UserError(f"the adapters change {path} of shape {list(shape)}, which this model does not have")
    built = _inject(model, adapters.roles, list(adapters.module_paths), dropout)
    with torch.no_grad():
        for path, tied in built.modules.items():
            tied.shared_a.copy_(adapters.shared_a[path])
            for parameter, b in zip(tied.role_b, adapters.role_b[path], strict=True):
                parameter.copy_(b)
    return built


def _inject(model: nn.Module, specs: Sequence[RoleSpec], paths: list[str], dropout: float) -> RoleModel:
    """PEFT keeps the adapter weights in float32 where the base is in a shorter dtype."""

    def config(spec: RoleSpec) -> LoraConfig:
        made = LoraConfig(
            task_type="CAUSAL_LM",
            r=spec.rank,
            lora_alpha=spec.alpha,
            lora_dropout=dropout,
            target_modules=paths,
            use_rslora=spec.rslora,
            # PEFT reads keys as regular expressions: a module path matches itself alone only when escaped.
            rank_pattern={re.escape(path): rank for path, rank in spec.rank_pattern.items()},
            alpha_pattern={re.escape(path): alpha for path, alpha in spec.alpha_pattern.items()},
        )
        made._register_custom_module({nn.Linear: TiedLoraLinear})
        return made

    router = Router()
    with warnings.catch_warnings():
        # PEFT asks transformers by an old name whether gradients are checkpointed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        peft_model = get_peft_model(model, config(specs[0]), adapter_name=specs[0].name)
        for spec in specs[1:]:
            peft_model.add_adapter(spec.name, config(spec))

    base, modules = peft_model.get_base_model(), {}
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            if not isinstance(module, TiedLoraLinear):
                raise UserError(f"{path}: a {type(module).__name__} cannot be adapted with a shared A yet.")
            parent, _, kind = path.rpartition(".")
            module.tie(kind, [spec.name for spec in specs], router)
            module.keeps_base = kind == "k_proj" and key_norm(base.get_submodule(parent)) is not None
            modules[path] = module
    built = RoleModel(peft_model, router, tuple(specs), modules)
    built.learn()
    return built


@torch.no_grad()
def _strongest_directions(module: TiedLoraLinear) -> None:
    """A's rows become the base weight's first right singular vectors, in the length that A had."""
    weight = module.base_layer.weight
    if hasattr(weight, "quant_state"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(module.base_layer)
    a = module.shared_a
    matrix = weight.detach().float()
    # By the smaller Gram matrix in float64: of r vectors only those of the largest values are wanted.
    rows, columns = matrix.shape
    gram = (matrix.T @ matrix if columns <= rows else matrix @ matrix.T).double()
    strongest = torch.linalg.eigh(gram).eigenvectors[:, -a.shape[0] :].flip(1).T.float()
    if columns > rows:
        strongest = torch.nn.functional.normalize(strongest @ matrix, dim=1)
    a.copy_(strongest * (a.norm() / strongest.norm()))


def _paths(model: nn.Module, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """The modules to adapt, by path; UserError where there are none."""
    if not targets:
        raise UserError("`targets` is empty: name at least one of " + ", ".join(TARGETS) + ".")
    check_adaptable(model, targets)
    paths = target_modules(model, targets)
    if layers is None:
        return paths
    by_layer: dict[int, list[str]] = {}
    for path in paths:
        if numbered := re.search(r"\.layers\.(\d+)\.", path):
            by_layer.setdefault(int(numbered[1]), []).append(path)
    if not layers:
        raise UserError("`layers` is empty: leave it out to adapt all layers.")
    for layer in layers:
        if layer not in by_layer:
            raise UserError(f"`layers` names layer {layer}; the model has layers {min(by_layer)} to {max(by_layer)}.")
    return [path for layer in sorted(set(layers)) for path in by_layer[layer]]
