"""What the optimizer saw, step by step: which tensor spiked, by how much, what was clipped, reset or skipped, and what
it did to the loss.

`SpikeMonitor` measures and finds events, `sinks` carry the records out, `report` makes a page of them, `study` repeats
the spike study of the SPAM paper. docs/telemetry.md documents the records and their keys. Importing this package loads
nothing: ``from evenstep import SpikeMonitor``.
"""
