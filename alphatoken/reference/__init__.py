"""Another model's token losses, computed before training and cached, or online.

What a cache was made for is in its settings file; a new input that changes losses must be added
there.
"""
