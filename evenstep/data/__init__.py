"""From text to batches: sources of documents, tokenizers, token shards, and the order in which training reads them.

README.md in this folder is the map. The import needs torch and NumPy only; tokenizers, pyarrow, sentencepiece, datasets
and rich are imported by the functions that use them.
"""

from evenstep.data.loader import BatchLoader, eval_batches
from evenstep.data.pipeline import DataSpec, prepare
from evenstep.data.progress import PrepareProgress, prepare_display
from evenstep.data.shards import TokenData, TokenStream
from evenstep.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BatchLoader",
    "DataSpec",
    "PrepareProgress",
    "TokenData",
    "TokenStream",
    "Tokenizer",
    "eval_batches",
    "load_tokenizer",
    "prepare",
    "prepare_display",
]
