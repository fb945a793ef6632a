"""The operators of domain ``edgeprune``: their schema, and the torch reference of each.

Import the modules: ``schema`` needs nothing, the others need torch. The same operators as ONNX functions are
in ``edgeprune.export.operators``.
"""
