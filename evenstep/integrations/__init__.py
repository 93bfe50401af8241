"""Spike telemetry in other trainers: ``evenstep.integrations.transformers``, ``evenstep.integrations.lightning`` and
``evenstep.integrations.stable_baselines3``, each with a ``SpikeCallback``.

Importing this package loads none of them; docs/integrations.md has examples.
"""
