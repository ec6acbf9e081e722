"""The field's benchmarks: their files read as people download them, their rules, their published rows."""
