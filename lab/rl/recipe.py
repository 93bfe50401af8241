"""Recipes: an environment, the options of PPO, and the optimizers with which it is trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from evenstep.baselines import rules, transforms
from evenstep.baselines.catalog import baseline, check_options
from evenstep.compare.table import check_keys
from evenstep.errors import EvenstepError, nearest
from evenstep.train.config_io import read_toml

OPTIMIZER_KEYS = ("name", "label", "before", "max_grad_norm")
"""Keys of ``[optimizer.KEY]``; every other key is an option of the optimizer."""

SET_HERE = ("policy", "env", "learning_rate", "policy_kwargs", "seed", "device", "verbose", "tensorboard_log")
"""Arguments of PPO that a recipe sets elsewhere, or not at all."""

CLAIM_KEYS = {"text", "better", "worse", "paper"}


@dataclass(frozen=True)
class Line:
    """An optimizer of a recipe, which is a line of its table.

    Args:
        before: gradient transforms applied before its step, as ``optim.before`` of a pretraining recipe.
        max_grad_norm: replaces PPO's value for this line.
    """

    key: str
    name: str
    label: str
    before: str = ""
    max_grad_norm: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe file.

    Args:
        source: the parts of the recipe that come from a paper.
        lr_schedule: "constant", or "linear" to 0.
        normalize: observations by their running mean and deviation, rewards by the running deviation of returns.
        eval_every: environment steps between two evaluations with the deterministic policy.
        eval_episodes: episodes of one evaluation.
    """

    name: str
    env: str
    timesteps: int
    title: str = ""
    source: str = ""
    lr: float = 5e-4
    lr_schedule: str = "linear"
    n_envs: int = 8
    normalize: bool = True
    eval_every: int = 20_000
    eval_episodes: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    ppo: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    claims: tuple[dict[str, str], ...] = ()

    def setting(self, line: Line, seed: int) -> dict[str, Any]:
        """Everything that the results of a run depend on."""
        ppo = self.ppo if line.max_grad_norm is None else self.ppo | {"max_grad_norm": line.max_grad_norm}
        names = ("env", "timesteps", "lr", "lr_schedule", "n_envs", "normalize", "eval_every", "eval_episodes")
        optimizer = {"line": line.key, "optimizer": line.name, "before": line.before, "options": line.options}
        shared = {name: getattr(self, name) for name in names}
        # JSON has no infinity; "inf" means that PPO does not clip.
        written = {key: "inf" if value == float("inf") else value for key, value in ppo.items()}
        return {**shared, "ppo": written, "policy": self.policy, **optimizer, "seed": seed}

    def smoke(self) -> Recipe:
        """A miniature, which only shows that the program works."""
        ppo = self.ppo | {"n_steps": 32, "batch_size": 32, "n_epochs": 2}
        return replace(
            self, ppo=ppo, timesteps=128, n_envs=2, eval_every=64, eval_episodes=1, seeds=self.seeds[:1]
        )  # fmt: skip


@dataclass(frozen=True)
class Build:
    """Replaces the class of an optimizer in stable-baselines3: ``Build("adam", before)(parameters, lr=...)``."""

    name: str
    before: str = ""

    def __call__(self, params: Any, lr: float | Tensor, **options: Any) -> Optimizer:
        chosen = baseline(self.name)
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        try:
            optimizer = chosen.load()(list(params), lr=lr, **{**chosen.chosen, **chosen.fixed, **values})
        except (TypeError, ValueError) as problem:
            raise EvenstepError(f"optimizer {self.name}: {str(problem).splitlines()[0]}") from None
        return transforms.add_transforms(optimizer, self.before)


def load(path: Path) -> Recipe:
    """Read a recipe. Raises EvenstepError for a key that is missing, unknown or of the wrong type."""
    tables = read_toml(path)
    known = [f.name for f in fields(Recipe) if f.name not in ("name", "lines")] + ["optimizer"]
    check_keys(path, "", tables, known)
    for key, what in (("env", "the id of a Gymnasium environment"), ("timesteps", "a number of steps")):
        if key not in tables:
            raise EvenstepError(f"{path}: '{key}' is missing; give {what}")
    kinds = {f.name: str(f.type) for f in fields(Recipe)}
    wanted: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, Any]": dict}
    for key, value in tables.items():
        kind = wanted.get(kinds.get(key, ""), object)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise EvenstepError(f"{path}: {key} = {value!r} has the wrong type; give {kinds[key]}")
        if kind is int and value < 1:
            raise EvenstepError(f"{path}: {key} = {value} is out of range; give at least 1")
    if tables.get("lr_schedule", "linear") not in ("constant", "linear"):
        raise EvenstepError(f"{path}: lr_schedule = {tables['lr_schedule']!r}; give 'constant' or 'linear'")
    seeds = tables.get("seeds", [0, 1, 2])
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise EvenstepError(f"{path}: seeds = {seeds!r}; give a list of whole numbers")
    _check_env(path, tables["env"])
    _check_arguments(path, tables)
    lines = tuple(_line(path, key, table) for key, table in tables.pop("optimizer", {}).items())
    if not lines:
        raise EvenstepError(f"{path}: there is no optimizer; add a table such as [optimizer.adam] with name = 'adam'")
    claims = tuple(_claim(path, claim, [line.key for line in lines]) for claim in tables.pop("claims", []))
    return Recipe(path.stem, **{**tables, "seeds": tuple(seeds)}, lines=lines, claims=claims)


def _check_env(path: Path, name: str) -> None:
    import gymnasium

    if name not in gymnasium.registry:
        raise EvenstepError(
            f"{path}: unknown env '{name}'{nearest(name, list(gymnasium.registry))}; gymnasium.pprint_registry() "
            "lists the installed ones"
        )


def _check_arguments(path: Path, tables: Mapping[str, Any]) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.policies import ActorCriticPolicy

    for where, cls, taken in (
        ("ppo", PPO, (*SET_HERE, "self", "_init_setup_model")),
        ("policy", ActorCriticPolicy, ("self", "observation_space", "action_space", "lr_schedule", "optimizer_class",
                                       "optimizer_kwargs")),
    ):  # fmt: skip
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in taken]
        check_keys(path, where, tables.get(where, {}), known)


def _line(path: Path, key: str, table: Any) -> Line:
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise EvenstepError(f"{path}: [optimizer.{key}] needs a name; 'evenstep optimizers' lists them")
    own = {name: table[name] for name in OPTIMIZER_KEYS if name in table}
    options = {name: value for name, value in table.items() if name not in OPTIMIZER_KEYS}
    try:
        chosen = baseline(own["name"])
        grouped = chosen.own.keys() & options.keys()  # options of the rule that makes the groups
        if grouped or chosen.rule not in (rules.every, rules.sparse):
            raise EvenstepError(f"{own['name']} needs parameter groups, and an agent has none; choose another")
        check_options(own["name"], options)
        transforms.build_transforms(own.get("before", ""))
    except EvenstepError as problem:
        raise EvenstepError(f"{path}: [optimizer.{key}]: {problem}") from None
    return Line(key, **{"label": key, **own}, options=options)


def _claim(path: Path, claim: Any, lines: list[str]) -> dict[str, str]:
    check_keys(path, "claims", claim, CLAIM_KEYS)
    for side in ("better", "worse"):
        if claim.get(side) not in lines:
            raise EvenstepError(
                f"{path}: claims.{side} = {claim.get(side)!r} is not an optimizer of this recipe ({', '.join(lines)})"
            )
    return {key: str(claim.get(key, "")) for key in CLAIM_KEYS}
