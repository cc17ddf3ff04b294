import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from benchmarks import text
from benchmarks.experiments import language as experiment
from benchmarks.experiments.language import Language, language
from benchmarks.options import UsageError
from benchmarks.text_models import TEXT_MODELS, LanguageModel

DATA = Path(os.environ.get("SWAGJAX_DATA", Path(__file__).parents[2] / "shared" / "data"))
TINY = {
    "windows": 8,
    "length": 8,
    "width": 8,
    "blocks": 1,
    "batch_size": 2,
    "steps": 12,
    "start": 6,
    "every": 2,
    "rank": 3,
    "num_samples": 2,
    "seeds": 2,
}
TEXTS = np.array([[5, 6, 7, 0, 0], [2, 1, 9, 9, 4], [0, 0, 0, 0, 0]])  # the last has no words
RANDOM = np.random.default_rng(0)


def numbered(encode, word):
    return encode([word])[0, 0]


def test_a_vocabulary_is_of_the_texts_trained_on_alone():
    train = ["b a a", "b b a c", "d d"]
    encode = text.encoder(train, min_count=2)
    assert [int(numbered(encode, word)) for word in "abdc"] == [2, 3, 4, text.UNKNOWN]
    assert numbered(encode, "test") == text.UNKNOWN
    tokens = encode(train)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[3, 2, 2, 0], [3, 3, 2, 1], [4, 4, 0, 0]]
    assert text.vocabulary_size(tokens) == 5
    assert encode(["a b c d a", ""]).tolist() == [[2, 3, 1, 4], [0, 0, 0, 0]]
    assert numbered(text.encoder(train, min_count=1), "c") == 5
    assert text.vocabulary_size(text.encoder(["once"])(["once"])) == 2


def test_words_are_lower_case_and_marks_stand_alone():
    assert text.words(b"Qu\xc3\xa9 is U.S. $5?") == ["qué", "is", "u", ".", "s", ".", "$", "5", "?"]
    assert text.words("Straße") == ["straße"]
    assert len(text.words(b"not \xff UTF-8")) == 5  # the broken byte is a mark, no error


def test_the_keys_of_a_text_set_are_found():
    features = pytest.importorskip("tensorflow_datasets").features
    coarse, fine = (features.ClassLabel(num_classes=n) for n in (6, 47))
    trec = {"fine": fine, "coarse": coarse, "text": features.Text()}
    assert text.keys(trec, None) == ("text", "coarse")
    assert text.keys(trec, ("text", "fine")) == ("text", "fine")
    assert text.keys(trec, ("fine", "text")) is None
    assert text.keys({"image": features.Image(), "label": fine}, ("image", "label")) is None
    assert text.keys(trec | {"answer": features.Text()}, None) is None
    assert text.keys({"text": features.Text()}, None) is None


@pytest.mark.data
def test_trec_is_read():
    tfds = pytest.importorskip("tensorflow_datasets")
    if not (DATA / "tfds" / "trec").is_dir():
        pytest.skip("no trec")
    builder = tfds.builder("trec", file_format="array_record", data_dir=DATA / "tfds")
    keys = text.keys(builder.info.features, builder.info.supervised_keys)
    assert keys == ("text", "label-coarse")
    train, test = ([r["text"] for r in builder.as_data_source(split=s)] for s in ("train", "test"))
    encode = text.encoder(train)
    tokens = encode(train)
    assert tokens.shape == (5452, 37)
    assert encode(test).shape == (500, 37)
    assert 0 < (encode(test) == text.UNKNOWN).mean() < 0.1


def initial(model, x):
    """Random parameters of all kinds: biases and scales are not at zero and one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda leaf: 0.3 * RANDOM.normal(size=leaf.shape), shapes)


def count(model, x):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_models_have_the_parameters_of_a_count_by_hand():
    x = np.ones((1, 5), np.int32)
    V, C, d = 100, 6, 64
    # Query, key, value and output; a hidden layer of 4 d units; two normalisations.
    block = 4 * (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    head = d * C + C
    transformer = TEXT_MODELS["transformer"](C, vocabulary=V)
    assert count(transformer, x) == V * d + transformer.blocks * block + 2 * d + head
    lstm = 4 * (d * d + d * d + d)  # four gates, each of input, state and bias
    assert count(TEXT_MODELS["lstm"](C, vocabulary=V), x) == V * d + 2 * lstm + 2 * d * C + C
    assert count(LanguageModel(), x) == 256 * d + 64 * d + 2 * block + 2 * d == 120_576
    small = LanguageModel(vocabulary=10, length=7, width=4, blocks=3)
    assert count(small, x) == 17 * 4 + 3 * (12 * 16 + 13 * 4) + 2 * 4


def normalised(params, h):
    apart = h - h.mean(-1, keepdims=True)
    scaled = apart / np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * params["scale"] + params["bias"]


def dense(params, h):
    return h @ params["kernel"] + params["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block(params, h, seen):
    """A block on one text ``(T, d)``, head after head; ``seen[i, j]``: i looks at j."""
    attention, n = params["MultiHeadDotProductAttention_0"], normalised(params["LayerNorm_0"], h)
    out = attention["out"]["bias"].copy()
    for head in range(attention["query"]["kernel"].shape[1]):
        q, k, v = (
            n @ attention[name]["kernel"][:, head] + attention[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        weights = special.softmax(np.where(seen, q @ k.T / np.sqrt(q.shape[1]), -np.inf), axis=1)
        out = out + weights @ v @ attention["out"]["kernel"][head]
    h = h + out
    inner = gelu(dense(params["Dense_0"], normalised(params["LayerNorm_1"], h)))
    return h + dense(params["Dense_1"], inner)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


def test_the_language_model_is_a_decoder_only_transformer():
    model = LanguageModel(vocabulary=11, length=7, width=8, heads=2)
    x = RANDOM.integers(0, 11, (3, 5))
    params = initial(model, x)
    logits = jax.jit(model.apply)({"params": params}, x)
    assert logits.shape == (3, 5, 11)
    table, seen = params["Embed_0"]["embedding"], np.tri(5, dtype=bool)
    for row, found in zip(x, np.asarray(logits), strict=True):
        h = table[row] + params["positions"][:5]
        for name in ("Block_0", "Block_1"):
            h = block(params[name], h, seen)
        close(found, normalised(params["LayerNorm_0"], h) @ table.T)


def waves(length, width):
    half = width // 2
    rates = 10_000.0 ** (-np.arange(half) / (half - 1))
    angles = np.arange(length)[:, None] * rates
    rows = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_classifier_sees_each_text_without_its_padding():
    model = TEXT_MODELS["transformer"](3, vocabulary=11, width=8, heads=2)
    params = initial(model, TEXTS)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, TEXTS))
    assert np.isfinite(logits).all()
    for row, found in zip([TEXTS[0, :3], TEXTS[1]], logits[:2], strict=True):
        h = params["Embed_0"]["embedding"][row] + waves(len(row), 8)
        for i in range(model.blocks):
            h = block(params[f"Block_{i}"], h, np.ones((len(row), len(row)), bool))
        close(found, dense(params["Dense_0"], normalised(params["LayerNorm_0"], h).mean(0)))


def lstm(params, h):
    """States of an LSTM of 4 units over one text ``(T, d)``."""
    state, memory, out = np.zeros(4), np.zeros(4), []
    for x in h:
        i, f, g, o = (
            x @ params[f"i{gate}"]["kernel"] + dense(params[f"h{gate}"], state) for gate in "ifgo"
        )
        memory = special.expit(f) * memory + special.expit(i) * np.tanh(g)
        state = special.expit(o) * np.tanh(memory)
        out.append(state)
    return np.array(out)


def test_the_lstm_reads_each_text_from_both_ends_without_its_padding():
    model = TEXT_MODELS["lstm"](3, vocabulary=11, width=4)
    params = initial(model, TEXTS)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, TEXTS))
    assert np.isfinite(logits).all()
    cells = [params[name] for name in sorted(params) if "Cell" in name]
    assert len(cells) == 2
    for row, found in zip([TEXTS[0, :3], TEXTS[1]], logits[:2], strict=True):
        h = params["Embed_0"]["embedding"][row]
        both = [lstm(cells[0], h), lstm(cells[1], h[::-1])[::-1]]
        close(found, dense(params["Dense_0"], np.concatenate(both, axis=1).mean(0)))


@pytest.mark.parametrize("name", ["transformer", pytest.param("lstm", marks=pytest.mark.slow)])
def test_dropout_is_on_with_its_key_alone(name):
    model = TEXT_MODELS[name](3, vocabulary=11, width=4, dropout=0.5, dtype=jnp.bfloat16)
    params = initial(model, TEXTS)

    @jax.jit
    def three(key):
        plain = model.clone(dropout=0.0).apply({"params": params}, TEXTS)
        off = model.apply({"params": params}, TEXTS, train=True)
        return plain, off, model.apply({"params": params}, TEXTS, rngs={"dropout": key})

    plain, without, dropped = three(jax.random.key(1))
    assert plain.dtype == jnp.float32  # else probabilities would have three digits
    assert np.array_equal(plain, without)
    assert not np.array_equal(plain, dropped)


def test_a_text_is_split_by_position():
    content = bytes(range(100)) * 2
    parts = experiment.split(content, 10)
    assert [len(part) for part in parts] == [160, 20, 20]
    assert b"".join(part.tobytes() for part in parts) == content
    assert experiment.split(b"a" * 110, 10)
    with pytest.raises(UsageError, match=r"--text: 109 bytes.* at least 110 bytes"):
        experiment.split(b"a" * 109, 10)


def test_texts_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    cases = {
        "latin": (b"caf\xe9", "byte 3 is not UTF-8"),
        "zeros": (b"a\0b", "zero bytes"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=message):
            experiment.read(tmp_path / name)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match=r"--text .*; give a file of text"):
            experiment.read(path)
    (tmp_path / "good").write_bytes("é\r\n".encode())
    assert experiment.read(tmp_path / "good") == b"\xc3\xa9\r\n"


def test_the_text_of_python_itself_is_the_default():
    from pydoc_data.topics import topics

    content = experiment.read(None).decode()
    assert all(topic in content for topic in topics.values())
    assert content.startswith(topics[min(topics)])


def test_windows_overlap_by_the_predicted_byte_alone():
    part = np.arange(41, dtype=np.uint8)
    every = experiment.windows(part, 4, 100)
    assert every[:, 0].tolist() == list(range(0, 40, 4))
    assert (np.diff(every, axis=1) == 1).all()
    assert np.sort(every[:, 1:].ravel()).tolist() == list(range(1, 41))  # each predicted once
    assert len(experiment.windows(part[:40], 4, 100)) == 9  # the last has no byte to follow
    assert experiment.windows(part, 4, 4)[:, 0].tolist() == [0, 12, 24, 36]


def test_scores_are_those_of_the_definitions():
    following = np.frombuffer("éa".encode() * 40, np.uint8)
    uniform = experiment.scores(np.full((120, 256), 1 / 256), following)
    assert uniform["perplexity"] == pytest.approx(256, rel=1e-5)
    assert uniform["bits per character"] == pytest.approx(12, rel=1e-5)  # 3 bytes, 2 characters
    probs = RANDOM.dirichlet(np.full(256, 0.5), 120)
    found = experiment.scores(probs, following)
    given = probs[np.arange(120), following]
    assert found["perplexity"] == pytest.approx(np.exp(-np.log(given).mean()), rel=1e-3)
    assert found["accuracy"] == pytest.approx((probs.argmax(1) == following).mean())
    order = np.argsort(probs.max(1))
    gaps = ((probs.argmax(1) == following) - probs.max(1))[order].reshape(20, 6).sum(1)
    assert found["ECE"] == pytest.approx(np.abs(gaps).sum() / 120, abs=1e-5)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_rate_of_adam_rises_stays_and_falls_in_the_baseline_alone(end):
    chosen = Language(steps=400, start=200, every=50, learning_rate=0.1)
    tx, params = experiment._optimizer(chosen, end), jnp.zeros(2)

    def step(carry, i):
        params, opt_state = carry
        updates, opt_state = tx.update(jnp.ones(2), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), updates[0]

    # Of a gradient that is always the same, Adam's update is its rate.
    (_, opt_state), steps = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(400))
    at = {0: 0, 25: 0.025, 100: 0.1, 200: 0.1}
    at |= {300: 0.1 - (1 - end) * 0.05, 399: 0.1 - (1 - end) * 0.0995}
    found = -np.asarray(steps)[list(at)]
    np.testing.assert_allclose(found, list(at.values()), rtol=1e-4, atol=1e-7)
    member = experiment.Member(params, opt_state)
    posteriors = experiment._posteriors({"decayed": member, "averaged": member}, 30)
    assert posteriors["SWAG"][0].num_collected == 4
    assert [samples for _, samples in posteriors.values()] == [1, 1, 30, 30]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"rank": 1}, "--rank 1: at least 2"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"width": 6}, "--width 6: a multiple of 4"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: a number above zero"),
        ({"learning_rate": math.inf}, "--learning-rate inf: a number above zero"),
        ({"start": 3981}, "--start 3981: at most --steps 4000 less --every 20"),
    ],
)
def test_settings_of_no_experiment_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        language(dataclasses.replace(Language(), **wrong))


@pytest.mark.slow
def test_one_command_writes_figures_and_a_picture_and_goes_on_where_it_was(tmp_path):
    (tmp_path / "my text.txt").write_text("To be, or not to be. " * 50)
    chosen = Language(**TINY, text=tmp_path / "my text.txt", results=tmp_path)
    language(chosen)
    path = tmp_path / "language" / "my text" / "results.json"
    whole = json.loads(path.read_text())
    assert list(whole["results"]) == list(experiment.METHODS)
    for of in whole["results"].values():
        assert list(of) == ["perplexity", "bits per character", "accuracy", "ECE"]
        assert {len(value["values"]) for value in of.values()} == {2}
    assert whole["bytes"] == {"train": 840, "validation": 105, "test": 105}
    assert (path.parent / "reliability.png").stat().st_size > 10_000

    stages = path.parent / "stages" / "stages.json"
    done = json.loads(stages.read_text())
    del done["stages"]["seed 1"]  # as if it was interrupted before
    stages.write_text(json.dumps(done))
    language(dataclasses.replace(chosen, resume=True))
    assert json.loads(path.read_text()) == whole
    with pytest.raises(UsageError, match="steps = 12, not 14"):
        language(dataclasses.replace(chosen, resume=True, steps=14))
