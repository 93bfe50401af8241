"""How the parameters of a model become the groups of an optimizer: one function for each kind of optimizer.

A rule decides, for example, which matrices are projected or orthogonalised and which layers get Adam. The first
paragraph of its docstring is what ``evenstep optimizers`` shows.

Torch is imported where it is needed, so that the list of names costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evenstep.errors import EvenstepError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
RANK_SHARE = 4  # rank = width / 4, the setting of the low-rank papers (GaLore and later) for LLaMA-60M to 1B
DENSITY_OF = ("all", "hidden")  # the matrices to which SPAM's density applies


@dataclass(frozen=True)
class Request:
    """An optimizer to be built.

    Attributes:
        model: its trainable parameters are optimized.
        lr: the learning rate.
        weight_decay: the weight decay.
        decay: "matrices" sets weight_decay to 0 for parameters of fewer than two dimensions; "all" does not.
        values: constructor arguments.
        own: options that the rule reads itself.
        lr_scales: kind of a layer ("embedding", "last") -> multiplier of its learning rate; none: 1.
        ends_apart: put the embedding and the last layer into groups of their own also without multipliers.
    """

    model: nn.Module
    lr: float
    weight_decay: float
    decay: str
    values: dict[str, Any]
    own: dict[str, Any]
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    ends_apart: bool = False

    def build(self, cls: Callable[..., Optimizer], groups: Groups, **more: Any) -> Optimizer:
        """The optimizer over ``groups``, without empty ones; ``more`` are further constructor arguments."""
        values = {**self.values, **more}
        groups = [group for group in groups if group["params"]]
        return cls(
            self.decayed(self.split_ends(groups)), **{"lr": self.lr, "weight_decay": self.weight_decay, **values}
        )

    def ends(self) -> dict[int, str]:
        """id of a parameter -> "embedding" or "last", for the layers at the ends of the model. EvenstepError when a
        layer that ``lr_scales`` names does not exist."""
        from evenstep.optim.groups import edge_weights

        weights = edge_weights(self.model)
        for kind, scale in self.lr_scales.items():
            if not weights[kind]:
                what = {"embedding": "no trained embedding", "last": "no trained output layer of its own"}[kind]
                raise EvenstepError(f"optim.lr_scale.{kind} {scale:g}: the model has {what}; leave the option out")
        return {id(p): kind for kind, members in weights.items() for p in members}

    def split_ends(self, groups: Groups) -> Groups:
        """``groups`` in which the embedding and the last layer, with their learning rates, have groups of their own."""
        if not self.lr_scales and not self.ends_apart:
            return groups
        ends, parts = self.ends(), []
        for group in groups:
            members: dict[str, list[Any]] = {}
            for item in group["params"]:
                members.setdefault(ends.get(id(_tensor(item)), ""), []).append(item)
            for kind, items in members.items():
                # "lr_scale" tells the telemetry that this is not the learning rate of the run.
                scale = self.lr_scales.get(kind)
                rate = {"lr": group.get("lr", self.lr) * scale, "lr_scale": scale} if scale is not None else {}
                parts.append({**group, "params": items, **rate})
        return parts

    def decayed(self, groups: Groups) -> Groups:
        """``groups`` divided into those with weight decay and those without, as ``decay`` says."""
        if not self.weight_decay or self.decay != "matrices":
            return groups
        return [part for group in groups for part in split_by_decay(group)]


Rule = Callable[[Callable[..., "Optimizer"], Request], "Optimizer"]


def every(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike"""
    return request.build(cls, [{"params": [(n, p) for n, p in request.model.named_parameters() if p.requires_grad]}])


def sparse(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike; with density_of hidden, the embedding, the last layer and vectors are dense"""
    wanted = request.own["density_of"]
    if wanted not in DENSITY_OF:
        raise EvenstepError(f"optim.density_of {wanted}: give all (all matrices) or hidden (hidden matrices alone)")
    if wanted == "all" or request.values.get("density", 1.0) == 1:
        return every(cls, request)
    hidden, rest = split(request.model)
    return request.build(cls, [{"params": hidden}, {"params": rest, "density": 1.0}])


def roles(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices and the embedding: normalised columns; the last layer: with momentum; vectors: Adam"""
    from evenstep.optim import scale_groups

    return request.build(cls, scale_groups(request.model))


def projected(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: moments of a projection to rank r; embedding, last layer, vectors: Adam

    The libraries read ``rank`` from the param group, and step a group without it by plain Adam, without a warning.
    """
    hidden, rest = hidden_and_rest(request.model)
    own = dict(request.own)
    # None: a quarter of the width, so that one configuration serves models of every size.
    own["rank"] = own["rank"] or default_rank(p for _, p in hidden)
    return request.build(cls, [{"params": hidden, **own}, {"params": rest}])


def ranked(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: with rank r (LoRA: frozen, with trained adapters; APOLLO: scaled by a projection); embedding,
    last layer, vectors: Adam
    """
    hidden, rest = hidden_and_rest(request.model)
    # The rank is an option of a group here, so that the embedding and the last layer can have rank 0.
    values = dict(request.values)
    rank = values.pop("rank", None) or default_rank(p for _, p in hidden)
    return dataclasses.replace(request, values=values).build(
        cls, [{"params": hidden, "rank": rank}, {"params": rest, "rank": 0}]
    )


def muon(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: orthogonalised momentum; embedding, last layer, vectors: AdamW with rate adam_lr"""
    from torch.optim import AdamW

    from evenstep.baselines.chained import ChainedOptimizer
    from evenstep.baselines.muon import ShardedMuon
    from evenstep.optim.distributed import is_sharded

    hidden, rest = hidden_and_rest(request.model)
    own = request.own
    if any(is_sharded(p) for _, p in hidden):
        cls = ShardedMuon
    # AdamW has its own learning rate; None: the same as Muon's, whose updates are scaled to match AdamW's.
    adam = dataclasses.replace(request, lr=own["adam_lr"] or request.lr, values={}, own={})
    orthogonal = request.build(cls, [{"params": hidden}])
    if not rest:
        return orthogonal
    adamw = adam.build(AdamW, [{"params": rest}], betas=tuple(own["adam_betas"]), fused=True)
    return ChainedOptimizer(orthogonal, adamw)


def muon_groups(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """hidden matrices: orthogonalised momentum; embedding, last layer, vectors: AdamW with rate adam_lr

    One class has both, and reads from each group which of them it gets.
    """
    hidden, rest = hidden_and_rest(request.model)
    own = request.own
    adam = {"lr": own["adam_lr"] or request.lr, "betas": tuple(own["adam_betas"]), "weight_decay": request.weight_decay}
    return request.build(cls, [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False, **adam}])


def blocks(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """one second moment for each head of query and key, one for every other hidden matrix or vector (later versions
    of the paper: for each output); embedding and last layer: Adam
    """
    # The library needs the number of heads to find the rows of a head in the query and key matrices.
    config: Any = getattr(request.model, "config", None)
    heads = {"num_embeds": config.hidden_size, "num_heads": config.num_heads} if config else {}
    optimizer = cls(request.model, lr=request.lr, weight_decay=request.weight_decay, **heads, **request.values)
    ends = request.ends() if request.lr_scales else {}
    for group in optimizer.param_groups:  # the library makes one group per parameter
        scale = request.lr_scales.get(ends.get(id(group["params"][0]), ""))
        if scale is not None:
            group |= {"lr": group["lr"] * scale, "lr_scale": scale}
    return optimizer


def optimi(cls: Callable[..., Optimizer], request: Request) -> Optimizer:
    """every parameter alike"""
    # By default optimi uses Triton wherever it is installed, also for parameters on a CPU, where it fails.
    triton = None if next(request.model.parameters()).is_cuda else False
    return request.build(cls, [{"params": [p for p in request.model.parameters() if p.requires_grad]}], triton=triton)


def describe(rule: Rule) -> str:
    """The first paragraph of the docstring of a rule."""
    return " ".join((rule.__doc__ or "").split("\n\n")[0].split())


def hidden_and_rest(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """`split` for optimizers of hidden matrices, without tensors of three and more dimensions, such as the stacked
    weights of experts or of a convolution. EvenstepError when the model has none, or when no name tells which layer is
    the last one, which would then be taken for a hidden one."""
    from evenstep.optim.groups import HEADS, has_head

    inner, _ = split(model)
    hidden = [item for item in inner if item[1].dim() == 2]
    chosen = {id(p) for _, p in hidden}
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in chosen]
    if not hidden:
        raise EvenstepError("this model has no hidden matrix, the only kind this optimizer is for")
    if not has_head(model):
        raise EvenstepError(
            f"found no last layer in {type(model).__name__}: none is named {', '.join(HEADS)}; give it such a name"
        )
    return hidden, rest


def split(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The matrices between the embedding and the last layer, and all other trainable parameters, as named ones."""
    from evenstep.optim.groups import is_inner

    inner = is_inner(model)
    # The order of the model's parameters is kept within both lists.
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [item for item in trained if inner(*item)], [item for item in trained if not inner(*item)]


def default_rank(matrices: Any) -> int:
    """A quarter of the smallest width of the matrices, at least 1."""
    smallest: int = min(min(p.shape) for p in matrices)
    return max(1, smallest // RANK_SHARE)


def split_by_decay(group: dict[str, Any]) -> Groups:
    """The matrices of a group with its weight decay, then its vectors without."""
    rest = {key: value for key, value in group.items() if key != "params"}
    # Items are parameters or (name, parameter). The matrices come first: state dicts number parameters by this order.
    matrices = [item for item in group["params"] if _tensor(item).ndim >= 2]
    vectors = [item for item in group["params"] if _tensor(item).ndim < 2]
    parts: Groups = [{**rest, "params": matrices}] if matrices else []
    return [*parts, {**rest, "params": vectors, "weight_decay": 0.0}] if vectors else parts


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item
