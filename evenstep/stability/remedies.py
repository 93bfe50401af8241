"""The remedies: optimizers, clipping, changes of the model, and the guard. A remedy is a set of options, so that each
one can be used in `evenstep pretrain` as well; `Remedy.command` names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ADAM: dict[str, Any] = {"name": "adamw"}


@dataclass(frozen=True)
class Remedy:
    """Options of a training.

    Attributes:
        optim: options of `evenstep pretrain`'s ``[optim]``: the name of the optimizer, ``before`` (gradient
            transforms), and hyperparameters; and ``clip_norm``, that of ``[train]``.
        shape: fields of the model; only for the tasks whose model has them.
        warmup: factor of the warm-up's length.
        z_loss: coefficient of the z-loss.
        ladder: the actions of a SpikeGuard around the optimizer.
        rate: where the tuning of the learning rate starts, as a multiple of Adam's.
        thresholds: candidates for ``clip_norm``, tried at the best learning rate.
    """

    name: str
    optim: dict[str, Any] = field(default_factory=lambda: dict(ADAM))
    shape: dict[str, Any] = field(default_factory=dict)
    warmup: float = 1.0
    z_loss: float | None = None
    ladder: tuple[str, ...] = ()
    rate: float = 1.0
    thresholds: tuple[float, ...] = ()

    @property
    def is_of_the_model(self) -> bool:
        """Whether it changes a LLaMA, and so exists in tasks with one only."""
        return bool(self.shape) or self.z_loss is not None

    @property
    def command(self) -> str:
        """The options of `evenstep pretrain` that this remedy stands for."""
        words = [f"--optim.{key} {_text(value)}" for key, value in self.optim.items() if key != "clip_norm"]
        words += [f"--train.clip_norm {self.optim['clip_norm']:g}"] if "clip_norm" in self.optim else []
        words += [f"--model.{key} {_text(value)}" for key, value in self.shape.items()]
        words += [f"--train.z_loss {self.z_loss:g}"] if self.z_loss is not None else []
        words += [f"--guard.ladder {','.join(self.ladder)}"] if self.ladder else []
        return " ".join(words + ([f"(warm-up x {self.warmup:g})"] if self.warmup != 1 else []))


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"'{text}'" if set(text) & set(" (") else text


def _before(text: str) -> dict[str, Any]:
    return {**ADAM, "before": text}


_STABLE: dict[str, Any] = {"name": "stable_spam"}
_SLOW: dict[str, Any] = {**_STABLE, "gamma1": 0.85, "gamma2": 0.99999}

REMEDIES: tuple[Remedy, ...] = (
    Remedy("Adam"),
    Remedy("Adam, beta2 .95", {**ADAM, "betas": [0.9, 0.95]}),
    Remedy("Adam, warm-up x 4", warmup=4),
    Remedy("Adam + clip 1", {**ADAM, "clip_norm": 1.0}),
    Remedy("Adam + tuned clip", {**ADAM, "clip_norm": 1.0}, thresholds=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    Remedy("Adam + value clip", _before("value_clip(limit=0.1)")),
    Remedy("Adam + AGC", _before("agc")),
    Remedy("Adam + ZClip", _before("zclip")),
    Remedy("Adam + AutoClip", _before("autoclip")),
    Remedy("Adam + AdaGC", _before("adagc(warmup_steps=20)")),
    Remedy("Adam + SkipStep", _before("skip_step(window=50)")),
    Remedy("StableAdamW", {"name": "optimi_stableadamw"}),
    Remedy("GradientStabilizer", _before("gradient_stabilizer")),
    Remedy("SPAM", {"name": "spam", "reset_interval": 100, "warmup_steps": 30}),
    Remedy("Stable-SPAM .7/.9", dict(_STABLE)),
    Remedy("Stable-SPAM .85/.99999", dict(_SLOW)),
    Remedy("Stable-SPAM .7/.9, schedule", {**_STABLE, "total_steps": "run"}),
    Remedy("Stable-SPAM .7/.9, robust", {**_STABLE, "robust": True}),
    Remedy("Stable-SPAM .85/.99999, robust", {**_SLOW, "robust": True}),
    Remedy("Stable-SPAM .7/.9, robust, schedule", {**_STABLE, "robust": True, "total_steps": "run"}),
    # The clip is far above a usual norm (about 1), so that only a spike meets it, before Stable-SPAM sees the gradient.
    Remedy("Stable-SPAM .7/.9 + clip 10", {**_STABLE, "clip_norm": 10.0}),
    Remedy("Stable-SPAM .7/.9, robust + clip 10", {**_STABLE, "robust": True, "clip_norm": 10.0}),
    Remedy("SCALE", {"name": "scale"}, rate=0.5),
    Remedy("Muon", {"name": "muon"}),
    Remedy("Adam + QK-norm", shape={"qk_norm": True}),
    Remedy("Adam + z-loss", z_loss=1e-4),
    Remedy("Adam + Mix-LN", shape={"norm": "mix"}),
    Remedy("Adam + guard: skip", ladder=("skip",)),
    Remedy("Adam + guard: lower rate", ladder=("skip", "lower_lr")),
    Remedy("Adam + guard: rewind", ladder=("rewind",)),
)


def remedy_of(optimizer: str) -> Remedy:
    """The row of an optimizer that a user names: a name of `evenstep optimizers`, or package.module:Class."""
    return Remedy(optimizer, {"name": optimizer})
