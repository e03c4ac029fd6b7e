"""What a run has written, as one HTML page for people.

A page is made from the run folder alone (`config.yaml`, `metrics.jsonl`, `valued_tokens.jsonl`), at
the end of a run and again whenever someone asks; it needs no network, and JavaScript only to
search. Names, sentences and units of numbers are those of `util.metrics`. To add a curve, declare
its metric: what no group of `charts.GROUPS` names is drawn last, under its own name.
"""
