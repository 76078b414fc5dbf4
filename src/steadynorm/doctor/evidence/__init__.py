"""What the rules judge: plain numbers and words, gathered once from a checkpoint, model or run.

The records are in `records.py` and `training.py`, which import no framework, so that rules can
judge a checkpoint of any of them.
"""
