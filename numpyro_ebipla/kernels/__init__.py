r"""Langevin transition kernels over many independent chains.

Each kernel moves a :class:`Point`, any tree of arrays with chains in their leading axes ``C``, towards a log density
``log π``. ``h`` is the step size and ``s`` a per-coordinate scale (one where nothing is preconditioned):

====================  ===========================================================================  ====
kernel                proposal                                                                     bias
====================  ===========================================================================  ====
:class:`ULA`          ``x + h ∇log π(x) + √(2h) ξ``                                                O(h)
:class:`MALA`         ``x + h s² ∇log π(x) + √(2h) s ξ``, accepted or rejected per chain           none
:class:`Underdamped`  exponential integrator of ``dx = v dt, dv = ∇log π dt − γ v dt + √(2γ) dB``  O(h)
====================  ===========================================================================  ====

A kernel uses the gradient that the point already carries. ULA and Underdamped therefore cost no
gradient of their own after a training step's backward pass, MALA exactly one, at its proposal.

A chain in plain JAX:

>>> import jax, jax.numpy as jnp
>>> from numpyro_ebipla.kernels import MALA, run_moves, start
>>> from numpyro_ebipla._core.tree import batched_value_and_grad
>>> target = batched_value_and_grad(lambda x: -0.5 * jnp.sum(x**2, -1))
>>> kernel = MALA()
>>> point, adapt = start(kernel, target, jnp.zeros((1000, 2)))
>>> keys = jax.random.split(jax.random.key(0), 50)
>>> point, adapt, accept = run_moves(kernel, keys, target, point, adapt)
>>> bool(jnp.abs(point.position.var() - 1) < 0.1)
True
"""

from numpyro_ebipla.kernels.base import AbstractKernel, Evaluation, MoveInfo, Point, evaluate, run_moves, start
from numpyro_ebipla.kernels.langevin import ULA, Underdamped
from numpyro_ebipla.kernels.mala import MALA

__all__ = [
    "MALA",
    "ULA",
    "AbstractKernel",
    "Evaluation",
    "MoveInfo",
    "Point",
    "Underdamped",
    "evaluate",
    "run_moves",
    "start",
]
