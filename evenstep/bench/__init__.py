"""``evenstep bench``: what a step of an optimizer costs, ours and every other that is installed, side by side.

registry.py (which optimizers, how they are built), setting.py (what they step over, and bytes), timing.py (rounds,
ratios, caches), measure.py (one comparison), report.py (tables and pictures), commands.py (the program).
"""
