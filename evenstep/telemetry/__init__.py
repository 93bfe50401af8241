"""Telemetry of a training, step by step: which tensor spiked, by how much, what the optimizer clipped, reset or
skipped, and what that did to the loss.

``from evenstep import SpikeMonitor`` measures steps and finds events; `sinks` carry the records to files and other
programs; `page` and `watch` show them. README.md in this folder is the map, docs/telemetry.md documents the records.
Importing this package loads nothing.
"""
