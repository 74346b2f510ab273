"""What is tracked: parameters with a per-sample gradient and a preconditioner, one file a kind.

matrix.py  nn.Linear and GPT-2's Conv1D
table.py   embeddings and output heads, which may be tied to each other
vector.py  the scale and shift of norms
"""

from influence_core.layers.finding import find_tracked_layers, trackable_layer_names
from influence_core.layers.kind import Parts, TrackedLayer

__all__ = ["Parts", "TrackedLayer", "find_tracked_layers", "trackable_layer_names"]
