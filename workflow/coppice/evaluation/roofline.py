"""How fast a node could run at most: the roofline model, from its shape and from what its checkpoint stores.

Source: Yuan et al., LLM Inference Unveiled: Survey and Roofline Model Insights (arXiv 2402.16363). An operation takes

    time = max(operations / peak, bytes / bandwidth)

and a pass the sum over its operations: one after the other, with full units or full bandwidth, and nothing else
(launches, the host) takes time. So they are lower bounds, but for models so small that their weights stay in a cache
near the units. Symbols: b sequences, T new tokens of each (the prompt, or 1 in decoding), s tokens attended to,
h hidden and I intermediate size, n and n_kv heads, d their width, V vocabulary; a bytes of a number of the states.

- linear n_in -> n_out: 2 n_in n_out b T operations; the stored weight, and b T (n_in + n_out) numbers of the states;
- attention: 2 T s d n b for the scores, the same for the values, 5 b n T s for the softmax. Fused, queries and outputs
  (2 T d n b a) and the cache of s tokens pass once, read again from the chip; otherwise the scores pass too;
- norms: 7 b h T, 2 b h T a; residuals: b h T, 2 b h T a; gated activation: 2 b I T, 3 b I T a;
- the head, for the last token of each sequence.

The paper's own tool counts half the head's operations, takes h for I in the activation, and reads the cache once for
each block of queries in fused attention, which kernels that find it on the chip again beat. Biases, the embedding's
rows and the weights of norms are left out, which are small next to the linears.

Integer peaks are taken only where weights and inputs are on uniform grids of 8 bits at most, those of 16-bit floats
otherwise, for wider numbers too. A format's potential is not what this software does: nodes with packed
integers compute here in floats.

Neither torch nor NumPy is imported here: the tables are written without them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, NamedTuple

from coppice.hardware import DEVICES, Device
from coppice.models.architectures.base import Architecture, Shape, architecture, shape_of
from coppice.models.contracts import Role
from coppice.models.replacements import Place, Product, word_bytes
from coppice.records.base import Json
from coppice.records.compression import CACHE, Entries

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


class Model(NamedTuple):
    """A decoder as the roofline sees it.

    shapes: those of the blocks, which may be of different widths; linears: every product of the blocks; head: those of
    the head; activation_bits, kv_bits: of a number of the states and of the cache; cache: how keys and values are
    compressed, in the fields of `kv_cache.CacheSettings`, or None.
    """

    shapes: tuple[Shape, ...]
    linears: tuple[Product, ...]
    head: tuple[Product, ...]
    activation_bits: float
    kv_bits: float
    cache: Mapping[str, Any] | None = None


class Operation(NamedTuple):
    """One operation, done `count` times."""

    operations: float
    bytes: float
    integer: bool = False
    sparse: bool = False
    count: int = 1  # type: ignore[assignment]  # hides tuple.count


# Models


def uniform(shape: Shape, weight_bits: float = 16, activation_bits: float = 16, kv_bits: float = 16) -> Model:
    """A model whose weights, the head's too, states and cache have so many bits each."""

    def product(role: str, inputs: int, outputs: int) -> Product:
        weights = inputs * outputs
        written = kv_bits if role in ("k", "v") else activation_bits
        integer = max(weight_bits, activation_bits) <= 8
        return Product(inputs, outputs, weights, weights * weight_bits / 8, activation_bits, written, integer)

    block = [product(role, *sizes) for role, sizes in shape.linears().items()]
    head = product("head", shape.hidden, shape.vocabulary)
    return Model((shape,) * shape.layers, tuple(block) * shape.layers, (head,), activation_bits, kv_bits)


def model_of_node(config: Mapping[str, Any], entries: Entries, sparse: bool = False) -> Model:
    """The model of a checkpoint, from its config.json and the entries of its compression.json.

    sparse: whether masked matrices have a 2:4 pattern and a kernel that makes use of it; they then weigh half their
    weights and 2 bits for the place of each kept one, and are multiplied twice as fast. Zeros save nothing otherwise.
    """
    family, shape = architecture(config["model_type"]), shape_of(config)
    bits = BITS[config.get("dtype", config.get("torch_dtype", "float32"))]
    shapes = [block_shape(shape, family, layer, entries) for layer in range(shape.layers)]
    linears = [
        product
        for layer, block in enumerate(shapes)
        for role, sizes in block.linears().items()
        for product in products(entries, family.full_name(layer, family.linears[role]), *sizes, bits, sparse)
    ]
    head = products(entries, family.head, shape.hidden, shape.vocabulary, bits, sparse)
    return Model(tuple(shapes), tuple(linears), tuple(head), bits, bits, entries.get(CACHE))


def block_shape(shape: Shape, family: Architecture, layer: int, entries: Entries) -> Shape:
    """The shape of a block: that of the model's config, but where compression.json gives its linears another width."""

    def outputs(role: Role) -> int:
        entry = entries.get(family.full_name(layer, family.linears[role]), {})
        return entry.get("out_features", shape.linears()[role][1])

    heads, kv_heads = outputs("q") // shape.head_dim, outputs("k") // shape.head_dim
    return shape._replace(heads=heads, kv_heads=kv_heads, intermediate=outputs("up"))


def products(entries: Entries, name: str, inputs: int, outputs: int, bits: int, sparse: bool = False) -> list[Product]:
    """The products that take the place of the linear `name`, by its entry in compression.json.

    bits: of a stored floating number. Factors are products of their own, and may be packed in their turn.
    """
    return Place(entries, name, inputs, outputs, bits, sparse).products()


def weight_bytes(model: Model) -> float:
    """Bytes of all products: those of the blocks and the head."""
    return sum(product.stored_bytes for product in (*model.linears, *model.head))


def kv_cache_bytes(model: Model, batch: int, prompt: int, decoded: int = 0) -> float:
    """Bytes of keys and values of all layers after a prompt of so many tokens and so many decoded ones."""
    return sum(
        count * _layer_cache_bytes(model, shape, batch, prompt, decoded)
        for shape, count in Counter(model.shapes).items()
    )


def _layer_cache_bytes(model: Model, shape: Shape, batch: int, prompt: int, decoded: int) -> float:
    """The same of one layer; a compressed cache as `kv_cache.cache_bytes` counts it."""
    heads, width, number = shape.kv_heads, shape.head_dim, model.kv_bits / 8
    if model.cache is None:
        return 2 * batch * heads * width * (prompt + decoded) * number
    window = model.cache["window"]
    whole = prompt // window * window
    chunks, newest = divmod(prompt - whole + decoded, window)
    held = 2 * batch * heads * width * newest * number
    for tokens, count, rank in ((whole, min(whole, 1), "rank"), (window, chunks, "decode_rank")):
        factors = min(model.cache.get(rank, 0), tokens, width) * (tokens + width) * batch * heads * number
        keys = _vectors_bytes(model.cache, batch * heads * width, tokens, number)
        values = _vectors_bytes(model.cache, batch * tokens, heads * width, number)
        held += count * (keys + values + 2 * factors)
    return held


def _vectors_bytes(cache: Mapping[str, Any], count: int, length: int, number: float) -> float:
    """`count` vectors of `length` values: codes, grids and outliers."""
    if length == 0:
        return 0
    group = length if cache["group_size"] == -1 else min(cache["group_size"], length)
    outliers = min(2 * ceil(round(cache.get("outliers", 0) * length / 2, 6)), length)
    place = 2 if length <= 2**15 else 4
    grids = 2 * ceil(length / group) * number
    return word_bytes(count * length, cache["bits"]) + count * (grids + outliers * (number + place))


# Passes


def prefill(model: Model, batch: int, prompt: int, fused: bool = True) -> list[Operation]:
    """The operations of reading `batch` prompts of so many tokens; `fused`: attention keeps its scores on the chip."""
    return [*_dense_operations(model, batch, prompt), *_attention(model, batch, prompt, prompt, 0, fused)]


def decode(model: Model, batch: int, prompt: int, decoded: int = 0, fused: bool = True) -> list[Operation]:
    """The operations of writing one more token of each sequence, after a prompt and so many tokens written before."""
    return [*_dense_operations(model, batch, 1), *_attention(model, batch, 1, prompt, decoded, fused)]


def generation(model: Model, batch: int, prompt: int, generate: int, fused: bool = True) -> list[Operation]:
    """The operations of a prefill and of the decoding of so many tokens after it."""
    operations = prefill(model, batch, prompt, fused)
    step = _dense_operations(model, batch, 1)
    operations += [operation._replace(count=generate * operation.count) for operation in step]
    for decoded in range(generate):
        operations += _attention(model, batch, 1, prompt, decoded, fused)
    return operations


def _dense_operations(model: Model, batch: int, tokens: int) -> list[Operation]:
    """All but attention: what does not depend on the tokens before."""
    layers, number = len(model.shapes), model.activation_bits / 8
    states = batch * tokens * model.shapes[0].hidden
    activations = [(batch * tokens * shape.intermediate, count) for shape, count in Counter(model.shapes).items()]
    return [
        *(_operation(product, batch * tokens) for product in model.linears),
        *(_operation(product, batch) for product in model.head),
        Operation(7 * states, 2 * states * number, count=2 * layers + 1),
        Operation(states, 2 * states * number, count=2 * layers),
        *(Operation(2 * gates, 3 * gates * number, count=count) for gates, count in activations),
    ]


def _operation(product: Product, vectors: int) -> Operation:
    states = vectors * (product.inputs * product.input_bits + product.outputs * product.output_bits) / 8
    stored = product.stored_bytes + states
    return Operation(2 * product.multiplications * vectors, stored, product.integer, product.sparse)


def _attention(model: Model, batch: int, tokens: int, prompt: int, decoded: int, fused: bool) -> list[Operation]:
    return [
        operation
        for shape, count in Counter(model.shapes).items()
        for operation in _block_attention(model, shape, count, batch, tokens, prompt, decoded, fused)
    ]


def _block_attention(
    model: Model, shape: Shape, count: int, batch: int, tokens: int, prompt: int, decoded: int, fused: bool
) -> list[Operation]:
    """The attention of `count` blocks of one shape."""
    number = model.activation_bits / 8
    seen = prompt + decoded
    queries = batch * shape.heads * tokens * shape.head_dim
    scores = batch * shape.heads * tokens * seen
    cached = _layer_cache_bytes(model, shape, batch, prompt, decoded)
    integer = max(model.activation_bits, model.kv_bits) <= 8
    if fused:
        operations = 4 * scores * shape.head_dim + 5 * scores
        return [Operation(operations, 2 * queries * number + cached, integer, count=count)]
    products = Operation(2 * scores * shape.head_dim, (queries + scores) * number + cached / 2, integer)
    return [
        products._replace(count=2 * count),
        Operation(5 * scores, 2 * scores * number, integer, count=count),
    ]


def latency(operations: Iterable[Operation], device: Device) -> float:
    """Seconds that the operations take at least."""
    return sum(
        operation.count * max(operation.operations / _peak(operation, device), operation.bytes / device.bandwidth)
        for operation in operations
    )


def _peak(operation: Operation, device: Device) -> float:
    peak = device.int8 if operation.integer else device.float16
    return 2 * peak if operation.sparse else peak


def efficiency(measured: float, predicted: float) -> float:
    """The share of the roofline that a device reaches, from a measured and a predicted time of one dense run.

    A predicted time divided by it estimates what another node takes there.
    """
    return predicted / measured


# Rows of the table `costs`


def fit_to_context(prompt: int, generate: int, context: int) -> tuple[int, int]:
    """Prompt and generated tokens; shortened in proportion where they exceed the model's context."""
    if prompt + generate <= context:
        return prompt, generate
    shortened = max(1, context * prompt // (prompt + generate))
    return shortened, context - shortened


def rows(
    node: str, model: Model, context: int, *, devices: Iterable[str], batch: int, prompt: int, generate: int
) -> list[Json]:
    """Latencies of a node on each device, and the bytes of its cache once all tokens are written."""
    prompt, generate = fit_to_context(prompt, generate, context)
    settings: Json = {"batch": batch, "prompt": prompt, "generate": generate}
    passes = {
        "prefill_latency": (prefill(model, batch, prompt), "s"),
        "decode_latency": (decode(model, batch, prompt), "s/token"),
        "generation_latency": (generation(model, batch, prompt, generate), "s"),
    }
    latencies: list[Json] = [
        {
            "node": node,
            "device": f"{name} (roofline)",
            "metric": metric,
            "value": latency(operations, DEVICES[name]),
            "unit": unit,
            "simulated": True,
            "details": json.dumps({**settings, "source": DEVICES[name].source}, sort_keys=True),
        }
        for name in devices
        for metric, (operations, unit) in passes.items()
    ]
    cache: Json = {
        "node": node,
        "metric": "kv_cache_bytes",
        "value": kv_cache_bytes(model, batch, prompt, generate),
        "unit": "bytes",
        "simulated": True,
        "details": json.dumps(settings, sort_keys=True),
    }
    return [*latencies, cache]
