"""Pruning methods, one file each; :mod:`edgeprune.prune.registry` knows them by name."""
