"""GPU kernels of igpo.ops, installed as igpo.kernels."""
