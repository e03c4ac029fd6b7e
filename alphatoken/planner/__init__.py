"""What a run will need, from its configuration and the model's `config.json`: memory, messages,
floating-point work."""
