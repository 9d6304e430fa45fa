"""The forward passes: what is computed, in terms of ops; never how."""
