"""The path of this name in evenstep 0.1; it lives in `evenstep.finetune.models`."""

from evenstep.finetune.models import load_hub

__all__ = ["load_hub"]
