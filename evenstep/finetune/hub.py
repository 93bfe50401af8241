"""The path of these names in evenstep 0.1; they live in `evenstep.finetune.models`."""

from evenstep.finetune.models import HubCausal, keeps_documents_apart

__all__ = ["HubCausal", "keeps_documents_apart"]
