"""Meshes, rows split over a mesh, and the runtime: several hosts, the cache of compiled programs."""
