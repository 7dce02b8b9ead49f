"""The latency of exported fits."""
