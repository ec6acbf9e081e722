"""Attention kernels: functions of (q, k, v, query_bits, key_bits) with the same result; see `plain.attention`."""
