"""The only place that knows Triton: its messages, its metrics and its server."""
