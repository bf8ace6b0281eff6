r"""Networks of which no datum speaks any more: a generator, or an energy, that is dead.

At a maximum the mean of the data's scores is zero, but not the scores: their mean square is the Fisher information. So
it is where latents do not matter, too: weights of zero in front of them, or behind them, have scores. Units that are
saturated (tanh, sigmoid) or off (relu) for every latent leave all weights without a score at every datum. No gradient
moves them again, while all that the run reports looks settled.
"""

import jax
import jax.numpy as jnp
from jax import Array, random

from numpyro_ebipla._core.state import Latents, Params
from numpyro_ebipla._core.static import is_array
from numpyro_ebipla.diagnostics.checks import Check, Rule
from numpyro_ebipla.model.blocks import Batch
from numpyro_ebipla.model.latent_model import LatentModel

#: Nats that a dead network weighs, over the log density of a datum. Those measured alive weighed a tenth and more.
NIL = 1e-4
#: Weights that are less count as so large: it is their scores that matter.
LEAST_WEIGHT = 1e-3
#: Particles of each datum that are looked at, at most.
MAX_PARTICLES = 4

DEAD = Rule(
    "dead networks",
    0,
    "every network has a gradient",
    "no datum has a gradient for the weights of {}: its units are saturated or off, and the rest of the fit is void",
    "a lower rate of the optimiser, or data scaled to what the network can reach",
)


def check_weights(model: LatentModel, params: Params, latents: Latents, batch: Batch) -> list[Check]:
    """Check that the data have something to say of the weights of every network.

    Args:
        model: the model.
        params: those that are trained, constrained. (A network that is held has no need of a gradient.)
        latents: particles of the batch.
        batch: some data.
    """
    if not networks(params):
        return []
    some = jax.tree.map(lambda x: x[:MAX_PARTICLES], latents)
    sizes = model.compiled(sizes_of_scores)(params, some, batch)
    dead = [name for name, size in sizes.items() if float(size) < NIL]
    return [DEAD._replace(bad=DEAD.bad.format(dead)).judge(len(dead))]


def networks(params: Params) -> dict[str, list[Array]]:
    """Return the weights, arrays of two axes or more, of each module; bare ones are those of one network."""
    found: dict[str, list[Array]] = {}
    bare = [name for name, value in params.items() if is_array(value) and value.ndim > 1]
    for name, value in params.items():
        weights = [leaf for leaf in jax.tree.leaves(value) if jnp.ndim(leaf) > 1]
        if weights:
            found.setdefault(", ".join(bare) if name in bare else name, []).extend(weights)
    return found


def sizes_of_scores(model: LatentModel, params: Params, latents: Latents, batch: Batch) -> dict[str, Array]:
    """Return by how many nats each network's weights count, over those of a datum: scores times weights.

    Random signs of the data keep their scores from cancelling, so that one gradient tells their mean square.
    """
    key_datum, key_rest = random.split(random.key(0))

    def total(params: Params) -> tuple[Array, Array]:
        joint = model.log_joint(params, latents.local, latents.shared, batch, {})
        signs = random.rademacher(key_datum, joint.per_datum.shape), random.rademacher(key_rest, joint.rest.shape)
        square = jnp.sum(jnp.square(joint.per_datum)) + jnp.sum(jnp.square(joint.rest))
        return jnp.sum(signs[0] * joint.per_datum) + jnp.sum(signs[1] * joint.rest), square

    scores, square = jax.grad(total, has_aux=True)(params)

    def size(score: Array, weight: Array) -> Array:
        typical = jnp.maximum(jnp.mean(jnp.square(weight)), LEAST_WEIGHT**2)
        return jnp.sum(jnp.square(score)) * typical

    of = jax.tree.map(size, networks(scores), networks(params))
    return {name: jnp.sqrt(sum(sizes) / square) for name, sizes in of.items()}
