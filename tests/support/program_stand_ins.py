"""What the documentation's examples use of axolotl, torchtitan and LLaMA-Factory, for where the programs are missing.

It does what axolotl 0.19, torchtitan 0.3 and LLaMA-Factory 0.9 do, and no more. These programs want other versions of
what the development environment has, so they are no part of it. Where one can be imported, it is used itself.
"""

import importlib
import re
import sys
import types
from dataclasses import dataclass, field, replace


class BasePlugin:
    """axolotl.integrations.base"""

    def post_trainer_create(self, cfg, trainer):
        """Called when the trainer has been made and has no optimizer yet."""


@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    """torchtitan.components.optimizer"""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict = field(default_factory=dict)


class OptimizersContainer:
    """torchtitan.components.optimizer: the parameters of each part of a model go to the first pattern that fits; one
    optimizer for each name in it."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)
        implementation: str = "fused"

        def build(self, **parts):
            return self._owner(replace(self), **parts)

    def __init_subclass__(cls):
        assert "Config" in vars(cls), "a subclass has a Config of its own, which builds it"
        cls.Config._owner = cls

    def __init__(self, config, *, model_parts):
        inert = {"fused": config.implementation == "fused", "foreach": config.implementation == "foreach"}
        self.optimizers = []
        for part in model_parts:
            groups, claimed = {}, set()
            for entry in config.param_groups:
                names = [name for name, _ in part.named_parameters() if re.search(entry.pattern, name)]
                names = [name for name in names if name not in claimed]
                claimed |= {*names}
                params = [part.get_parameter(name) for name in names]
                group = {"params": params, "param_names": names, **inert, **entry.optimizer_kwargs}
                groups.setdefault(entry.optimizer_name, []).append(group)
            self.optimizers += [self._resolve_optimizer_factory(name)(made) for name, made in groups.items()]

    @staticmethod
    def _resolve_optimizer_factory(name):
        raise NotImplementedError(f"Optimizer {name} not added.")

    def __iter__(self):
        return iter(self.optimizers)


def run_exp(args=None, callbacks=None):
    """llamafactory.train.tuner: here without a training. The callbacks go to transformers' Trainer."""
    from transformers import TrainerCallback

    assert args is None and all(isinstance(one, TrainerCallback) for one in callbacks)


PROGRAMS = {
    "axolotl.integrations.base": (BasePlugin,),
    "llamafactory.train.tuner": (run_exp,),
    "torchtitan.components.optimizer": (ParamGroupConfig, OptimizersContainer),
}


def stand_in_for_programs(monkeypatch):
    for module, members in PROGRAMS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
            for member in members:
                setattr(sys.modules[module], member.__name__, member)
