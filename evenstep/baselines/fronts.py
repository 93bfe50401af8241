"""The names of transforms.py under their earlier path."""

from evenstep.baselines.transforms import TRANSFORMS as FRONTS
from evenstep.baselines.transforms import add_transforms as put_before
from evenstep.baselines.transforms import build_transforms as transforms
from evenstep.baselines.transforms import parse

__all__ = ["FRONTS", "parse", "put_before", "transforms"]
