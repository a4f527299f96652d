"""From the trainer's shards to an engine's, without whole tensors in between: a plan, made from layouts and names.

``layouts.py`` has the two layouts, ``boxes.py`` what of a tensor a rank holds, ``trainer.py`` and ``engine.py`` who
holds what, and ``plan.py`` the plan: for each part of each engine parameter, the rank that sends it. Nothing here moves
data, or needs torch or ranks.
"""
