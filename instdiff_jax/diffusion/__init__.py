"""The noise schedule, the solvers and the multi-instance sampler. Nothing here knows of layouts."""
