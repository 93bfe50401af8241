"""Spikes in other trainers: ``evenstep.integrations.transformers``, ``evenstep.integrations.lightning`` and
``evenstep.integrations.stable_baselines3``, each with a ``SpikeCallback`` that records them. The first two have a
``SpikeGuardCallback`` that acts on them.

Importing this package loads none of them; docs/integrations.md has examples.
"""
