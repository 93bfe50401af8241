"""Telemetry inside of the trainers that people use: ``evenstep.integrations.transformers`` and
``evenstep.integrations.lightning``, each with a ``SpikeCallback``. Importing this package loads neither;
docs/integrations.md has the examples.
"""
