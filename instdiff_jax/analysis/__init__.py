"""FLOPs, compiled programs and chips: what a program costs, without running it."""
