"""How much memory a configuration takes on each GPU, and what to set for it to fit: ``asyppo plan``.

Weights are counted on torch's meta device and activations by running the models' forward pass on fake tensors, so both
are those of the very classes that train, for any architecture, without a GPU and without the weights. What depends on
the allocator, on kernels of the GPU and on the text is bounded from above; ``ASSUMPTIONS`` says how.
"""

from asyppo.cli.plan.estimate import GIB, Plan, make_plan
from asyppo.cli.plan.fits import advice, fits_table
from asyppo.cli.plan.models import describe, known_shape
from asyppo.cli.plan.passes import activations

__all__ = ["GIB", "Plan", "activations", "advice", "describe", "fits_table", "known_shape", "make_plan"]
