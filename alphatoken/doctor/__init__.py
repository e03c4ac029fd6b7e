"""What can go wrong before the first step, looked at on every node: `examination` is the order of
checks, `findings` what they return, and the other modules hold the checks, most of them pure
functions of what ranks have gathered."""
