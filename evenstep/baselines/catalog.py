"""The optimizers by name: the class and the package of each, and the rule that turns a model into its groups.

Training (``optim.name``), the comparisons and the step benchmark use the same table, `BASELINES`. A name with a colon,
``package.module:Class``, is any torch Optimizer whose first argument is the parameters; `register_optimizer` gives such
a class a name. The hyperparameters of an optimizer are the arguments of its constructor; those that a library reads
from the param groups instead are listed here (`Baseline.own`).

The import of this module needs neither torch nor any of the packages.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evenstep.baselines import rules
from evenstep.baselines.rules import Request, Rule
from evenstep.errors import EvenstepError, first_line, nearest
from evenstep.version import __version__

if TYPE_CHECKING:
    from torch.optim import Optimizer

# Constructor arguments that are not hyperparameters: those that `build` and the rules set, and those that select an
# implementation.
_SET_BY_US = {
    *("self", "params", "model", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"),
    *(
        "maximize",
        "args",
        "adamw_lr",
        "adamw_betas",
        "adamw_wd",
        "weight_decouple",
        "num_embeds",
        "num_heads",
        "num_query_groups",
        "model_sharding",
    ),
}

_PEERS = ("bitsandbytes", "pytorch_optimizer", "torch-optimi", "torchao")


@dataclass(frozen=True)
class Baseline:
    """An optimizer of the table.

    Attributes:
        home: ``module:class``.
        package: the name by which pip installs it.
        paper: where it was published.
        rule: turns a model into its groups.
        fixed: constructor arguments that the user does not choose.
        chosen: defaults of the paper, where they differ from those of the library.
        own: options that are not constructor arguments, with their defaults; the rule reads them.
        pickled: a class in its state that torch.load must accept as safe, ``module:class``.
        note: a remark in the list.
        decoupled: whether a step multiplies a parameter by 1 - lr * weight_decay, as AdamW does.
    """

    home: str
    package: str = "evenstep"
    paper: str = ""
    rule: Rule = rules.every
    fixed: dict[str, Any] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    pickled: str = ""
    note: str = ""
    decoupled: bool = False

    @property
    def extra(self) -> str | None:
        """The optional dependency of evenstep that installs the package."""
        return "peers" if self.package in _PEERS else None

    def version(self) -> str | None:
        """The installed version of the package, None when it is not installed."""
        if self.package == "evenstep":
            return __version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def load(self) -> Callable[..., Optimizer]:
        """The class of the optimizer. EvenstepError when its package is not installed or has no such class."""
        try:
            if self.pickled:  # torch.load(weights_only=True) refuses a class that it has not been told is safe
                import torch

                torch.serialization.add_safe_globals([_imported(self.pickled)])
            cls: Callable[..., Optimizer] = _imported(self.home)
            return cls
        except ModuleNotFoundError as problem:
            how = f"'evenstep[{self.extra}]'" if self.extra else self.package
            raise EvenstepError(
                f"{self.home} needs the package {self.package}, which is not installed ({problem.name} is missing); "
                f"pip install {how}"
            ) from None
        except (AttributeError, ImportError) as problem:
            raise EvenstepError(
                f"{self.home} cannot be loaded: {first_line(problem)}; give package.module:Class"
            ) from None

    def hyperparameters(self) -> dict[str, Any]:
        """The keys of ``optim`` beside lr and weight_decay, with defaults (``inspect.Parameter.empty`` for none)."""
        # The signature is the only list of hyperparameters: an update of a library needs no edit here.
        parameters = inspect.signature(self.load()).parameters
        found = {
            key: parameter.default
            for key, parameter in parameters.items()
            if key not in _SET_BY_US
            and key not in self.fixed
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        return {**found, **{k: v for k, v in self.chosen.items() if k in found}, **self.own}

    def build(
        self,
        model: Any,
        *,
        lr: float,
        weight_decay: float = 0.0,
        decay: str = "all",
        lr_scales: Mapping[str, float] | None = None,
        ends_apart: bool = False,
        **options: Any,
    ) -> Optimizer:
        """The optimizer over the trainable parameters of ``model``. ``lr_scales`` has the multipliers of the learning
        rate of the "embedding" and the "last" layer; ``ends_apart`` puts both into groups of their own in any case.
        ``options`` are not checked, see `check_options`."""
        own = {**self.own, **{key: value for key, value in options.items() if key in self.own}}
        given = {key: value for key, value in options.items() if key not in self.own}
        fixed = dict(self.fixed)
        if next(model.parameters()).device.type == "meta":  # `evenstep plan` builds it there; fused kernels refuse it
            fixed.pop("fused", None)
        values = {**self.chosen, **fixed, **given}
        return self.rule(self.load(), Request(model, lr, weight_decay, decay, values, own, lr_scales or {}, ends_apart))


def allow_known_state() -> None:
    """Allow torch.load to read the classes that the installed libraries put into their optimizer state."""
    for one in BASELINES.values():
        if one.pickled and one.version():
            one.load()


def _imported(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)


_PO = "pytorch_optimizer"
_PROJECTOR = f"{_PO}.optimizer.utils.galore:GaLoreProjector"
_GALORE = {"rank": None, "update_proj_gap": 200, "scale": 0.25, "projection_type": "std"}

BASELINES: dict[str, Baseline] = {
    "stable_spam": Baseline("evenstep.optim:StableSPAM", paper="arXiv:2502.17055", decoupled=True),
    "spam": Baseline(
        "evenstep.optim:SPAM", paper="arXiv:2501.06842", rule=rules.sparse, own={"density_of": "all"}, decoupled=True,
        note="the published code has its density in the linear layers of attention and MLP alone (density_of hidden)",
    ),
    "scale": Baseline("evenstep.optim:SCALE", paper="arXiv:2506.16659", rule=rules.roles, decoupled=True),
    "adamw": Baseline("torch.optim:AdamW", "torch", "arXiv:1711.05101", fixed={"fused": True}, decoupled=True),
    "adam": Baseline("torch.optim:Adam", "torch", "arXiv:1412.6980", fixed={"fused": True}),
    "adafactor": Baseline(
        "torch.optim:Adafactor", "torch", "arXiv:1804.04235", note="without a first moment", decoupled=True,
    ),
    "muon": Baseline(
        "torch.optim:Muon", "torch", "arXiv:2502.16982", rule=rules.muon,
        chosen={"adjust_lr_fn": "match_rms_adamw"}, own={"adam_lr": None, "adam_betas": (0.9, 0.999)},
        note="scaled so that one rate serves both (match_rms_adamw)", decoupled=True,
    ),
    "normuon": Baseline(
        f"{_PO}:NorMuon", _PO, "arXiv:2510.05491", rule=rules.muon_groups,
        chosen={"update_scale": "match_rms"}, own={"adam_lr": None, "adam_betas": (0.9, 0.999)},
        note="Muon whose rows have equal second moments; scaled so that one rate serves both (match_rms)",
        decoupled=True,
    ),
    "sgd": Baseline("torch.optim:SGD", "torch", chosen={"momentum": 0.9}),
    "lion": Baseline(f"{_PO}:Lion", _PO, "arXiv:2302.06675"),
    "adam_mini": Baseline(
        f"{_PO}:AdamMini", _PO, "arXiv:2406.16793", rule=rules.blocks, note="the decay rule is the library's"
    ),
    "galore": Baseline(f"{_PO}:GaLore", _PO, "arXiv:2403.03507", rule=rules.projected, own=_GALORE, pickled=_PROJECTOR),
    "fira": Baseline(f"{_PO}:Fira", _PO, "arXiv:2410.01623", rule=rules.projected, own=_GALORE, pickled=_PROJECTOR),
    "apollo": Baseline(
        "evenstep.baselines.low_rank:APOLLO", paper="arXiv:2412.05270", rule=rules.ranked, decoupled=True,
    ),
    "apollo_mini": Baseline(
        "evenstep.baselines.low_rank:APOLLO", paper="arXiv:2412.05270", rule=rules.ranked,
        chosen={"rank": 1, "scale_type": "tensor", "scale": 128.0}, note="rank 1, one factor a tensor", decoupled=True,
    ),
    "peer_apollo": Baseline(
        f"{_PO}:APOLLO", _PO, "arXiv:2412.05270", rule=rules.projected, chosen={"scale_type": "channel"},
        own={**_GALORE, "scale": 1.0}, pickled=_PROJECTOR, note="its steps are of rank r, the paper's are not",
    ),
    "lora": Baseline("evenstep.baselines.low_rank:LoRA", paper="arXiv:2106.09685", rule=rules.ranked),
    "relora": Baseline("evenstep.baselines.low_rank:ReLoRA", paper="arXiv:2307.05695", rule=rules.ranked),
    "peer_spam": Baseline(
        f"{_PO}:SPAM", _PO, "arXiv:2501.06842", note="zeroes entries without a history, as the official code does"
    ),
    "peer_stable_spam": Baseline(f"{_PO}:StableSPAM", _PO, "arXiv:2502.17055"),
    "bnb_adamw8bit": Baseline("bitsandbytes.optim:AdamW8bit", "bitsandbytes", "arXiv:2110.02861"),
    "ao_adamw8bit": Baseline("torchao.optim:AdamW8bit", "torchao", "arXiv:2110.02861", note="compiled"),
    "ao_adamw4bit": Baseline("torchao.optim:AdamW4bit", "torchao", "arXiv:2309.01507", note="compiled"),
    "ao_adamwfp8": Baseline("torchao.optim:AdamWFp8", "torchao", note="compiled"),
    "optimi_adamw": Baseline("optimi:AdamW", "torch-optimi", "arXiv:1711.05101", rule=rules.optimi),
    "optimi_stableadamw": Baseline("optimi:StableAdamW", "torch-optimi", "arXiv:2304.13013", rule=rules.optimi),
}  # fmt: skip
"""Name -> optimizer. The names are stable: ``optim.name`` takes them, and run folders contain them."""


def register_optimizer(name: str, cls: type[Optimizer], rule: Rule = rules.every) -> None:
    """Give an optimizer class a name for ``optim.name``, in this process.

    The class has to be at the top level of a module. Its constructor takes the parameters first, then ``lr``,
    ``weight_decay`` and its hyperparameters, which become the keys of ``optim``.

    Args:
        name: the new name.
        cls: a subclass of ``torch.optim.Optimizer``.
        rule: turns a model into the groups; default: every parameter alike, with the decay rule of the run.

    Raises:
        EvenstepError: the name is taken or contains a colon, or the class is not at the top level of its module.

    Example:
        >>> import torch
        >>> register_optimizer("nadam", torch.optim.NAdam)
        >>> baseline("nadam").home
        'torch.optim.nadam:NAdam'
        >>> del BASELINES["nadam"]
    """
    home = f"{cls.__module__}:{cls.__qualname__}"
    if (name in BASELINES and BASELINES[name].home != home) or ":" in name:
        raise EvenstepError(f"the optimizer name '{name}' is taken or contains a colon: choose another")
    # Run folders and other processes find the class by its path, so the path has to lead back to it.
    entry = Baseline(home, cls.__module__.partition(".")[0], rule=rule)
    if "." in cls.__qualname__ or entry.load() is not cls:
        raise EvenstepError(f"{home} is not at the top level of its module: move it there to register it")
    BASELINES[name] = entry


def baseline(name: str) -> Baseline:
    """The optimizer of this name, or of a path ``package.module:Class``. EvenstepError for any other text."""
    if name in BASELINES:
        return BASELINES[name]
    if ":" in name:
        return Baseline(name, name.partition(":")[0].partition(".")[0])
    raise EvenstepError(
        f"unknown optimizer '{name}'{nearest(name, [*BASELINES])}; 'evenstep optimizers' lists them, and "
        "package.module:Class names any other"
    )


def names_of_options(name: str) -> list[str]:
    """The keys of ``optim`` for the optimizer, with the official names of hyperparameters. EvenstepError as for
    `Baseline.load`."""
    chosen = baseline(name)
    return ["lr", "weight_decay", *chosen.hyperparameters(), *getattr(chosen.load(), "ALIASES", {})]


def check_options(name: str, options: Any) -> None:
    """EvenstepError for an option that the optimizer does not have, or for a path that leads to no optimizer.

    Imports the package of the optimizer and builds nothing.
    """
    cls = baseline(name).load()
    if name not in BASELINES:
        from torch.optim import Optimizer

        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise EvenstepError(f"optim.name: {name} is not a torch Optimizer; give package.module:Class of one")
    known = names_of_options(name)
    allowed = [key for key in known if key not in getattr(cls, "ALIASES", {})]
    for key in options:
        if key not in known:
            raise EvenstepError(
                f"optim.{key}: {name} has no such hyperparameter{nearest(key, allowed)} (it has: {', '.join(allowed)})"
            )
