"""OPUS inside Megatron-LM's own training loop: `selecting` around `pretrain()`, or `python -m` around a script."""
