"""``evenstep bench``: what a step of an optimizer costs, ours and every other that is installed, side by side.

registry.py (which optimizers, how they are built), shapes.py (what they step over), memory.py (bytes), timing.py
(rounds, ratios, caches), contestant.py (one optimizer made ready), measure.py (one run), commands.py and arguments.py
(the program), report.py and plot.py (tables, JSON, pictures).
"""
