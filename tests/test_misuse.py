"""A catalogue of wrong uses and of what the library answers.

Each entry of a table has a name, a use and what the message must say: the argument, its value and
the way out. The answer is a ``ValueError`` raised by a line of the library itself, never an error
from deep inside of JAX or of another package. At the end stand the uses that another answers for,
and those that look wrong and are right. That swag is last in its chain is ``check_iterate``'s to
see, in ``test_diagnostics.py``, like a rank that no memory holds.
"""

import copy
import functools
import itertools
import pathlib
import pickle
import re

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import swagjax

RANK = 3
LIBRARY = pathlib.Path(swagjax.__file__).parent
KEY = jax.random.key(0)
PARAMS = {"b": jnp.ones(3), "w": jnp.arange(6.0).reshape(2, 3) / 10}
TALLER = {"b": jnp.ones(3), "w": jnp.ones((4, 3))}  # the same structure, another model
OTHER = {"kernel": jnp.ones((2, 3))}  # another structure
INPUTS = jnp.ones((5, 2))
TX = optax.chain(optax.sgd(0.1), swagjax.swag(RANK))


def probabilities(params, x):
    return jax.nn.softmax(x @ params["w"] + params["b"])


def logits(params, x):
    return x @ params["w"] + params["b"]


def gradients(params, t):
    return jax.tree.map(lambda p: jnp.cos(p + t), params)


def train(tx, params, steps=4):
    opt_state = tx.init(params)
    for t in range(steps):
        updates, opt_state = tx.update(gradients(params, t), opt_state, params)
        params = optax.apply_updates(params, updates)
    return opt_state


@functools.cache
def opt_state():
    return train(TX, PARAMS)


@functools.cache
def state():
    return swagjax.get_state(opt_state())


def point():
    """The SWA state of the run, whose predictions compile the quickest."""
    return state()._replace(variance=None, deviations=None)


@functools.cache
def masked_state():
    tx = optax.masked(swagjax.swag(RANK), {"b": False, "w": True})
    return swagjax.get_state(train(tx, PARAMS, 2))


@functools.cache
def members(shared_step=True):
    """Two members trained side by side, by ``member_axes`` or mapped over everything."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state())
    return stacked._replace(num_updates=state().num_updates) if shared_step else stacked


def stacked_params():
    return jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)


def empty():
    return swagjax.swag(RANK).init(PARAMS)


def abstract():
    return jax.eval_shape(swagjax.swag(RANK).init, PARAMS)


@functools.cache
def without_target():
    """An optimizer state as orbax restores it where no target is given: dicts and lists."""
    return [opt_state()[0], state()._asdict()]


def update(updates, state, params, rank=RANK):
    return swagjax.swag(rank).update(updates, state, params)


def sample(state, key=KEY, **options):
    return swagjax.sample(key, state, **options)


def predict(posterior=None, prob_fn=probabilities, inputs=INPUTS, **options):
    posterior = state() if posterior is None else posterior
    return swagjax.predict(KEY, posterior, prob_fn, inputs, **options)


class Loader:
    def __iter__(self):
        return iter([INPUTS])


# --- Setting up ------------------------------------------------------------------------------

SETTING_UP = {
    "rank 1": (
        lambda: swagjax.swag(rank=1),
        r"rank=1: .*needs at least 2 deviations.*swag_diag",
    ),
    "rank as a float": (lambda: swagjax.swag(rank=20.0), r"rank=20\.0: give an integer of at"),
    "parameters in place of the rank": (lambda: swagjax.swag(PARAMS), r"rank=\{'b'.*integer"),
    "every 0": (lambda: swagjax.swag(every=0), r"every=0: give an integer of at least 1"),
    "start as a float": (lambda: swagjax.swag(start=1e3), r"start=1000\.0: give an integer"),
    "start from the end": (lambda: swagjax.swag(start=-1), r"start=-1: give an integer of at le"),
    "when as a boolean": (lambda: swagjax.swag(when=True), r"when=True: give a function of the"),
    "when that returns a number": (
        lambda: swagjax.swag(RANK, when=lambda t: 1).update(PARAMS, empty(), PARAMS),
        r"when\(t\) returned int32\[\]: return a boolean scalar",
    ),
    "when that returns nothing": (
        lambda: swagjax.swag(RANK, when=lambda t: None).update(PARAMS, empty(), PARAMS),
        r"when\(t\) returned None: return a boolean scalar",
    ),
    "when that returns a list": (
        lambda: swagjax.swag(RANK, when=lambda t: [True]).update(PARAMS, empty(), PARAMS),
        r"when\(t\) returned bool\[1\]: return a boolean scalar",
    ),
    "accumulators of integers": (
        lambda: swagjax.swag(accumulator_dtype=int),
        r"accumulator_dtype=<class 'int'>: give a floating point dtype, such as jnp\.float32",
    ),
    "a misspelt dtype": (
        lambda: swagjax.swag(deviation_dtype="blfoat16"),
        r"deviation_dtype='blfoat16': give a floating point dtype",
    ),
    "deviations of eight bits, which would round to zero": (
        lambda: swagjax.swag(deviation_dtype=jnp.float8_e4m3fn),
        r"deviation_dtype=.*float8_e4m3fn.*: give a floating point dtype.*16",
    ),
    "size of a state of rank 1": (lambda: swagjax.state_bytes(PARAMS, 1), r"rank=1: .*swag_diag"),
    "size of a state with its arguments swapped": (
        lambda: swagjax.state_bytes(20, PARAMS),
        r"rank=\{'b'.*give an integer",
    ),
}

# --- Parameters that are no weights ----------------------------------------------------------

LEFT_OUT = r": SWAG averages real floating point weights; leave other leaves out with optax\.masked"


def refused_leaf(leaf, what):
    return (
        lambda: swagjax.swag(RANK).init({"w": jnp.ones(2), "other": [leaf]}),
        r"params\['other'\]\[0\] " + what + LEFT_OUT,
    )


PARAMETERS = {
    "integers": refused_leaf(jnp.arange(3), "has dtype int32"),
    "a Python integer": refused_leaf(3, "has dtype int32"),
    "a boolean": refused_leaf(True, "has dtype bool"),
    "complex numbers": refused_leaf(jnp.ones(2) * 1j, "has dtype complex64"),
    "a random key": refused_leaf(KEY, r"has dtype key<fry>"),
    "the gradient of an integer": refused_leaf(
        np.zeros(2, jax.dtypes.float0), r"has dtype .*float0.*"
    ),
    "floats of eight bits": refused_leaf(
        jnp.zeros(2, jnp.float8_e4m3fn), "has dtype float8_e4m3fn"
    ),
    "a name": refused_leaf("relu", "is a str"),
    "a function, as in an equinox module": refused_leaf(jax.nn.relu, "is a .*"),
    "an untyped object": refused_leaf(object(), "is a object"),
    "all variables of a linen model": (
        lambda: swagjax.swag(RANK).init(
            {"params": PARAMS, "batch_stats": {"n": jnp.zeros((), int)}}
        ),
        r"params\['batch_stats'\]\['n'\] has dtype int32" + LEFT_OUT,
    ),
    "a linen model in place of its parameters": (
        lambda: swagjax.swag(RANK).init(linen.Dense(3)),
        r"params is a Dense" + LEFT_OUT,
    ),
    "an nnx model with random keys": (
        lambda: swagjax.swag(RANK).init(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        r"params\.rngs.* has dtype uint32" + LEFT_OUT,
    ),
    "integers, asked for their size": (
        lambda: swagjax.state_bytes({"w": jnp.arange(3)}, 20),
        r"params\['w'\] has dtype int32" + LEFT_OUT,
    ),
}

# --- Training --------------------------------------------------------------------------------

NO_PARAMS = r"params=None: .*call tx\.update\(updates, state, params\)"
NO_STATE = r"state is a {}: give .*tx\.init\(params\)"
SHAPES = r"the state holds shapes, no numbers: .*tx\.init\(params\)"
MEMBERS = r"the state holds several members, num_collected=\[4 4\]: map over them with jax\.vmap"
OTHER_KIND = r"the state is of {}, and this is {}: go on with .* start anew with init\(params\)"
OTHER_GRADIENTS = r"updates has another structure than params: .*gradients of these params"

TRAINING = {
    "update without params": (lambda: TX.update(PARAMS, opt_state()), NO_PARAMS),
    "update without params, jitted": (
        lambda: jax.jit(TX.update)(PARAMS, opt_state()),
        NO_PARAMS,
    ),
    "update without state": (lambda: swagjax.swag(RANK).update(PARAMS, PARAMS), NO_PARAMS),
    "state and params swapped": (
        lambda: update(PARAMS, PARAMS, state()),
        NO_STATE.format("dict"),
    ),
    "no state yet": (lambda: update(PARAMS, None, PARAMS), NO_STATE.format("NoneType")),
    "the state of the whole chain": (
        lambda: update(PARAMS, opt_state(), PARAMS),
        NO_STATE.format("tuple"),
    ),
    "a checkpoint restored without a target": (
        lambda: TX.update(PARAMS, without_target(), PARAMS),
        NO_STATE.format("dict"),
    ),
    "a state of shapes": (lambda: update(PARAMS, abstract(), PARAMS), SHAPES),
    "gradients of some parameters only": (
        lambda: update({"w": PARAMS["w"]}, state(), PARAMS),
        OTHER_GRADIENTS,
    ),
    "gradients of more than the parameters": (
        lambda: update({**PARAMS, "c": jnp.ones(1)}, state(), PARAMS),
        OTHER_GRADIENTS,
    ),
    "no gradient for one parameter": (
        lambda: update({**PARAMS, "w": None}, state(), PARAMS),
        r"updates\['w'\] has shape \[\]: params holds \[\(2, 3\)\] there; .*gradients of",
    ),
    "no gradients": (lambda: update(None, state(), PARAMS), OTHER_GRADIENTS),
    "a transposed gradient": (
        lambda: update({**PARAMS, "w": PARAMS["w"].T}, state(), PARAMS),
        r"updates\['w'\] has shape \[\(3, 2\)\]: params holds \[\(2, 3\)\] there; .*gradients of",
    ),
    "gradients of each example": (
        lambda: update({**PARAMS, "w": jnp.ones((7, 2, 3))}, state(), PARAMS),
        r"updates\['w'\] has shape \[\(7, 2, 3\)\]: params holds \[\(2, 3\)\] there",
    ),
    "the state of another model": (
        lambda: update(OTHER, state(), OTHER),
        r"params has another structure than the state: .*tx\.init\(params\)",
    ),
    "the state of a model of other shapes": (
        lambda: update(TALLER, state(), TALLER),
        r"params\['w'\] has shape \[\(4, 3\)\]: the state holds \[\(2, 3\)\] there; .*tx\.init\(p",
    ),
    "the state of a model of shapes that broadcast": (
        lambda: update({**PARAMS, "b": jnp.ones(1)}, state(), {**PARAMS, "b": jnp.ones(1)}),
        r"params\['b'\] has shape \[\(1,\)\]: the state holds \[\(3,\)\] there; .*tx\.init\(p",
    ),
    "the state of a smaller rank": (
        lambda: update(PARAMS, state(), PARAMS, rank=10),
        OTHER_KIND.format(r"swag\(rank=3\)", r"swag\(rank=10\)"),
    ),
    "the state of a larger rank": (
        lambda: update(PARAMS, state(), PARAMS, rank=2),
        OTHER_KIND.format(r"swag\(rank=3\)", r"swag\(rank=2\)"),
    ),
    "a state of swag in swag_diag": (
        lambda: swagjax.swag_diag().update(PARAMS, state(), PARAMS),
        OTHER_KIND.format(r"swag\(rank=3\)", "swag_diag"),
    ),
    "a state of swag_diag in swag": (
        lambda: update(PARAMS, swagjax.swag_diag().init(PARAMS), PARAMS),
        OTHER_KIND.format("swag_diag", r"swag\(rank=3\)"),
    ),
    "a state of swa in swag_diag": (
        lambda: swagjax.swag_diag().update(PARAMS, swagjax.swa().init(PARAMS), PARAMS),
        OTHER_KIND.format("swa", "swag_diag"),
    ),
    "members without vmap": (
        lambda: update(stacked_params(), members(), stacked_params()),
        MEMBERS,
    ),
    "members mapped over everything, without vmap": (
        lambda: update(stacked_params(), members(shared_step=False), stacked_params()),
        MEMBERS,
    ),
}

# --- Finding the state -----------------------------------------------------------------------

NONE_FOUND = r"opt_state holds no SWAGState: put swagjax\.swag\(\.\.\.\) last in the optax\.chain"

FINDING = {
    "the transformation in place of its state": (lambda: swagjax.get_state(TX), NONE_FOUND),
    "the parameters": (lambda: swagjax.get_state(PARAMS), NONE_FOUND),
    "nothing": (lambda: swagjax.get_state(None), NONE_FOUND),
    "two in a chain": (
        lambda: swagjax.get_state(optax.chain(swagjax.swa(), swagjax.swag(RANK)).init(PARAMS)),
        r"opt_state holds 2 SWAGStates: pass the part of it that holds the one you mean",
    ),
    "a checkpoint restored without a target, found": (
        lambda: swagjax.get_state(without_target()),
        r"opt_state holds no SWAGState: .*restored .*jax\.eval_shape\(tx\.init, params\)",
    ),
}

# --- Keys ------------------------------------------------------------------------------------

NO_KEY = r": give a PRNG key, such as jax\.random\.key\(0\)"
SEVERAL_KEYS = r"key holds keys of shape \({},\): give one, or map over them with jax\.vmap"

KEYS = {
    "a seed": (lambda: sample(state(), 0), "key=0" + NO_KEY),
    "a NumPy generator": (
        lambda: sample(state(), np.random.default_rng(0)),
        r"key=Generator\(PCG64\).*" + NO_KEY,
    ),
    "an nnx.Rngs": (lambda: sample(state(), nnx.Rngs(0)), "key=Rngs.*" + NO_KEY),
    "a stream of an nnx.Rngs": (
        lambda: sample(state(), nnx.Rngs(0).params),
        "key=RngStream.*" + NO_KEY,
    ),
    "two numbers": (lambda: sample(state(), [0, 0]), r"key=\[0, 0\]" + NO_KEY),
    "a list of keys": (lambda: sample(state(), [KEY, KEY]), r"key=\[Array.*" + NO_KEY),
    "words of another sign": (
        lambda: sample(state(), jnp.zeros(2, jnp.int32)),
        r"key=Array\(\[0, 0\], dtype=int32\)" + NO_KEY,
    ),
    "words of another generator": (
        lambda: sample(state(), jnp.zeros(4, jnp.uint32)),
        r"key=Array\(\[0, 0, 0, 0\], dtype=uint32\)" + NO_KEY,
    ),
    "one key in an array": (
        lambda: sample(state(), jax.random.split(KEY, 1)),
        SEVERAL_KEYS.format(1),
    ),
    "many keys": (
        lambda: sample(state(), jax.random.split(KEY, 30)),
        SEVERAL_KEYS.format(30),
    ),
}

# --- Reading a posterior ---------------------------------------------------------------------

GET_STATE = r"{} is a {}: give the SWAGState, swagjax\.get_state\(opt_state\)"
NOTHING = (
    r"the state has collected no iterate \(num_collected=0 after num_updates={}, num_skipped={} "
    r".*`start`"
)

READING = {
    "sample of the optimizer's state": (
        lambda: sample(opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
    "sample of the parameters": (lambda: sample(PARAMS), GET_STATE.format("state", "dict")),
    "sample of a TrainState": (
        lambda: sample(TrainState.create(apply_fn=None, params=PARAMS, tx=TX)),
        GET_STATE.format("state", "TrainState"),
    ),
    "sample of the transformation": (lambda: sample(TX), GET_STATE.format("state", "Gradient.*")),
    "sample with key and state swapped": (
        lambda: swagjax.sample(state(), KEY),
        GET_STATE.format("state", "PRNGKeyArray"),
    ),
    "mean of the optimizer's state": (
        lambda: swagjax.mean(opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
    "variance of the optimizer's state": (
        lambda: swagjax.variance(opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
    "entropy of the optimizer's state": (
        lambda: swagjax.entropy(opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
    "log_prob with state and params swapped": (
        lambda: swagjax.log_prob(PARAMS, state()),
        GET_STATE.format("state", "dict"),
    ),
    "kl to the optimizer's state": (
        lambda: swagjax.kl(state(), opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
    "merge with the optimizer's state": (
        lambda: swagjax.merge(state(), opt_state()),
        GET_STATE.format("second", "tuple"),
    ),
    "merge of a list of states": (
        lambda: swagjax.merge([state(), state()], state()),
        GET_STATE.format("first", "list"),
    ),
    "sample before the first collection": (lambda: sample(empty()), NOTHING.format(0, 0)),
    "kl to a state that collected nothing": (
        lambda: swagjax.kl(state(), empty()),
        NOTHING.format(0, 0),
    ),
    "sample of a run that diverged": (
        lambda: sample(train(swagjax.swag(RANK), jax.tree.map(lambda p: p * jnp.nan, PARAMS))),
        NOTHING.format(4, 4),
    ),
    "sample of a state of shapes": (lambda: sample(abstract()), SHAPES),
    "mean of a state of shapes": (lambda: swagjax.mean(abstract()), SHAPES),
    "merge with a state of shapes": (lambda: swagjax.merge(state(), abstract()), SHAPES),
    "variance of members": (lambda: swagjax.variance(members()), MEMBERS),
    "kl to members": (lambda: swagjax.kl(state(), members()), MEMBERS),
    "merge of members": (lambda: swagjax.merge(members(), members()), MEMBERS),
    "like a model's variables": (
        lambda: sample(state(), like={"params": PARAMS}),
        r"like has another structure than the parameters that were collected",
    ),
    "like another model": (
        lambda: sample(state(), like=TALLER),
        r"like\['w'\] has shape \[\(4, 3\)\]: the state holds \[\(2, 3\)\] there",
    ),
    "like integers, to which a sample would be rounded": (
        lambda: sample(state(), like={**PARAMS, "w": jnp.zeros((2, 3), int)}),
        r"like\['w'\] has dtype int32",
    ),
    "log_prob of another model": (
        lambda: swagjax.log_prob(state(), TALLER),
        r"params\['w'\] has shape \[\(4, 3\)\]: the state holds \[\(2, 3\)\] there",
    ),
    "log_prob of many samples": (
        lambda: swagjax.log_prob(state(), stacked_params()),
        r"params\['b'\] has shape \[\(2, 3\)\]: the state holds \[\(3,\)\] there",
    ),
    "log_prob of complex numbers": (
        lambda: swagjax.log_prob(state(), {**PARAMS, "w": PARAMS["w"] * 1j}),
        r"params\['w'\] has dtype complex64",
    ),
    "kl to another model": (
        lambda: swagjax.kl(state(), train(swagjax.swag(RANK), TALLER, 1)),
        r"other\.mean\['w'\] has shape \[\(4, 3\)\]: the state holds \[\(2, 3\)\] there",
    ),
    "merge with another model": (
        lambda: swagjax.merge(state(), swagjax.swag(RANK).init(TALLER)),
        r"first\.mean is .*\(2, 3\).* second\.mean is .*\(4, 3\).*only states of the same",
    ),
    "merge with another rank": (
        lambda: swagjax.merge(state(), swagjax.swag(5).init(PARAMS)),
        r"first\.deviations is .*\(3, 3\).* second\.deviations is .*\(5, 3\).*only states",
    ),
    "merge with another kind": (
        lambda: swagjax.merge(state(), swagjax.swag_diag().init(PARAMS)),
        r"second\.deviations is None: only states of the same kind",
    ),
    "merge of masked and unmasked": (
        lambda: swagjax.merge(state(), masked_state()),
        r"first\.mean is .*\['b'\].* second\.mean is .*only states of the same kind",
    ),
    "masked sample like a model without the masked leaves": (
        lambda: sample(masked_state(), like={"w": PARAMS["w"]}),
        r"like has another structure than the parameters that were collected",
    ),
    "a key in place of the noise": (
        lambda: swagjax.from_noise(state(), KEY, jnp.ones(RANK)),
        r"z1 has another structure than the parameters that were collected",
    ),
    "noise for the iterates held, not for the rows": (
        lambda: swagjax.from_noise(train(swagjax.swag(9), PARAMS, 2), PARAMS, jnp.ones(2)),
        r"z2 has shape \(2,\): the ring of this state asks for \(9,\)",
    ),
}

OPTIONS = {
    f"{name} of {what}": (
        lambda name=name, value=value: sample(state(), **{name: value}),
        rf"{name}={shown}: give a finite number of at least zero",
    )
    for name in ("scale", "min_variance")
    for what, value, shown in [
        ("a negative number", -0.5, r"-0\.5"),
        ("NaN", float("nan"), "nan"),
        ("None", None, "None"),
        ("text", "1.0", r"'1\.0'"),
        ("a complex number", 1j, "1j"),
        ("a list", [1.0], r"\[1\.0\]"),
        ("an array of one", np.ones(1), r"array\(\[1\.\]\)"),
    ]
}

# --- Predicting ------------------------------------------------------------------------------

NO_POSTERIOR = (
    r"posterior is a {}: give a SWAGState, swagjax\.get_state\(opt_state\), or a function"
)
NO_FUNCTION = r"prob_fn is a {}: give .*\(params, inputs\)"

PREDICTING = {
    "predict of the optimizer's state": (
        lambda: predict(opt_state()),
        NO_POSTERIOR.format("tuple"),
    ),
    "predict of parameters": (lambda: predict(PARAMS), NO_POSTERIOR.format("dict")),
    "predict of several states": (
        lambda: predict([state(), state()]),
        NO_POSTERIOR.format("list"),
    ),
    "predict with key and state swapped": (
        lambda: swagjax.predict(state(), KEY, probabilities, INPUTS),
        NO_POSTERIOR.format("PRNGKeyArray"),
    ),
    "predict with state and function swapped": (
        lambda: swagjax.predict(KEY, probabilities, state(), INPUTS),
        NO_FUNCTION.format("SWAGState"),
    ),
    "predict with function and inputs swapped": (
        lambda: swagjax.predict(KEY, state(), INPUTS, probabilities),
        NO_FUNCTION.format("ArrayImpl"),
    ),
    "predict without a function": (
        lambda: swagjax.predict_samples(KEY, state(), None, INPUTS),
        NO_FUNCTION.format("NoneType"),
    ),
    "predict before the first collection": (lambda: predict(empty()), NOTHING.format(0, 0)),
    "predict of a state of shapes": (lambda: predict(abstract()), SHAPES),
    "predict of members": (lambda: predict(members()), MEMBERS),
    "predict of a masked state without like": (
        lambda: predict(masked_state()),
        r"posterior .*\['b'\].*Partial\(swagjax\.sample, state=state, like=params\)",
    ),
    "a function that forgets to return": (
        lambda: predict(prob_fn=lambda params, x: None),
        r"prob_fn returned None: return .*arrays",
    ),
    "a loader in place of inputs": (
        lambda: predict(inputs=Loader()),
        r"inputs is a Loader: .*predict_batches",
    ),
    "a generator in place of inputs": (
        lambda: predict(inputs=(x for x in [INPUTS])),
        r"inputs is a generator: .*predict_batches",
    ),
    "batch statistics in place of a refresh": (
        lambda: predict(refresh={"mean": jnp.zeros(3)}),
        r"refresh is a dict: give .*batch_stats\.keep",
    ),
    "no samples": (lambda: predict(num_samples=0), "num_samples=0: give an integer of at least 1"),
    "fewer than no samples": (lambda: predict(num_samples=-3), "num_samples=-3: give an integer"),
    "samples as a float": (lambda: predict(num_samples=30.0), r"num_samples=30\.0: give an int"),
    "samples as a boolean": (lambda: predict(num_samples=True), "num_samples=True: give an int"),
    "samples as None": (lambda: predict(num_samples=None), "num_samples=None: give an integer"),
    "an empty chunk": (lambda: predict(chunk_size=0), "chunk_size=0: give an integer of at least"),
    "a chunk as a float": (lambda: predict(chunk_size=8.0), r"chunk_size=8\.0: give an integer"),
    "an odd number of pairs": (
        lambda: predict(num_samples=7, antithetic=True),
        "num_samples=7: antithetic pairs ask for an even number",
    ),
    "antithetic as a number": (lambda: predict(antithetic=2), "antithetic=2: give True or False"),
    "antithetic as text": (lambda: predict(antithetic="no"), "antithetic='no': give True or False"),
    "a scale that is negative, in a Partial": (
        lambda: jax.tree_util.Partial(swagjax.sample, state=state(), scale=-1.0)(KEY),
        r"scale=-1\.0: give a finite number of at least zero",
    ),
}

# --- Scoring ---------------------------------------------------------------------------------

LABELS = jnp.array([0, 1, 2, 0, 1])


@functools.cache
def scored():
    return predict(point(), num_samples=1)


NOT_TO_ONE = r"probs sums to .* not to 1\. Logits become probabilities by jax\.nn\.softmax"

SCORING = {
    "averaged logits": (
        lambda: swagjax.metrics.nll(predict(point(), logits), LABELS),
        NOT_TO_ONE,
    ),
    "predict_log of probabilities": (
        lambda: swagjax.metrics.ece(
            jnp.exp(swagjax.predict_log(KEY, point(), probabilities, INPUTS)), LABELS
        ),
        NOT_TO_ONE,
    ),
    "predict_log's logarithms": (
        lambda: swagjax.metrics.nll(jnp.log(scored()), LABELS),
        r"probs holds the negative value -.*log-probabilities by jnp\.exp",
    ),
    "a label out of range": (
        lambda: swagjax.metrics.nll(scored(), LABELS.at[0].set(3)),
        r"labels holds 3, but probs has 3 classes, 0 to 2: renumber the labels",
    ),
    "a label that marks what has none": (
        lambda: swagjax.metrics.accuracy(scored(), LABELS.at[4].set(-1)),
        r"labels holds -1, but probs has 3 classes, .*leave these examples out",
    ),
    "a weight below zero": (
        lambda: swagjax.metrics.nll(scored(), LABELS, weights=jnp.array([1, 1, -1, 1, 1])),
        r"weights holds the value -1, but must not be negative: .*0 for not at all",
    ),
    "weights of other examples": (
        lambda: swagjax.metrics.ece(scored(), LABELS, weights=jnp.ones(4)),
        r"weights has shape \(4,\), but must have that of labels, \(5,\).*one weight per example",
    ),
    "one-hot labels": (
        lambda: swagjax.metrics.brier(scored(), jax.nn.one_hot(LABELS, 3)),
        r"labels has shape \(5, 3\) and probs \(5, 3\).*one-hot labels become numbers by argmax",
    ),
    "labels before probabilities": (
        lambda: swagjax.metrics.nll(LABELS, scored()),
        r"labels has shape \(5, 3\) and probs \(5,\).*pass probs first",
    ),
    "the samples not averaged": (
        lambda: swagjax.metrics.nll(jnp.stack([scored(), scored()]), LABELS),
        r"labels has shape \(5,\) and probs \(2, 5, 3\)",
    ),
}

MEANS, TARGETS = jnp.zeros((4, 1)), jnp.arange(4.0)

NUMBERS = {
    "a column against a vector": (
        lambda: swagjax.metrics.gaussian_nll(MEANS, 1.0, TARGETS),
        r"targets has shape \(4,\) and mean \(4, 1\).*targets\.reshape\(mean\.shape\)",
    ),
    "no noise at all": (
        lambda: swagjax.metrics.gaussian_nll(TARGETS, 0.0, TARGETS),
        r"variance holds the value 0, but must be positive.*jax\.nn\.softplus",
    ),
    "a level in per cent": (
        lambda: swagjax.metrics.coverage(TARGETS, 1.0, TARGETS, level=95),
        r"level is 95, but must be a number above 0 and below 1.*try 0\.95",
    ),
    "the temperature of what is never wrong": (
        lambda: swagjax.calibration.fit_temperature(10 * jnp.eye(3), jnp.arange(3)),
        r"logits are highest at the label for every example.*give more held-out examples",
    ),
    "the temperature of probabilities": (
        lambda: swagjax.calibration.fit_temperature(scored(), LABELS),
        r"logits holds probabilities: .*jnp\.log\(probs\)",
    ),
    "outputs that targets do not have": (
        lambda: swagjax.metrics.mixture_nll(MEANS.T, 1.0, TARGETS, event_ndim=2),
        r"event_ndim is 2, but targets has 1 axes: .*1 for targets of shape \(N, D\)",
    ),
    "a scale in place of a loss": (
        lambda: swagjax.calibration.fit_scale(0.5),
        r"held_out_loss is a float: give a function from a scale to the loss on held-out data",
    ),
    "a mixture of one state": (
        lambda: swagjax.ensemble.mix(state()),
        r"states is one state with num_collected=4: give a list of states, mix\(\[state\]\)",
    ),
    "a state in place of a mixture": (
        lambda: swagjax.ensemble.sample(KEY, state()),
        r"mixture is a SWAGState: give what swagjax\.ensemble\.mix\(states\) made",
    ),
    "a state that is a point diagnosed": (
        lambda: swagjax.diagnostics.drift(point()),
        r"swagjax\.swag",
    ),
}

# --- Surfaces, subspaces, constant steps, cycles ---------------------------------------------

CORNERS = jnp.eye(3)


def linear(params, _):
    return params.sum()


def noise():
    return swagjax.constant_sgd.GradientNoise(10, jnp.zeros(2), jnp.ones(2))


def subspace():
    return swagjax.subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))


def evaluate(fn=linear, path=None, at=(0.0, 1.0)):
    path = functools.partial(swagjax.surface.chain, list(CORNERS)) if path is None else path
    return swagjax.surface.evaluate(fn, path, jnp.asarray(at), None)


def connect(loss=linear, points=CORNERS, batches=RANK * (0.0,), tx=TX, **options):
    batches = jnp.asarray(batches)
    return swagjax.surface.connect(KEY, loss, list(points), batches, tx, **options)


def gradient_noise(batches, loss=lambda params, x: (params * x).sum()):
    return swagjax.constant_sgd.gradient_noise(loss, jnp.zeros(2), batches)


NO_PLANE = r"plane is a {}: give what surface\.plane or surface\.pca_plane made"
NO_SPACE = r"space is a {}: give what subspace\.pca or subspace\.random made"
NO_NOISE = r"noise is a {}: give what constant_sgd\.gradient_noise returned"
ONE_NUMBER = r"t has shape \(3,\): give one number; many go to evaluate, or through jax\.vmap"

EXPLORING = {
    "a plane through integers, to which its points would be rounded": (
        lambda: swagjax.surface.plane(*jnp.eye(3, dtype=int)),
        r"first holds numbers of int32: give weights, arrays of floats, such as swagjax\.mean",
    ),
    "a plane through one point": (
        lambda: swagjax.surface.plane(PARAMS, PARAMS, PARAMS),
        r"first, second and third lie on one line.*such as initialisation, SGD and SWA",
    ),
    "a plane of the optimizer's state": (
        lambda: swagjax.surface.pca_plane(opt_state()),
        r"trajectory holds numbers of int32: give weights.*such as swagjax\.mean\(state\)",
    ),
    "a point of weights": (
        lambda: swagjax.surface.point(PARAMS, (0.0, 1.0)),
        NO_PLANE.format("dict"),
    ),
    "a grid around weights": (
        lambda: swagjax.surface.grid(PARAMS),
        NO_PLANE.format("dict"),
    ),
    "state and plane swapped": (
        lambda: swagjax.surface.project(state(), swagjax.surface.plane(*CORNERS)),
        NO_PLANE.format("SWAGState"),
    ),
    "many points of a plane at once": (
        lambda: swagjax.surface.point(swagjax.surface.plane(*CORNERS), jnp.ones((2, 3))),
        r"coordinates are 2 numbers of shapes \[\(3,\)\]: the plane has 2 axes, give a number",
    ),
    "a margin that is negative": (
        lambda: swagjax.surface.grid(swagjax.surface.plane(*CORNERS), margin=-0.6),
        r"margin=-0\.6: give a share of at least 0",
    ),
    "many distances along a ray": (
        lambda: swagjax.surface.ray(CORNERS[0], CORNERS[1], jnp.arange(3.0)),
        ONE_NUMBER,
    ),
    "many places on a curve": (
        lambda: swagjax.surface.bezier(list(CORNERS), jnp.arange(3.0)),
        ONE_NUMBER,
    ),
    "points stacked in one array": (
        lambda: swagjax.surface.chain(CORNERS, 0.5),
        r"points is a ArrayImpl of 1 arrays: give a list or tuple of at least 2 trees",
    ),
    "a plane in place of a path": (
        lambda: evaluate(path=swagjax.surface.plane(*CORNERS)),
        r"path is a Plane: give a function",
    ),
    "a loss that forgets to return": (
        lambda: evaluate(lambda params, _: None),
        r"fn returned None: return an array, or a tree of arrays",
    ),
    "a learning rate in place of an optimizer": (
        lambda: connect(tx=0.1),
        r"tx=0\.1: give an optax transformation, such as optax\.sgd",
    ),
    "a loss of each example along a curve": (
        lambda: connect(lambda params, _: params),
        r"loss_fn returned an array of shape \(3,\): return one number, the mean over the batch",
    ),
    "a number of steps in place of batches": (
        lambda: connect(batches=500),
        r"batches have first axes \[\(\)\]: .*jnp\.arange\(steps\)",
    ),
    "a state in place of a subspace": (
        lambda: swagjax.subspace.point(state(), jnp.ones(2)),
        NO_SPACE.format("SWAGState"),
    ),
    "a likelihood in place of its function": (
        lambda: swagjax.subspace.log_prob(subspace(), jnp.ones(1), function=-3.0),
        r"function is a float: give one from weights to the log-likelihood",
    ),
    "a likelihood that forgets to return": (
        lambda: swagjax.subspace.log_prob(subspace(), jnp.ones(1), function=lambda params: None),
        r"function returned None: return one number, the sum of the log-likelihood",
    ),
    "a subspace around integers": (
        lambda: swagjax.subspace.random(KEY, {"w": jnp.arange(3)}, 2),
        r"origin holds numbers of \['int32'\]: give parameters, floats, such as swagjax\.mean",
    ),
    "a matrix in place of the gradients' noise": (
        lambda: swagjax.constant_sgd.optimal_step_size(jnp.eye(2), 100, 5),
        NO_NOISE.format("ArrayImpl"),
    ),
    "a matrix in place of variances": (
        lambda: swagjax.constant_sgd.scale_by_variance(jnp.eye(2), 100, 5),
        NO_NOISE.format("ArrayImpl"),
    ),
    "a damping that is negative": (
        lambda: swagjax.constant_sgd.scale_by_variance(noise(), 100, 5, damping=-0.5),
        r"damping=-0\.5: give a finite number of at least 0",
    ),
    "one batch in place of batches": (
        lambda: gradient_noise(jnp.ones((5, 2))),
        r"batches is a ArrayImpl: give a list of them, \[batch\] for a single one",
    ),
    "one batch by name in place of batches": (
        lambda: gradient_noise({"x": jnp.ones((5, 2))}),
        r"batches is a dict: give a list of them, \[batch\] for a single one",
    ),
    "a loss with a number for each parameter": (
        lambda: gradient_noise([jnp.ones((5, 2))], lambda params, x: params * x),
        r"loss returned an array of shape \(2,\): return one number, of one example",
    ),
    "a covariance of another size than the Hessian": (
        lambda: swagjax.constant_sgd.kl_to_posterior(np.eye(3), np.eye(2), 10),
        r"covariance \(3, 3\), hessian \(2, 2\): give two square matrices of one size",
    ),
    "the two learning rates of a cycle swapped": (
        lambda: swagjax.schedules.cyclical_schedule(0.01, 0.1, 4),
        r"min_value is 0\.1 and max_value 0\.01: the first is the lower one, give cyclical_sche",
    ),
    "a triangle without a middle": (
        lambda: swagjax.schedules.at_minimum(5),
        r"cycle is 5, but the triangular one .*give an even number, such as 6",
    ),
    "points in a list": (
        lambda: predict(swagjax.ensemble.Points([PARAMS, PARAMS])),
        r"points have leaves of shape .*give a tree like the parameters, with one axis of points",
    ),
    "a draw from one state": (
        lambda: swagjax.ensemble.draw(KEY, state(), 0),
        r"mixture is a SWAGState: give what swagjax\.ensemble\.mix\(states\) made",
    ),
    "iterates of the optimizer's state": (
        lambda: swagjax.iterates(opt_state()),
        GET_STATE.format("state", "tuple"),
    ),
}

CATALOGUE = {
    f"{chapter}: {name}": entry
    for chapter, entries in {
        "setting up": SETTING_UP,
        "parameters": PARAMETERS,
        "training": TRAINING,
        "finding the state": FINDING,
        "keys": KEYS,
        "reading": READING,
        "options": OPTIONS,
        "predicting": PREDICTING,
        "scoring": SCORING,
        "numbers, several runs": NUMBERS,
        "exploring": EXPLORING,
    }.items()
    for name, entry in entries.items()
}


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """Keep the lines of JAX in a traceback, so that a test can tell who raised."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.parametrize(("use", "message"), CATALOGUE.values(), ids=CATALOGUE)
def test_wrong_use_is_answered_by_the_library(use, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as caught:
        use()
    assert LIBRARY in caught.traceback[-1].path.parents, caught.traceback[-1]


# --- What another answers for ----------------------------------------------------------------


def donated():
    """The state that a jitted step was given to overwrite."""
    given = jax.tree.map(jnp.copy, opt_state())
    jax.jit(TX.update, donate_argnums=1)(PARAMS, given, PARAMS)
    return swagjax.get_state(given)


def growing():
    """A function that is not pure: JAX traces it more than once."""
    lengths = itertools.count(2)
    return lambda params, x: jnp.ones(next(lengths))


def restored(folder, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", opt_state())
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", target)


PASSED_ON = {
    "a donated state": (
        lambda _: sample(donated()),
        RuntimeError,
        r"Array has been deleted",
    ),
    "a positional start": (
        lambda _: swagjax.swag(20, 100),
        TypeError,
        r"swag\(\) takes from 0 to 1 positional arguments but 2 were given",
    ),
    "swag that was not called": (
        lambda _: optax.chain(optax.sgd(0.1), swagjax.swag),
        AttributeError,
        r"function.*init",
    ),
    "a Python branch on the step": (
        lambda _: jax.jit(swagjax.swag(RANK, when=lambda t: t > 2 and t % 2 == 0).update)(
            PARAMS, empty(), PARAMS
        ),
        jax.errors.TracerBoolConversionError,
        r"boolean conversion of traced array",
    ),
    "the whole chain's state and params swapped": (
        lambda _: TX.update(PARAMS, PARAMS, opt_state()),
        ValueError,
        r"Make sure you have called init first",
    ),
    "inputs of another width": (
        lambda _: predict(inputs=jnp.ones((5, 4))),
        TypeError,
        r"contracting dimensions .*\(4,\) and \(2,\)",
    ),
    "labels among the batches": (
        lambda _: next(swagjax.predict_batches(KEY, state(), probabilities, [(INPUTS, LABELS)])),
        TypeError,
        r"unsupported operand type\(s\) for @: 'tuple'",
    ),
    "a function of NumPy": (
        lambda _: predict(prob_fn=lambda p, x: np.asarray(probabilities(p, x))),
        jax.errors.TracerArrayConversionError,
        r"numpy\.ndarray conversion",
    ),
    "outputs of another shape at each call": (
        lambda _: predict(point(), growing()),
        TypeError,
        r"incompatible shapes for broadcasting: \(2,\), \(3,\)",
    ),
    "a function that refuses the statistics": (
        lambda _: predict(refresh=swagjax.batch_stats.keep({"mean": jnp.zeros(3)})),
        TypeError,
        r"probabilities\(\) takes 2 positional arguments but 3 were given",
    ),
    "a checkpoint of another model": (
        lambda folder: restored(folder, jax.eval_shape(TX.init, OTHER)),
        ValueError,
        r"mean.*kernel.*structure|structure.*kernel",
    ),
}


@pytest.mark.parametrize(("use", "error", "message"), PASSED_ON.values(), ids=PASSED_ON)
def test_errors_of_others_pass_through(use, error, message, tmp_path):
    with pytest.raises(error, match=message):
        use(tmp_path)


# --- What looks wrong and is right -----------------------------------------------------------


def everything(state):
    """What is read off a state, for a comparison to the last bit."""
    diagonal = state._replace(deviations=None)
    noise = np.ones(RANK, np.float32)
    return {
        "sample": sample(state, like=PARAMS),
        "sq_mean": state.sq_mean,
        "variance": swagjax.variance(state),
        "from_noise": swagjax.from_noise(state, jax.device_get(PARAMS), noise),
        "log_prob": swagjax.log_prob(diagonal, PARAMS, min_variance=1e-3),
        "merge": swagjax.merge(diagonal, diagonal)._asdict(),
        "predict": predict(diagonal, num_samples=2, antithetic=True),
        "get_state": swagjax.get_state({"opt": state})._asdict(),
        "update": update(PARAMS, state, PARAMS)[1]._asdict(),
    }


@functools.cache
def wanted():
    return everything(state())


@pytest.mark.parametrize(
    "copy_of",
    [
        jax.device_get,
        lambda state: pickle.loads(pickle.dumps(jax.device_get(state))),
        lambda state: flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
        copy.deepcopy,
    ],
    ids=["NumPy arrays", "pickled", "flax bytes", "deep copy"],
)
def test_a_state_away_from_the_device_works_everywhere(copy_of):
    chex.assert_trees_all_equal(everything(copy_of(state())), wanted())


def test_when_may_return_a_python_boolean():
    for verdict in (True, False):
        tx = swagjax.swag(RANK, when=lambda t, verdict=verdict: verdict)
        assert int(tx.update(PARAMS, empty(), PARAMS)[1].num_collected) == verdict


def test_params_may_be_given_by_name():
    by_name = TX.update(PARAMS, opt_state(), params=PARAMS)
    chex.assert_trees_all_equal(by_name, TX.update(PARAMS, opt_state(), PARAMS))


@pytest.mark.parametrize("number", [np.int64(3), jnp.int32(3)], ids=["NumPy", "JAX"])
def test_numbers_of_numpy_and_jax_are_numbers(number):
    got = predict(point(), num_samples=number, chunk_size=number)
    chex.assert_trees_all_equal(got, predict(point(), num_samples=3, chunk_size=3))


def test_a_boolean_of_numpy_is_a_boolean():
    diagonal = state()._replace(deviations=None)
    got = predict(diagonal, num_samples=2, antithetic=np.bool_(True))
    chex.assert_trees_all_equal(got, wanted()["predict"])


def test_arrays_of_numpy_are_inputs_and_keys():
    words = np.asarray(jax.random.key_data(KEY))
    got = swagjax.predict(words, point(), probabilities, np.asarray(INPUTS), num_samples=1)
    chex.assert_trees_all_equal(got, scored())


def test_the_state_is_found_in_whatever_holds_it():
    holders = [
        TrainState.create(apply_fn=None, params=PARAMS, tx=TX).replace(opt_state=opt_state()),
        (PARAMS, opt_state()),
        {"epoch": 3, "opt_state": opt_state()},
        state(),
    ]
    for holder in holders:
        assert swagjax.get_state(holder).mean["w"] is state().mean["w"]


def test_a_masked_sample_without_like_has_holes():
    theta = sample(masked_state())
    assert isinstance(theta["b"], optax.MaskedNode)
    assert theta["w"].shape == (2, 3)


def test_a_scale_that_is_traced_and_wrong_gives_nan_not_a_sample():
    diagonal = state()._replace(deviations=None)
    sampled = jax.jit(lambda scale: sample(diagonal, scale=scale))
    for scale in (-1.0, float("nan")):
        thetas = sampled(scale)
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(thetas))


def test_python_floats_and_weak_types_keep_their_types_in_a_loop():
    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = TX.update(gradients(params, t), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = {"python": 0.5, "weak": jnp.asarray(0.5), "strong": jnp.float32(0.5)}
    carry, _ = jax.lax.scan(step, (params, TX.init(params)), jnp.arange(4.0))
    means = swagjax.get_state(carry).mean
    assert float(means["python"]) == float(means["weak"]) == float(means["strong"])


def test_a_tree_without_weights_is_a_posterior_of_none():
    state = train(swagjax.swag(RANK), {}, 2)
    assert (int(state.num_collected), sample(state), float(swagjax.log_prob(state, {}))) == (
        2,
        {},
        0.0,
    )
