"""Checkpoint → bundle: the stages of a pruned model traced as ONNX graphs.

``from edgeprune.export.exporter import export`` is the public function.
"""
